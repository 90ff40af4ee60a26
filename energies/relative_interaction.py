"""Interaction energy with a learned bias by distance.

    E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta q_a . k_as + bias_a[n(t - s)]),
               q_a = Q_a h,  k_as = K_a x_s
    -dE/dh   = sum_a Q_a^T sum_{s in V} p_as K_a x_s,
               p_a = softmax_s(beta q_a . k_as + bias_a[n(t - s)])

Q, K: (heads, rank, dim); bias: (heads, buckets); beta > 0, by default 1/sqrt(rank); t and s are the
positions of the token and of what it sees. n is the bucket of a distance: the first half of the
buckets hold the distances 0, 1, 2, ..., the others grow by equal factors up to ``furthest``, beyond
which all is one. What lies ahead has the bucket of the token itself.

``relative_interaction_by(buckets, furthest)`` makes the energy; the size of the last axis of the
bias is that number, so give it to ``derive`` too. ``relative_interaction`` has 32 buckets up to
128, as T5 has.

The bias is a table of all pairs of tokens, (heads, T, T) in memory, which the kernel of attention
adds to its scores.

Concave in h, as the interaction energy is: the bias does not depend on h. Any step size descends.

>>> import cem
>>> from cem.energies import relative_interaction
>>> layer = cem.derive(relative_interaction, dim=16, heads=2, rank=4, buckets=32)
>>> layer.lowering.kernels
('matmul', 'sdpa')
>>> relative_interaction.curvature
'concave'

Source: Raffel et al., Exploring the Limits of Transfer Learning, arXiv:1910.10683, section 2.1 (T5,
the decoder), which shares one table among all layers and leaves beta out.
"""

from sympy import Sum

import cem

dim, heads, rank, buckets = cem.dims("dim heads rank buckets")
h, x = cem.state(dim), cem.context(dim)
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
bias = cem.parameter("bias", heads, buckets)
beta = cem.scalar("beta", default=rank**-0.5, positive=True)
i, a, r, n, s = (
    size.index(name) for size, name in zip((dim, heads, rank, buckets, x), "iarns", strict=True)
)


def relative_interaction_by(
    count: int = 32, furthest: int = 128, name: str | None = None
) -> cem.Energy:
    """The interaction energy with a bias for each of ``count`` buckets of distances."""
    bucket = cem.t5_bucket(cem.position(h) - cem.position(s), buckets=count, furthest=furthest)
    score = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, i] * x[s, i], i), r)
    score = beta * score + cem.lookup(bias[a, n], n, bucket)
    energy = -Sum(cem.logsumexp(score, s), a) / beta
    return cem.Energy(energy, name=name or f"relative_interaction_{count}_{furthest}")


relative_interaction = relative_interaction_by(name="relative_interaction")
