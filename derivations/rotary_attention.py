"""Attention with rotary positions from the rotary interaction energy.

Legend: T tokens, S context tokens, D dim, H heads, R rank.

1. The energy. The token at position t turns its query by R_t, a context token at position s its key
   by R_s. R_t turns the pair of coordinates (n, n + R/2) by the angle t w_n, w_n = base^(-2n/R):

       E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta z_as),
       z_as = (R_t q_a) . (R_s k_as),    q_a = Q_a h,    k_as = K_a x_s.

   Rotations compose, R_t^T R_s = R_{s - t}, so z_as = q_a . R_{s - t} k_as knows of positions their
   distance alone.

2. The adjoints. -E grows with a score by its weight in the log-sum-exp, and the score is a product of
   the turned query and the turned key:

       -dE/dz_as = p_as,    -dE/d(R_t q_a) = sum_{s in V} p_as R_s k_as.

   The token receives an average of *turned* keys.

3. The gradient. A rotation is linear, so the adjoint passes it by its transpose, which is the
   rotation back, and then the transpose of Q:

       -dE/dh = sum_a Q_a^T R_t^T sum_{s in V} p_as R_s K_a x_s.

4. The layer. One step of size 1:

       h+ = h + sum_a Q_a^T m_a,    m_a = sum_{s in V} p_as R_{s - t} k_as.

   Queries and keys are those of RoFormer. The values are new: RoFormer averages values that nobody
   turned, where the gradient averages the turned keys and turns the average back, so that what comes
   from s arrives turned by the distance s - t. Both rotations belong to the gradient: without one of
   them the layer descends no energy of this form.

5. Descent. The scores are linear in h, so E is concave and a step of any size lowers it while the
   context stays. Shifting all positions by a constant changes neither E nor the layer.

In a program the rotation back costs one more pass over (H, T, R); key and value are one tensor, and
the cache of a decoder holds keys that are turned already.
"""

import torch
from torch import Tensor

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import rotary_interaction as energy

BASE = 10000.0


def rotation(distance: Tensor, rank: int) -> Tensor:
    """The matrices R_distance, (*distance.shape, R, R), written out entry by entry."""
    half = rank // 2
    angle = distance[..., None] * BASE ** (-torch.arange(half, dtype=distance.dtype) / half)
    cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
    return torch.cat((torch.cat((cos, -sin), -1), torch.cat((sin, cos), -1)), -2)


def closed_form(
    h: Tensor, x: Tensor, *, Q: Tensor, K: Tensor, beta: float | None = None, causal: bool = True
) -> Tensor:
    """h + sum_a Q_a^T sum_s p_as R_{s - t} K_a x_s, for states (..., T, D) and context (..., S, D).

    A causal token t stands at t + S - T and sees s <= t + S - T; another one stands at t. ``beta`` is
    1/sqrt(rank) if None.
    """
    T, S, R = h.shape[-2], x.shape[-2], Q.shape[-2]
    beta = R**-0.5 if beta is None else beta
    q = torch.einsum("ard,...td->...atr", Q, h)  # (..., H, T, R)
    k = torch.einsum("ard,...sd->...asr", K, x)  # (..., H, S, R)
    where = torch.arange(T, dtype=h.dtype) + (S - T if causal else 0)
    distance = torch.arange(S, dtype=h.dtype) - where[:, None]
    turned = torch.einsum("tsrq,...asq->...atsr", rotation(distance, R), k)  # (..., H, T, S, R)
    score = beta * torch.einsum("...atr,...atsr->...ats", q, turned)
    if causal:
        score = score.masked_fill(distance > 0, -torch.inf)
    mean = torch.einsum("...ats,...atsr->...atr", score.softmax(-1), turned)
    return h + torch.einsum("ard,...atr->...td", Q, mean)


def layer(*, causal: bool = True) -> cem.EnergyLayer:
    """The derived layer at small sizes, in float64."""
    return cem.derive(energy, dim=13, heads=3, rank=6, causal=causal, dtype=torch.float64)


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
    assert_gradient_matches_sympy(energy, dim=3, seq=3, heads=2, rank=4)


if __name__ == "__main__":
    check()
    print(derivation())
