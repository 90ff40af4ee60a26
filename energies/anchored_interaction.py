"""Anchored interaction energy: values of their own, whose score vanishes where the state stands.

    E(h | x) = -(tie/beta) sum_a log sum_{s in V} exp(beta (q_a . k_as + W_a (h - c) . v_as / tie)),
               q_a = R_t Q_a h,  k_as = R_s K_a x_s,  v_as = V_a x_s,  c = frozen(h)
    -dE/dh   = sum_a W_a^T sum_s p_as v_as + tie sum_a Q_a^T R_t^T sum_s p_as k_as     at h = c,
               p_a = softmax_s(beta q_a . k_as)

Q, K: (heads, rank, dim), rank even; W, V: (heads, copies, dim); beta > 0, by default 1/sqrt(rank);
tie > 0, by default 0.1. At h = c the values take no part in the scores: who is looked at and what is
brought back are learned apart, as in usual attention, and ``tie`` says how much of the tied force
there is beside it. In one step from c the program has no term in W (h - c), and a cache holds
[k ; v], one tensor. In later steps the values score as well.

``untied_interaction`` is the limit tie -> 0 with the query frozen too, q_a = R_t Q_a c:

    E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta (q_a . k_as + W_a (h - c) . v_as)),
    -dE/dh   = sum_a W_a^T sum_s p_as V_a x_s     at h = c,

rotary attention with four matrices, as in Llama: *untied attention is a gradient step as well*, on
an energy that holds its query fixed. What a tie adds is that the query moves with the state.

Both are concave in h, as minus the log-sum-exp of affine scores: a step of any size descends.

>>> import cem
>>> from cem.energies import anchored_interaction, untied_interaction
>>> layer = cem.derive(untied_interaction, dim=16, heads=2, rank=4, copies=4)
>>> print(layer.code.split("return ")[1])
torch.matmul(attended, W.flatten(0, 1))
>>> layer.lowering.kernels, anchored_interaction.curvature
(('matmul', 'sdpa'), 'concave')

Source: none that we know of for the anchor; the interaction energy is that of Energy Transformer
(Hoover et al., arXiv:2302.07253), rotary attention that of Su et al., arXiv:2104.09864.
"""

from sympy import Sum

import cem

dim, heads, rank, copies = cem.dims("dim heads rank copies")
h, x = cem.state(dim), cem.context(dim)
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
W, V = cem.parameter("W", heads, copies, dim), cem.parameter("V", heads, copies, dim)
beta = cem.scalar("beta", default=rank**-0.5, positive=True)
tie = cem.scalar("tie", default=0.1, positive=True)
i, a, r, c, s = dim.index("i"), heads.index("a"), rank.index("r"), copies.index("c"), x.index("s")


def anchored_by(query, tie, name: str) -> cem.Energy:
    """The anchored interaction energy whose query reads ``query``, the state or its frozen value."""
    q = cem.rope(Sum(Q[a, r, i] * query[i], i), r, h)
    k = cem.rope(Sum(K[a, r, i] * x[s, i], i), r, s)
    moved = Sum(W[a, c, i] * (h[i] - cem.frozen(h)[i]), i)
    value = Sum(V[a, c, i] * x[s, i], i)
    score = Sum(q * k, r) + Sum(moved * value, c) / tie
    return cem.Energy(-tie * Sum(cem.logsumexp(beta * score, s), a) / beta, name=name)


anchored_interaction = anchored_by(h, tie, "anchored_interaction")
untied_interaction = anchored_by(cem.frozen(h), 1, "untied_interaction")
"""Rotary attention with four matrices, as a gradient step."""
