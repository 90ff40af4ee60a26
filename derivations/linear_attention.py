"""Gated linear attention from a quadratic energy of the context, and the state that a decoder keeps.

Legend: T tokens, D dim, H heads, R rank.

1. The energy. With queries q_a = Q_a h, keys k_as = K_a x_s and gates g_as = sigmoid(G_a x_s + bias_a),

       E(h | x) = -1/2 sum_a sum_{s in V} d_as (q_a . k_as)^2,    d_as = prod_{u in V, u > s} g_au.

   What is left of the token s is the product of the gates of those that came after it; the last
   visible token counts whole.

2. The adjoints. The gates and the keys belong to the context, so only the query moves:

       -dE/dq_a = sum_{s in V} d_as (q_a . k_as) k_as.

   There is no softmax: the weight of a token is its score.

3. The gradient. The query hands its force on through the transpose of Q:

       -dE/dh = sum_a Q_a^T sum_{s in V} d_as (q_a . k_as) k_as.

4. The layer. One step of size 1 adds the force: h+ = h - dE/dh. The query does not depend on s, and
   comes out of the sum:

       sum_s d_as (q_a . k_as) k_as = M_a q_a,    M_a = sum_{s in V} d_as k_as k_as^T.

   For causal tokens M_a(t) is a recurrence, since the step from t - 1 to t multiplies every d_as by
   g_at and adds the token t:

       M_a(t) = g_at M_a(t - 1) + k_at k_at^T.

   It has R x R numbers a head, whatever T is: that is the cache. Over a whole sequence the same sums
   go chunk by chunk, pairs within a chunk and states between chunks, in time and memory of order T.

5. Descent. M_a is positive semi-definite and E = -1/2 sum_a q_a . M_a q_a, so E is concave, and

       E(h - eta dE/dh) <= E(h) - eta |dE/dh|^2    for every eta >= 0.
"""

import torch
from torch import Tensor

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import gated_linear_attention as energy


def closed_form(h: Tensor, *, Q: Tensor, K: Tensor, G: Tensor, bias: Tensor) -> Tensor:
    """h + sum_a Q_a^T M_a(t) q_a by the recurrence of step 4, for states (..., T, D)."""
    q = torch.einsum("ard,...td->...tar", Q, h)
    k = torch.einsum("ard,...td->...tar", K, h)
    gate = torch.sigmoid(h @ G.mT + bias)  # (..., T, H)
    M, force = torch.zeros_like(k[..., 0, :, :, None] * k[..., 0, :, None, :]), []
    for t in range(h.shape[-2]):
        kt = k[..., t, :, :]
        M = gate[..., t, :, None, None] * M + kt.unsqueeze(-1) * kt.unsqueeze(-2)
        force.append(torch.einsum("...arq,...aq,ard->...d", M, q[..., t, :, :], Q))
    return h + torch.stack(force, -2)


def layer() -> cem.EnergyLayer:
    """The derived layer at small odd sizes, in float64."""
    return cem.derive(energy, dim=13, heads=3, rank=5, dtype=torch.float64)


def derivation() -> cem.Derivation:
    """The same derivation as the toolkit finds it."""
    return layer().derivation


def check() -> None:
    """Raise ``AssertionError`` unless closed form and layer, cache and recurrence, gradient and SymPy agree."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 13, dtype=torch.float64, generator=generator)
    assert_layer_matches(layer(), closed_form, h)
    derived = layer()
    cache = derived.init_cache(2, 7)
    parts = [derived(h[:, t : t + 1], cache=cache) for t in range(7)]
    torch.testing.assert_close(torch.cat(parts, 1), derived(h), rtol=0, atol=1e-12)
    assert cache.nbytes == 2 * 3 * 5 * 5 * 8
    assert_gradient_matches_sympy(energy, dim=3, heads=2, rank=2, seq=3)


if __name__ == "__main__":
    check()
    print(derivation())
