"""Attention with a diagonal: one call, from the diagonal plus low rank energy.

Legend: T tokens, S context tokens, D dim, H heads, R rank, B block, D = H B.

1. The energy. Head a compares the state with a context token through W_a = diag(lam_a) + Q_a^T
   K_a, whose diagonal lies in the slice of coordinates that the head owns: h_ab is coordinate a B
   + b of h.

       E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta z_as),
       z_as = sum_b lam_ab h_ab x_sab + sum_r q_ar k_asr,    q_a = Q_a h,    k_as = K_a x_s.

2. The adjoints. With p_a = softmax_s(beta z_as), -dE/dz_as = p_as. A score is reached by h in two
   ways:

       through q:         -dE/dq_ar = sum_{s in V} p_as k_asr,
       through the slice: lam_ab sum_{s in V} p_as x_sab    for coordinate b of slice a.

3. The gradient. The first returns through Q_a^T. The second lies in the slice already; slices of
   different heads do not overlap, so they stand side by side and nothing is summed over heads:

       -dE/dh_d = sum_a sum_r Q_ard sum_s p_as k_asr  +  lam_ab sum_s p_as x_sab,    d = a B + b.

4. One attention call. Both averages have the same weights. With the features

       query_a = [ lam_a * h_a ; q_a ],    key_as = value_as = [ x_sa ; k_as ]    of width B + R,

   query . key = z, and the average of the values under p_a is [ m_a ; n_a ], both averages at once.

5. The layer. One step of size 1:

       h+ = h + [ lam_a * m_a ]_a + sum_a Q_a^T n_a.

   The diagonal adds H B = D numbers to the 2 H R D of attention. At lam = 0 it is weight-tied
   attention.

6. Descent. W_a does not depend on h, the scores are linear in h, E is concave: E(h+) <= E(h) -
   |dE/dh|^2.
"""

import torch
from torch import Tensor

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import diagonal_plus_low_rank as energy
from cem.energies import diagonal_plus_low_rank_full


def closed_form(
    h: Tensor,
    x: Tensor,
    *,
    Q: Tensor,
    K: Tensor,
    lam: Tensor,
    beta: float | None = None,
    causal: bool = True,
) -> Tensor:
    """h + [lam_a * m_a]_a + sum_a Q_a^T n_a, for states (..., T, D) and context (..., S, D).

    A causal token t sees s <= t + S - T. ``beta`` is 1/sqrt(rank) if None.
    """
    beta = Q.shape[-2] ** -0.5 if beta is None else beta
    block = lam.shape[-1]
    own_h = h.unflatten(-1, lam.shape).transpose(-3, -2)  # (..., H, T, B)
    own_x = x.unflatten(-1, lam.shape).transpose(-3, -2)  # (..., H, S, B)
    q = torch.einsum("ard,...td->...atr", Q, h)  # (..., H, T, R)
    k = torch.einsum("ard,...sd->...asr", K, x)  # (..., H, S, R)
    query = torch.cat([lam.unsqueeze(-2) * own_h, q], dim=-1)  # (..., H, T, B + R)
    key = torch.cat([own_x, k], dim=-1)  # (..., H, S, B + R)
    score = beta * query @ key.mT  # (..., H, T, S)
    if causal:
        T, S = score.shape[-2:]
        past = torch.ones(T, S, dtype=torch.bool, device=h.device).tril(S - T)
        score = score.masked_fill(~past, -torch.inf)
    mean = score.softmax(-1) @ key  # (..., H, T, B + R)
    own = lam.unsqueeze(-2) * mean[..., :block]  # (..., H, T, B)
    shared = torch.einsum("ard,...atr->...td", Q, mean[..., block:])
    return h + own.transpose(-3, -2).flatten(-2) + shared


def layer(*, causal: bool = True) -> cem.EnergyLayer:
    """The derived layer at small odd sizes, in float64, with a diagonal that is not zero."""
    made = cem.derive(energy, dim=15, heads=3, rank=7, causal=causal, dtype=torch.float64)
    with torch.no_grad():
        made.lam.copy_(torch.linspace(-0.7, 0.9, made.lam.numel()).view_as(made.lam))
    return made


def derivation() -> cem.Derivation:
    """The same derivation as the toolkit finds it."""
    return layer().derivation


def check() -> None:
    """Raise ``AssertionError`` unless closed form and layer, gradient and SymPy agree."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 15, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 9, 15, dtype=torch.float64, generator=generator)
    for causal in (True, False):

        def by_hand(h, x=None, *, causal=causal, **parameters):
            return closed_form(h, h if x is None else x, causal=causal, **parameters)

        assert_layer_matches(layer(causal=causal), by_hand, h)
        assert_layer_matches(layer(causal=causal), by_hand, h, context=x)
    assert_gradient_matches_sympy(energy, heads=2, block=2, seq=3, rank=1)
    assert_gradient_matches_sympy(diagonal_plus_low_rank_full, heads=2, dim=3, seq=3, rank=1)


if __name__ == "__main__":
    check()
    print(derivation())
