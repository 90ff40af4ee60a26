"""A gated MLP, up and down projection shared, from the gated energy.

Legend: T tokens, D dim, M hidden.

1. The energy. Every hidden unit m reads the state twice: through U_m, and through G_m as a gate.
   The gate reads the state as it was at the input of the layer, c = frozen(h), and is a constant
   of dE/dh:

       E(h) = -1/2 sum_m w_m u_m^2,    u_m = sum_i U_mi h_i,    w_m = g(sum_i G_mi c_i).

2. The adjoints. Only u moves:

       -dE/du_m = w_m u_m.

3. The gradient. h reaches u through U, so the adjoint of u returns through the transpose of U:

       -dE/dh_d = sum_m U_md w_m u_m.

4. The layer. One step of size 1, at whose start c = h:

       h+ = h + U^T ( g(G h) * U h ).

   This is a gated MLP with a residual connection (SwiGLU where g is silu), its down projection
   tied to its up projection: 2 matrices of shape (hidden, dim) where a gated MLP has 3.

5. Descent. The Hessian is -U^T diag(w) U. Where no gate is negative E is concave, it lies below
   its tangent and E(h+) <= E(h) - |dE/dh|^2 with the gates of before. silu has negative gates:
   there a small step descends, and a large one need not.

Had the gate not been frozen, its derivative would add G^T ( g'(Gh) * (Uh)^2 ) / 2, which no MLP
has. Training gradients do flow through the frozen state: it is frozen for dE/dh only.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import gated as energy


def closed_form(h: Tensor, *, U: Tensor, G: Tensor) -> Tensor:
    """h + U^T ( silu(G h) * U h ), for states (..., T, D)."""
    hidden = F.silu(h @ G.mT) * (h @ U.mT)  # (..., T, M)
    return h + hidden @ U


def layer() -> cem.EnergyLayer:
    """The derived layer at small odd sizes, in float64."""
    return cem.derive(energy, dim=13, hidden=17, dtype=torch.float64)


def derivation() -> cem.Derivation:
    """The same derivation as the toolkit finds it."""
    return layer().derivation


def check() -> None:
    """Raise ``AssertionError`` unless closed form and layer, gradient and SymPy agree."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 13, dtype=torch.float64, generator=generator)
    assert_layer_matches(layer(), closed_form, h)
    assert_gradient_matches_sympy(energy, dim=3, hidden=3)


if __name__ == "__main__":
    check()
    print(derivation())
