"""Memory energy: the retrieval of a modern Hopfield network is its gradient step.

    E(h)   = 1/2 |h|^2 - (1/beta) log sum_m exp(beta U_m . h)
    dE/dh  = h - sum_m p_m U_m,    p = softmax_m(beta U_m . h)

U: (hidden, dim), one stored pattern a row; beta > 0, by default 1/sqrt(dim). At step size 1 the
state becomes sum_m p_m U_m, a mean of the patterns weighted by their likeness to the state.

A convex term plus a concave one. The Hessian is 1 - beta Cov_p(U), so E is convex where beta
times the squared distance between any two patterns is at most 4. Convex or not, a step of size 1
lowers it: with the concave term replaced by its tangent, h+ is the minimum, so E(h+) <= E(h) -
1/2 |h+ - h|^2.

>>> import cem
>>> from cem.energies import memory
>>> cem.derive(memory, dim=16, hidden=24).lowering.kernels
('matmul',)
>>> memory.curvature
'unknown'

Source: Ramsauer et al., Hopfield Networks is All You Need, arXiv:2008.02217, without its constants.
"""

import torch

import cem

dim = cem.dims("dim")


@cem.energy(h="dim", U="hidden dim")
def memory(h, *, U, beta=dim**-0.5):
    """E = 1/2 |h|^2 - (1/beta) log sum_m exp(beta U_m . h)."""
    return 0.5 * (h * h).sum() - torch.logsumexp(beta * (U @ h), dim=0) / beta
