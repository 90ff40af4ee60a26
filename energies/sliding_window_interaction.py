"""Interaction energy in a sliding window: a token sees what is near, and perhaps the first tokens.

    E(h | x) = -(1/beta) sum_a log sum_{s in W} exp(beta q_a . k_as),    q_a = Q_a h,  k_as = K_a x_s
    -dE/dh   = sum_a Q_a^T sum_{s in W} p_as K_a x_s,    p_a = softmax_s(beta q_a . k_as)
    W        = those s of V with t - s < window or s < sinks

Q, K: (heads, rank, dim); beta > 0, by default 1/sqrt(rank); t and s are the positions of the token
and of what it sees. A causal token sees itself and window - 1 tokens before it; the window has one
side, so a layer that is not causal sees the whole future. Without sinks a token of layer n is
reached from n (window - 1) tokens back. Sinks keep the first tokens of a text in sight of all.

``sliding_window_interaction_by(window, sinks)`` makes the energy; ``sliding_window_interaction`` is
that of a window of 128 without sinks.

Concave in h, as the interaction energy is: which tokens a token sees does not depend on h. So a
step of any size descends. What it does not see has no weight at all: its gradient is exactly zero.

>>> import cem
>>> from cem.energies import sliding_window_interaction, sliding_window_interaction_by
>>> cem.derive(sliding_window_interaction, dim=16, heads=2, rank=4).lowering.kernels
('matmul', 'sdpa')
>>> sliding_window_interaction.curvature
'concave'
>>> sliding_window_interaction_by(1024, sinks=4).name
'sliding_window_interaction_1024_4'
>>> sliding_window_interaction_by(0)
Traceback (most recent call last):
    ...
ValueError: `sliding_window_interaction_by` takes a window of 1 token or more and no negative ...

Source: windows as in Longformer (Beltagy et al., arXiv:2004.05150, section 3.1), sinks as in
StreamingLLM (Xiao et al., arXiv:2309.17453, section 3.2), which gives tokens positions in the cache
where we leave them their own.
"""

from sympy import Sum

import cem

dim, heads, rank = cem.dims("dim heads rank")
h, x = cem.state(dim), cem.context(dim)
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
beta = cem.scalar("beta", default=rank**-0.5, positive=True)
i, a, r, s = dim.index("i"), heads.index("a"), rank.index("r"), x.index("s")


def sliding_window_interaction_by(
    window: int, sinks: int = 0, name: str | None = None
) -> cem.Energy:
    """The interaction energy of the last ``window`` tokens and the first ``sinks`` ones.

    ``ValueError`` for a window below 1 or a negative number of sinks.
    """
    if window < 1 or sinks < 0:
        raise ValueError(
            "`sliding_window_interaction_by` takes a window of 1 token or more and no negative number"
            f" of sinks: got {window} and {sinks}; type `sliding_window_interaction_by(128, sinks=4)`"
        )
    near = cem.position(h) - cem.position(s) < window
    seen = near | (cem.position(s) < sinks) if sinks else near
    score = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, i] * x[s, i], i), r)
    energy = -Sum(cem.logsumexp(beta * score + cem.only(seen), s), a) / beta
    suffix = f"_{sinks}" if sinks else ""
    return cem.Energy(energy, name=name or f"sliding_window_interaction_{window}{suffix}")


sliding_window_interaction = sliding_window_interaction_by(128, name="sliding_window_interaction")
