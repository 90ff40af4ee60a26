"""Sparse memory energy: a modern Hopfield network that retrieves from few patterns only.

    E(h)   = 1/2 |h|^2 - (1/beta) Psi(beta U h),    Psi(z) = max_p p.z + H(p)
    dE/dh  = h - sum_m p_m U_m,    p = entmax_m(beta U_m . h)

U: (hidden, dim), one stored pattern a row; beta > 0, by default 1/sqrt(dim). The maximum is over
weights p >= 0 that sum to one, H(p) = (1 - sum_m p_m^alpha) / (alpha (alpha - 1)) is the Tsallis
entropy. With the entropy of Shannon in its place, the limit of alpha to 1, Psi is log-sum-exp, p is
the softmax and this is the memory energy. For alpha > 1 the weights of all but the nearest patterns
are exactly zero, p = max((alpha - 1) beta U h - tau, 0)^(1 / (alpha - 1)), and where one pattern is
ahead of the others by more than 1 / (beta (alpha - 1)) it is retrieved alone, exactly, in one step of
size 1.

``sparse_memory`` has alpha = 2 (sparsemax), ``sparse_memory_by(alpha)`` also 1.5; both are computed
exactly, by sorting.

A convex term plus a concave one: Psi is convex. A step up to size 2 lowers E, for the reason that is
given for the memory energy.

>>> import cem, torch
>>> from cem.energies import sparse_memory
>>> layer = cem.derive(sparse_memory, dim=4, hidden=5, beta=4.0)
>>> layer.lowering.kernels
('matmul',)
>>> _ = layer.U.data.copy_(torch.eye(5, 4))
>>> torch.equal(layer(0.9 * torch.eye(4)), torch.eye(4))
True

Source: Hu et al., On Sparse Modern Hopfield Model, arXiv:2309.12673, equations 2.4 to 2.6 for
alpha = 2; the weights are those of Martins and Astudillo, arXiv:1602.02068, and Peters et al.,
arXiv:1905.05702.
"""

from sympy import Sum

import cem

dim, hidden = cem.dims("dim hidden")
h, U = cem.state(dim), cem.parameter("U", hidden, dim)
beta = cem.scalar("beta", default=dim**-0.5, positive=True)
i, m = dim.index("i"), hidden.index("m")


def sparse_memory_by(alpha: float, name: str | None = None) -> cem.Energy:
    """The sparse memory energy with alpha 1.5 or 2; ``ValueError`` for another one."""
    likeness = cem.entmax_conjugate(beta * Sum(U[m, i] * h[i], i), m, alpha)
    name = name or f"sparse_memory_{str(alpha).replace('.', '_')}"
    return cem.Energy(Sum(h[i] ** 2, i) / 2 - likeness / beta, name=name)


sparse_memory = sparse_memory_by(2, name="sparse_memory")
