"""A softmax mixture of experts, its router derived, from the mixture-of-experts energy.

Legend: T tokens, D dim, E experts, M hidden.

1. The energy. Expert e has the gated energy -v_e, whose gates read the state as it was at the input
   of the layer, c = frozen(h). The mixture is their soft minimum:

       E(h) = -(1/beta) log sum_e exp(beta v_e),    v_e = 1/2 sum_m w_em u_em^2,
       u_em = sum_i U_emi h_i,    w_em = g(sum_i G_emi c_i).

2. The adjoints. -E grows with the value of an expert by its weight in the log-sum-exp,

       -dE/dv_e = p_e = exp(beta v_e) / sum_f exp(beta v_f);

   beta in front and beta inside cancel. This is the router, and no parameter is its own: an expert
   is chosen by how low its energy is. The value passes the weight on to what it is made of:

       -dE/du_em = p_e w_em u_em.

3. The gradient. h reaches u through U, so the adjoint of u returns through the transpose of U:

       -dE/dh_d = sum_e p_e sum_m U_emd w_em u_em.

4. The layer. One step of size 1, at whose start c = h:

       h+ = h + sum_e p_e U_e^T ( g(G_e h) * U_e h ).

   These are E gated MLPs, up and down projection shared, mixed by a softmax: 2 matrices of shape
   (experts, hidden, dim) where a mixture of gated MLPs has 3 and a router. Every expert is computed
   for every token; p is never exactly 0.

5. Descent. Where no gate is negative every v_e is convex in h, so is their log-sum-exp, E is
   concave and E(h+) <= E(h) - |dE/dh|^2 with the gates of before. silu has negative gates: there a
   small step descends, and a large one need not. As beta grows, E becomes the lowest energy of all
   experts and p the choice of one; as beta falls to 0, the force becomes the mean of all.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import mixture_of_experts as energy


def closed_form(h: Tensor, *, U: Tensor, G: Tensor, beta: float | None = None) -> Tensor:
    """h + sum_e p_e U_e^T ( silu(G_e h) * U_e h ), for states (..., T, D).

    ``beta`` is 1/sqrt(hidden) if None.
    """
    beta = U.shape[-2] ** -0.5 if beta is None else beta
    up = torch.einsum("emd,...td->...tem", U, h)  # (..., T, E, M)
    force = F.silu(torch.einsum("emd,...td->...tem", G, h)) * up
    weights = (beta * (force * up).sum(-1) / 2).softmax(-1)  # (..., T, E)
    return h + torch.einsum("...te,...tem,emd->...td", weights, force, U)


def layer() -> cem.EnergyLayer:
    """The derived layer at small odd sizes, in float64."""
    return cem.derive(energy, dim=13, experts=3, hidden=7, dtype=torch.float64)


def derivation() -> cem.Derivation:
    """The same derivation as the toolkit finds it."""
    return layer().derivation


def check() -> None:
    """Raise ``AssertionError`` unless closed form and layer, gradient and SymPy agree."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 13, dtype=torch.float64, generator=generator)
    assert_layer_matches(layer(), closed_form, h)
    assert_gradient_matches_sympy(energy, dim=3, experts=2, hidden=2)


if __name__ == "__main__":
    check()
    print(derivation())
