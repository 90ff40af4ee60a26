"""Loosely tied energies: rotary attention and a gated MLP whose ties are loosened one at a time.

Attention, with c = frozen(h), q_a(z) = R_t Q_a z, k_as = R_s K_a x_s:

    E(h | x) = -sum_a (1/beta_a) log sum_{s in V} exp(beta_a (q_a(c) . k_as + (R_t (w_a * W_a (h - c))) . R_s V_a x_s))
    -dE/dh   = sum_a W_a^T ( w_a * R_t^T sum_{s in V} p_as R_s V_a x_s )     at h = c,
               p_a = softmax_s(beta_a q_a(c) . k_as)

Q, K: (heads, rank, dim), rank even; beta > 0, by default 1/sqrt(rank). With W = Q, V = K, w = 1 and
beta_a = beta its step from c is that of ``rotary_interaction``. ``loosely_tied_interaction_by`` chooses:

* ``outputs="own"``: it writes with a matrix W (heads, rank, dim) of its own, otherwise W = Q;
* ``values="own"``: it averages with a matrix V (heads, rank, dim) of its own, otherwise V = K;
* ``shares="head"`` or ``"coordinate"``: w: (heads,) or (heads, rank), otherwise 1;
* ``temperatures=True``: beta_a = beta exp(log_beta_a) with log_beta: (heads,).

``loosely_tied_interaction`` has values of its own and writes with its queries, three matrices a head:
the tie that costs least in ``benchmarks/studies``. Concave in h, all of them, whatever the sign of w:
the scores are affine in h. A step of any size descends.

Gated MLP, ``loosely_tied_gated``: the gated energy with a share of either sign for every hidden unit,

    E(h)   = -1/2 sum_m w_m g(G_m . c) (U_m . h)^2
    -dE/dh = U^T ( w * g(G c) * U h )     at h = c

U, G: (hidden, dim); w: (hidden,). Start shares at 1 by ``init={"w": {"value": 1.0}}`` in a configuration.

>>> import cem
>>> from cem.energies import loosely_tied_interaction, loosely_tied_interaction_by
>>> cem.derive(loosely_tied_interaction, dim=16, heads=2, rank=4).lowering.kernels
('matmul', 'sdpa')
>>> loosely_tied_interaction.curvature
'concave'
>>> other = loosely_tied_interaction_by(outputs="own")  # Q, W, and K for keys and values
>>> print(cem.derive(other, dim=16, heads=2, rank=4).code.split("return ")[1])
torch.matmul(rotated_2, W.flatten(0, 1))

Source: none that we know of; the interaction energy is that of Energy Transformer (Hoover et al.,
arXiv:2302.07253), the rotation that of Su et al., arXiv:2104.09864.
"""

from sympy import Function, Sum, exp

import cem

dim, heads, rank, hidden = cem.dims("dim heads rank hidden")
h, x = cem.state(dim), cem.context(dim)
c = cem.frozen(h)
Q, K, W, V = (cem.parameter(name, heads, rank, dim) for name in "QKWV")
beta = cem.scalar("beta", default=rank**-0.5, positive=True)
i, a, r, m = dim.index("i"), heads.index("a"), rank.index("r"), hidden.index("m")
s = x.index("s")

OUTPUTS, VALUES = {"queries": Q, "own": W}, {"keys": K, "own": V}
SHARES = {
    None: 1,
    "head": cem.parameter("w", heads)[a],
    "coordinate": cem.parameter("w", heads, rank)[a, r],
}


def loosely_tied_interaction_by(
    *,
    outputs: str = "queries",
    values: str = "keys",
    shares: str | None = None,
    temperatures: bool = False,
    fraction: float = 1,
    name: str = "loosely_tied_interaction",
) -> cem.Energy:
    """The loosely tied interaction energy with these ties; ``fraction`` is that of ``cem.rope``.

    ``ValueError`` for a tie of another name.
    """
    chosen = []
    for option, given, table in (
        ("outputs", outputs, OUTPUTS),
        ("values", values, VALUES),
        ("shares", shares, SHARES),
    ):
        if given not in table:
            raise ValueError(
                f"`{option}` of `loosely_tied_interaction_by` is one of {list(table)}: got {given!r};"
                " leave it out for the first"
            )
        chosen.append(table[given])
    write, average, share = chosen

    def turned(projection, position):
        return cem.rope(Sum(projection, i), r, position, fraction=fraction)

    key = turned(K[a, r, i] * x[s, i], s)
    value = turned(average[a, r, i] * x[s, i], s)
    moved = turned(share * write[a, r, i] * (h[i] - c[i]), h)
    sharp = beta * exp(cem.parameter("log_beta", heads)[a]) if temperatures else beta
    score = Sum(turned(Q[a, r, i] * c[i], h) * key, r) + Sum(moved * value, r)
    return cem.Energy(-Sum(cem.logsumexp(sharp * score, s) / sharp, a), name=name)


loosely_tied_interaction = loosely_tied_interaction_by(values="own")


def loosely_tied_gated_by(g: type[Function], name: str | None = None) -> cem.Energy:
    """The loosely tied gated energy with the activation g, a word of the language such as ``cem.silu``."""
    gate = g(Sum(cem.parameter("G", hidden, dim)[m, i] * c[i], i))
    up = Sum(cem.parameter("U", hidden, dim)[m, i] * h[i], i)
    share = cem.parameter("w", hidden)[m]
    return cem.Energy(
        -Sum(share * gate * up**2, m) / 2, name=name or f"loosely_tied_gated_{g.__name__}"
    )


loosely_tied_gated = loosely_tied_gated_by(cem.silu, "loosely_tied_gated")
