"""Gated energy: a gated MLP whose up and down projections are one matrix is its gradient step.

    E(h)   = -1/2 sum_m g(G_m . c) (U_m . h)^2,    c = frozen(h)
    -dE/dh = U^T ( g(G c) * U h )

U, G: (hidden, dim); g is an activation. Two matrices where a gated MLP has three. The gate reads
the frozen state, so it is a constant of dE/dh; gradients of training flow through it.

Quadratic in h, with the Hessian -U^T diag(g(G c)) U: concave where every gate is non-negative,
which holds for relu and sigmoid everywhere. silu and gelu are negative for negative arguments (by
at most 0.28 and 0.17), so their energies are neither convex nor concave in general.

>>> import cem
>>> from cem.energies import gated, gated_by, gated_relu
>>> cem.derive(gated, dim=16, hidden=24).lowering.kernels
('matmul',)
>>> gated.curvature, gated_relu.curvature
('unknown', 'concave')
>>> gated_by(cem.softplus).name
'gated_softplus'

Source: the layers are the gated linear units of Shazeer, arXiv:2002.05202 (silu: SwiGLU, gelu:
GEGLU, relu: ReGLU, sigmoid: GLU) with the down projection tied to the up projection.
"""

from sympy import Function, Sum

import cem

dim, hidden = cem.dims("dim hidden")
h = cem.state(dim)
U, G = cem.parameter("U", hidden, dim), cem.parameter("G", hidden, dim)
i, m = dim.index("i"), hidden.index("m")


def gated_by(g: type[Function], name: str | None = None) -> cem.Energy:
    """The gated energy with the activation g, a word of the language such as ``cem.silu``."""
    gate = g(Sum(G[m, i] * cem.frozen(h)[i], i))
    up = Sum(U[m, i] * h[i], i)
    return cem.Energy(-Sum(gate * up**2, m) / 2, name=name or f"gated_{g.__name__}")


gated_silu = gated_by(cem.silu)
gated_gelu = gated_by(cem.gelu)
gated_relu = gated_by(cem.relu)
gated_sigmoid = gated_by(cem.sigmoid)

gated = gated_silu
