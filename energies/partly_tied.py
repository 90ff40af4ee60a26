"""Partly tied energies: attention and a gated MLP as in Llama, plus a learned share of the tied force.

Attention, with c = frozen(h), q_a(z) = R_t Q_a z, k_as = R_s K_a x_s, v_as = V_a x_s:

    E(h | x) = -(1/beta) sum_a [ log sum_{s in V} exp(beta (q_a(c) . k_as + W_a (h - c) . v_as))
                                 + w_a log sum_{s in V} exp(beta q_a(h) . k_as) ]
    -dE/dh   = sum_a W_a^T sum_s p_as v_as + sum_a w_a Q_a^T R_t^T sum_s p_as k_as     at h = c,
               p_a = softmax_s(beta q_a(c) . k_as)

Q, K: (heads, rank, dim), rank even; W, V: (heads, copies, dim); w: (heads,); beta > 0, by default
1/sqrt(rank). The first term alone is ``untied_interaction``: its step from c is rotary attention with
four matrices. So *untied attention is a gradient step as well*, on an energy that holds its query
fixed, and a concave one: minus the log-sum-exp of affine scores. The second is the interaction
energy, weighed head by head; a negative weight moves the state away from what it looks at. In one
step from c both terms share one attention call, and a cache holds [k ; v], one tensor.

Gated MLP, ``partly_tied_gated``:

    E(h)   = -sum_m g(G_m . c) [ (U_m . c) (D_m . h) + w_m/2 (U_m . h)^2 ]
    -dE/dh = (D + w * U)^T ( g(G c) * U c )     at h = c

U, G, D: (hidden, dim); w: (hidden,): the down projection is D plus a share of the up projection.

At w = 0 the two are Llama's layers; start them there with ``init={"w": 0.0}`` in a configuration.

>>> import cem
>>> from cem.energies import partly_tied_gated, partly_tied_interaction, untied_interaction
>>> layer = cem.derive(untied_interaction, dim=16, heads=2, rank=4, copies=4)
>>> print(layer.code.split("return ")[1])
torch.matmul(attended, W.flatten(0, 1))
>>> untied_interaction.curvature
'concave'
>>> cem.derive(partly_tied_interaction, dim=16, heads=2, rank=4, copies=4).lowering.kernels
('matmul', 'sdpa')

Source: none that we know of for the sums; the interaction energy is that of Energy Transformer (Hoover
et al., arXiv:2302.07253), rotary attention that of Su et al., arXiv:2104.09864, the gated MLP that of
Shazeer, arXiv:2002.05202.
"""

from sympy import Function, Sum

import cem

dim, heads, rank, copies, hidden = cem.dims("dim heads rank copies hidden")
h, x = cem.state(dim), cem.context(dim)
c = cem.frozen(h)
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
W, V = cem.parameter("W", heads, copies, dim), cem.parameter("V", heads, copies, dim)
beta = cem.scalar("beta", default=rank**-0.5, positive=True)
i, a, r, n, s = dim.index("i"), heads.index("a"), rank.index("r"), copies.index("n"), x.index("s")


def score(state):
    """The scores of the state or of its frozen value with the keys."""
    q = cem.rope(Sum(Q[a, r, i] * state[i], i), r, h)
    k = cem.rope(Sum(K[a, r, i] * x[s, i], i), r, s)
    return Sum(q * k, r)


moved = Sum(W[a, n, i] * (h[i] - c[i]), i)
value = Sum(V[a, n, i] * x[s, i], i)
untied_interaction = cem.Energy(
    -Sum(cem.logsumexp(beta * (score(c) + Sum(moved * value, n)), s), a) / beta,
    name="untied_interaction",
)
"""Rotary attention with four matrices, as a gradient step."""

share = cem.parameter("w", heads)
tied = -Sum(share[a] * cem.logsumexp(beta * score(h), s), a) / beta
partly_tied_interaction = cem.Energy(
    untied_interaction.expression + tied, name="partly_tied_interaction"
)


def partly_tied_gated_by(g: type[Function], name: str) -> cem.Energy:
    """The partly tied gated energy with the activation g, a word of the language such as ``cem.silu``."""
    U, G = cem.parameter("U", hidden, dim), cem.parameter("G", hidden, dim)
    D, w = cem.parameter("D", hidden, dim), cem.parameter("w", hidden)
    m = hidden.index("m")

    def through(matrix, state):
        return Sum(matrix[m, i] * state[i], i)

    force = through(U, c) * through(D, h) + w[m] * through(U, h) ** 2 / 2
    return cem.Energy(-Sum(g(through(G, c)) * force, m), name=name)


partly_tied_gated = partly_tied_gated_by(cem.silu, "partly_tied_gated")
