"""Anchored gated energy: a gated MLP with a down projection of its own.

    E(h)   = -(tie/2) sum_m g(G_m . c) (U_m . h + D_m . (h - c) / tie)^2,    c = frozen(h)
    -dE/dh = (D + tie U)^T ( g(G c) * U c )     at h = c

U, G, D: (hidden, dim); g is silu, gelu, ...; tie > 0, by default 0.1. U reads and D writes, as in a
gated MLP with three matrices; the square ties them by a share of ``tie``, and tie -> 0 is Llama's
MLP. The anchor is the general way to let a feature of the state write other than it reads: U h
becomes U h + D (h - c) / tie, which is the same number where the state stands.

Quadratic in h: concave where every gate is non-negative (relu, sigmoid), in general neither.

>>> import cem
>>> from cem.energies import anchored_gated
>>> layer = cem.derive(anchored_gated, dim=16, hidden=24)
>>> layer.lowering.kernels
('matmul',)

Source: the layer is SwiGLU (Shazeer, arXiv:2002.05202) for tie -> 0; none that we know of for the anchor.
"""

from sympy import Function, Sum

import cem

dim, hidden = cem.dims("dim hidden")
h = cem.state(dim)
U, G = cem.parameter("U", hidden, dim), cem.parameter("G", hidden, dim)
D = cem.parameter("D", hidden, dim)
tie = cem.scalar("tie", default=0.1, positive=True)
i, m = dim.index("i"), hidden.index("m")


def anchored_gated_by(g: type[Function], name: str) -> cem.Energy:
    """The anchored gated energy with the activation g, a word of the language such as ``cem.silu``."""
    c = cem.frozen(h)
    up = Sum(U[m, i] * h[i], i) + Sum(D[m, i] * (h[i] - c[i]), i) / tie
    return cem.Energy(-tie * Sum(g(Sum(G[m, i] * c[i], i)) * up**2, m) / 2, name=name)


anchored_gated = anchored_gated_by(cem.silu, "anchored_gated")
