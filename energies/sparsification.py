"""Sparsification: the token is written in a complete dictionary, with few of its atoms.

    E(h)   = 1/2 |c - D h|^2,    c = frozen(h)
    -dE/dh = D^T ( c - D h )

D: (dim, dim), one atom a column. The state is the code of the token as it was at the input of the
layer. This is the smooth half of the second layer of CRATE; a proximal step makes it sparse,

    h+ = relu( h + eta D^T (c - D h) - eta lambda ),

which is the step for 1/2 |c - D h|^2 + lambda |h|_1 over h >= 0. At the first step c = h.

It is ``sparse_coding`` with A = 1 and as many atoms as coordinates, so the code can be the next
layer's token. In CRATE it stands for the last part of the sparse rate reduction, whose expansion
term log det(1 + Z^T Z) is held in place by the reconstruction instead of being differentiated.

Convex in h with the constant Hessian D^T D: a step size up to 2/L descends, L = |D|_2^2, about 4
where D starts at standard deviation 1/sqrt(dim). CRATE takes steps of 0.1.

>>> import cem
>>> from cem.energies import sparsification
>>> layer = cem.derive(sparsification, dim=16, update=cem.GradientDescent(0.1))
>>> layer.lowering.kernels
('matmul',)
>>> sparsification.curvature
'convex'

Source: Yu et al., White-Box Transformers via Sparse Rate Reduction, arXiv:2306.01129 and
arXiv:2311.13110, the ISTA block; there the step starts at the normalised token and replaces it.
"""

import cem


@cem.energy(h="dim", D="dim dim")
def sparsification(h, *, D):
    """E = 1/2 |c - D h|^2, c = frozen(h)."""
    return 0.5 * (h.detach() - D @ h).square().sum()
