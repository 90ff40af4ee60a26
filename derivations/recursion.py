"""A recursive layer: one energy descended N times, with what cannot change computed once.

Legend: T tokens, S context tokens, D dim, H heads, R rank, M hidden, N steps.

1. The energy. That of the parallel block, which has a part of every kind: the state h moves, the
   context x is held fixed, and the gates read c = frozen(h).

       E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta q_a . k_as) - 1/2 sum_m w_m u_m^2,
       q_a = Q_a h,    k_as = K_a x_s,    u = U h,    w = g(G c).

2. The adjoints. With p_a = softmax_s(beta q_a . k_as),

       -dE/dq_a = sum_{s in V} p_as k_as,    -dE/du_m = w_m u_m.

3. The gradient. Both return through the transpose of the matrix that reads the state:

       -dE/dh = sum_a Q_a^T sum_{s in V} p_as k_as + U^T ( w * u ).

4. The layer. N steps of size 1 with the same parameters:

       h_{n+1} = h_n + sum_a Q_a^T sum_{s in V} p_as(h_n) k_as + U^T ( w * U h_n ),    h_0 = h.

   The context of a layer is its input: x = h_0 in all N steps, for the tokens that other tokens see
   as for the token itself. So k = K x is computed once, and a decoder keeps one tensor a layer
   however many steps it takes. What depends on h_n is computed N times: q, p, u and the way back.

5. When the gates are read. With ``refresh="layer"`` c = h_0: w is computed once, and all N steps
   descend one and the same function of h. With ``refresh="step"`` c = h_n: the gates follow the
   state, w is computed N times, and step n descends a function of its own, E with c = h_n.

6. Descent. Where no gate is negative (relu in the place of silu) E is concave in h, so every step
   falls by at least |dE/dh|^2. With ``refresh="layer"`` the falls add up,

       E(h_N) <= E(h_0) - sum_n |h_{n+1} - h_n|^2;

   with ``refresh="step"`` each holds for its own gates, and E(h_N) with the last gates is not
   comparable with E(h_0) with the first. Moving the context between the steps, as a stack of N
   layers with tied parameters does, gives up both: the tokens that a token looks at have moved.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import gated_relu, interaction
from cem.energies import parallel_block as energy

STEPS = 3


def closed_form(
    h: Tensor,
    x: Tensor,
    *,
    Q: Tensor,
    K: Tensor,
    U: Tensor,
    G: Tensor,
    refresh: str = "layer",
    causal: bool = True,
) -> Tensor:
    """h_N of step 4, for states (..., T, D) and context (..., S, D), at beta = 1/sqrt(rank).

    A causal token t sees s <= t + S - T.
    """
    k = torch.einsum("ard,...sd->...asr", K, x)  # (..., H, S, R), once
    gate = F.silu(h @ G.mT)  # (..., T, M), once
    T, S = h.shape[-2], x.shape[-2]
    future = torch.ones(T, S, dtype=torch.bool, device=h.device).triu(S - T + 1) & causal
    for _ in range(STEPS):
        if refresh == "step":
            gate = F.silu(h @ G.mT)
        q = torch.einsum("ard,...td->...atr", Q, h)  # (..., H, T, R)
        score = Q.shape[-2] ** -0.5 * q @ k.mT  # (..., H, T, S)
        mean = score.masked_fill(future, -torch.inf).softmax(-1) @ k  # (..., H, T, R)
        h = h + torch.einsum("ard,...atr->...td", Q, mean) + (gate * (h @ U.mT)) @ U
    return h


def layer(*, refresh: str = "layer", causal: bool = True) -> cem.EnergyLayer:
    """The derived layer of N = 3 steps at small odd sizes, in float64."""
    sizes = {"dim": 13, "heads": 3, "rank": 5, "hidden": 7}
    options = {"refresh": refresh, "causal": causal, "dtype": torch.float64}
    return cem.derive(energy, steps=STEPS, **options, **sizes)


def derivation() -> cem.Derivation:
    """The same derivation as the toolkit finds it."""
    return layer().derivation


def assert_descent(h: Tensor) -> None:
    """The falls of a concave energy add up over the steps: step 6."""
    concave = interaction + gated_relu
    sizes = {"dim": h.shape[-1], "heads": 3, "rank": 5, "hidden": 7}
    made = [cem.derive(concave, steps=n, dtype=h.dtype, **sizes) for n in range(1, STEPS + 1)]
    states = [h]
    with torch.no_grad():
        for stepped in made:
            stepped.load_state_dict(made[0].state_dict())
            states.append(stepped(h))
        first, last = (made[0].energy(z, context=h, frozen=h) for z in (h, states[-1]))
        moves = zip(states, states[1:], strict=False)
        least = sum((after - before).square().sum(-1) for before, after in moves)
    assert (first - last >= least * (1 - 1e-12)).all(), "the steps fell by less than they promise"


def check() -> None:
    """Raise ``AssertionError`` unless closed form and layer, gradient and SymPy agree."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 13, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 9, 13, dtype=torch.float64, generator=generator)
    for refresh in ("layer", "step"):
        for causal in (True, False):
            options = {"refresh": refresh, "causal": causal}

            def by_hand(h, x=None, *, options=options, **parameters):
                return closed_form(h, h if x is None else x, **options, **parameters)

            assert_layer_matches(layer(**options), by_hand, h)
            assert_layer_matches(layer(**options), by_hand, h, context=x)
    assert_gradient_matches_sympy(energy, dim=2, seq=2, heads=2, rank=2, hidden=2)
    assert_descent(h)


if __name__ == "__main__":
    check()
    print(derivation())
