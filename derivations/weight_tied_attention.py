"""Weight-tied attention from the interaction energy.

Legend: T tokens, S context tokens, D dim, H heads, R rank.

1. The energy. A token with state h sees the tokens x_s, s in V. Each head a compares them by one
   number,

       E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta z_as),    z_as = sum_r q_ar k_asr,
       q_ar = sum_i Q_ari h_i,    k_asr = sum_j K_arj x_sj.

2. The adjoints. -E grows with a score by the weight that the score has in its log-sum-exp,

       -dE/dz_as = p_as = exp(beta z_as) / sum_{u in V} exp(beta z_au);

   beta in front and beta inside cancel. The score is a product of q and k and only q moves, so

       -dE/dq_ar = sum_{s in V} p_as k_asr:

   what the query receives is an average of *keys*. No value matrix appears, the keys are the
   values.

3. The gradient. h reaches q through Q, so the adjoint of q returns through the transpose of Q:

       -dE/dh_d = sum_a sum_r Q_ard sum_{s in V} p_as k_asr.

4. The layer. One step of size 1, with m_a = sum_s p_as K_a x_s of shape (rank,) for each head:

       h+ = h + sum_a Q_a^T m_a.

   This is multi-head attention with a residual connection, values tied to keys and the output
   projection tied to the queries: 2 matrices of shape (heads, rank, dim) where attention has 4.

5. Descent. E is concave in h, so it lies below its tangent at h and E(h+) <= E(h) - |dE/dh|^2:
   the step lowers the energy of every token, as long as the tokens it looks at do not move.

The average of keys under a softmax is `scaled_dot_product_attention` with one tensor as key and
as value; the cache of a decoder holds K x and nothing else.
"""

import torch
from torch import Tensor

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import interaction as energy


def closed_form(
    h: Tensor, x: Tensor, *, Q: Tensor, K: Tensor, beta: float | None = None, causal: bool = True
) -> Tensor:
    """h + sum_a Q_a^T sum_s p_as K_a x_s, for states (..., T, D) and context (..., S, D).

    A causal token t sees s <= t + S - T. ``beta`` is 1/sqrt(rank) if None.
    """
    beta = Q.shape[-2] ** -0.5 if beta is None else beta
    q = torch.einsum("ard,...td->...atr", Q, h)  # (..., H, T, R)
    k = torch.einsum("ard,...sd->...asr", K, x)  # (..., H, S, R)
    score = beta * torch.einsum("...atr,...asr->...ats", q, k)  # (..., H, T, S)
    if causal:
        T, S = score.shape[-2:]
        past = torch.ones(T, S, dtype=torch.bool, device=h.device).tril(S - T)
        score = score.masked_fill(~past, -torch.inf)
    mean = torch.einsum("...ats,...asr->...atr", score.softmax(-1), k)  # (..., H, T, R)
    return h + torch.einsum("ard,...atr->...td", Q, mean)


def layer(*, causal: bool = True) -> cem.EnergyLayer:
    """The derived layer at small odd sizes, in float64."""
    return cem.derive(energy, dim=13, heads=3, rank=5, causal=causal, dtype=torch.float64)


def derivation() -> cem.Derivation:
    """The same derivation as the toolkit finds it."""
    return layer().derivation


def check() -> None:
    """Raise ``AssertionError`` unless closed form and layer, gradient and SymPy agree."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 13, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 9, 13, dtype=torch.float64, generator=generator)
    for causal in (True, False):

        def by_hand(h, x=None, *, causal=causal, **parameters):
            return closed_form(h, h if x is None else x, causal=causal, **parameters)

        assert_layer_matches(layer(causal=causal), by_hand, h)
        assert_layer_matches(layer(causal=causal), by_hand, h, context=x)
    assert_gradient_matches_sympy(energy, dim=3, seq=3, heads=2, rank=2)


if __name__ == "__main__":
    check()
    print(derivation())
