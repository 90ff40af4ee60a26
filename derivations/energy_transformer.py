"""Energy Transformer from its energy: all tokens move at once.

Legend: T tokens, D dim, H heads, R rank, M hidden.

1. The energy. The state of a sequence is h (T, D), read through a norm, g = norm(h). A token looks at
   the others, never at itself, and at M memories:

       E_t = -(1/beta) sum_a log sum_{s != t} exp(beta z_ats) - 1/2 sum_m relu(xi_m . g_t)^2,
       z_ats = q_at . k_as,    q_at = Q_a g_t,    k_as = K_a g_s.

   What descends is the energy of the sequence, sum_t E_t.

2. The adjoints. -sum_t E_t grows with a score by p_ats = softmax_{s != t}(beta z_ats). Now *both*
   sides of the score move. The query of t and the key of s receive

       sum_{s != t} p_ats k_as    and    sum_{t != s} p_ats q_at,

   averages of keys by the rows of p, and sums of queries by its columns, which need not sum to one. The
   overlap xi_m . g_t receives relu(xi_m . g_t).

3. The gradient. Q hands back what the query received and K what the key received, and the token u is a
   query once and a key of all others:

       -d/dg_u sum_t E_t = sum_a Q_a^T sum_{s != u} p_aus k_as       what it sees
                         + sum_a K_a^T sum_{t != u} p_atu q_at       what it is to others
                         + xi^T relu(xi g_u).

   The first and the last line are the conditional gradient dE_u/dg_u with the others held fixed;
   ``joint=True`` adds the second.

4. The layer. With step size alpha, repeated ``steps`` times with p computed afresh,

       h+ = h - alpha d/dg sum_t E_t.

   The gradient is taken with respect to g and subtracted from h, as in the paper. No two tokens have an
   order, so the layer is not causal: token u moves by what later ones ask of it.

5. Descent. A LayerNorm whose gain is one number is the gradient of a convex function: its Jacobian J is
   symmetric and positive semi-definite, and along the flow d/dt sum_t E_t = -grad^T J grad <= 0.
   The sum of the energies is not concave in all tokens together, so a step of a finite size has no
   promise; a small one descends.

A kernel of attention computes the first line, its transpose the second, without a tensor of all pairs.

Source: Hoover et al., arXiv:2302.07253, equations 1 and 4 to 8.
"""

import torch
from torch import Tensor

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import energy_transformer as energy

ALPHA = 0.1


def normed(h: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm without gain and shift."""
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def closed_form(
    h: Tensor, *, Q: Tensor, K: Tensor, xi: Tensor, beta: float | None = None, steps: int = 1
) -> Tensor:
    """``steps`` times h + ALPHA (what it sees + what it is to others + memory), for states (..., T, D)."""
    beta = Q.shape[-2] ** -0.5 if beta is None else beta
    itself = torch.eye(h.shape[-2], dtype=torch.bool)
    for _ in range(steps):
        g = normed(h)
        q = torch.einsum("ard,...td->...atr", Q, g)  # (..., H, T, R)
        k = torch.einsum("ard,...sd->...asr", K, g)
        score = beta * torch.einsum("...atr,...asr->...ats", q, k)
        p = score.masked_fill(itself, -torch.inf).softmax(-1)  # (..., H, T, T)
        sees = torch.einsum("...ats,...asr,ard->...td", p, k, Q)
        is_to_others = torch.einsum("...ats,...atr,ard->...sd", p, q, K)
        h = h + ALPHA * (sees + is_to_others + torch.relu(g @ xi.mT) @ xi)
    return h


def layer(*, steps: int = 1) -> cem.EnergyLayer:
    """The derived layer at small odd sizes, in float64."""
    return cem.derive(
        energy,
        joint=True,
        causal=False,
        norm=torch.nn.LayerNorm(13, elementwise_affine=False),
        steps=steps,
        update=cem.GradientDescent(ALPHA),
        dim=13,
        heads=3,
        rank=5,
        hidden=17,
        dtype=torch.float64,
    )


def derivation() -> cem.Derivation:
    """The same derivation as the toolkit finds it."""
    return layer().derivation


def check() -> None:
    """Raise ``AssertionError`` unless closed form and layer, gradient and SymPy agree, or a step rises."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 13, dtype=torch.float64, generator=generator)
    for steps in (1, 3):

        def by_hand(h, *, steps=steps, **parameters):
            return closed_form(h, steps=steps, **parameters)

        assert_layer_matches(layer(steps=steps), by_hand, h)
    one = layer()
    before, after = one.energy(h).sum(-1), one.energy(one(h)).sum(-1)
    assert (after < before).all(), "a step of Energy Transformer raised the energy of a sequence"
    assert_gradient_matches_sympy(energy, dim=3, seq=3, heads=2, rank=2, hidden=3)


if __name__ == "__main__":
    check()
    print(derivation())
