"""Rotary interaction energy: queries and keys are turned by the positions of their tokens.

    E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta (R_t q_a) . (R_s k_as)),
               q_a = Q_a h,  k_as = K_a x_s
    -dE/dh   = sum_a Q_a^T R_t^T sum_{s in V} p_as R_s K_a x_s,
               p_a = softmax_s(beta q_a . R_{s - t} k_as)

Q, K: (heads, rank, dim), rank even; beta > 0, by default 1/sqrt(rank). R_t turns the pair of
coordinates n by the angle t w_n, w_n = base^(-2n/rank), so a score depends on positions by their
distance alone. The values are the keys, and the keys are *turned*: the layer turns the average
back by its own position. Usual rotary attention turns no values; here that would be another map
than the gradient.

``rotary_interaction_by`` chooses the base, the share of the coordinates that turn (partial
rotation, GPT-NeoX), how they are paired (``"half"`` as in Llama, ``"interleaved"`` as in RoFormer),
or the frequencies themselves.

Concave in h, as the interaction energy is: a rotation is linear. A step of any size descends.

>>> import cem
>>> from cem.energies import rotary_interaction, rotary_interaction_by
>>> cem.derive(rotary_interaction, dim=16, heads=2, rank=4).lowering.kernels
('matmul', 'sdpa')
>>> rotary_interaction.curvature
'concave'
>>> cem.derive(rotary_interaction_by(fraction=1 / 2), dim=16, heads=2, rank=3)
Traceback (most recent call last):
    ...
ValueError: `rope` turns pairs: got 3/2 of the 3 coordinates of `rank`; choose an even number of them

Source: Su et al., RoFormer, arXiv:2104.09864, equations 15 and 34, for queries and keys; the
interaction energy is that of Energy Transformer (Hoover et al., arXiv:2302.07253).
"""

from sympy import Sum

import cem

dim, heads, rank = cem.dims("dim heads rank")
h, x = cem.state(dim), cem.context(dim)
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
beta = cem.scalar("beta", default=rank**-0.5, positive=True)
i, a, r, s = dim.index("i"), heads.index("a"), rank.index("r"), x.index("s")


def rotary_interaction_by(
    base: float = 10000.0,
    *,
    fraction: float = 1,
    pairing: str = "half",
    frequencies: tuple[float, ...] | None = None,
    name: str = "rotary_interaction",
) -> cem.Energy:
    """The rotary interaction energy with the rotation of ``cem.rope`` with these options."""
    options = {"base": base, "fraction": fraction, "pairing": pairing, "frequencies": frequencies}
    q = cem.rope(Sum(Q[a, r, i] * h[i], i), r, h, **options)
    k = cem.rope(Sum(K[a, r, i] * x[s, i], i), r, s, **options)
    return cem.Energy(-Sum(cem.logsumexp(beta * Sum(q * k, r), s), a) / beta, name=name)


rotary_interaction = rotary_interaction_by()
