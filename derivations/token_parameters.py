"""The layer of Tokenformer from an energy whose temperature is part of the context.

Legend: T tokens, D dim, N parameter tokens.

1. The energy. Each parameter token K_n adds a potential F of its score a_n = sum_i K_ni h_i, with
   F' = gelu. The root mean square of the scores of the frozen state c, r/s with s = sqrt(N), is
   the temperature at which the state reads them:

       E(h) = -(r/s) sum_n F(s a_n / r),    r = |K c| = sqrt(sum_n (sum_i K_ni c_i)^2),    c = frozen(h).

2. The adjoints. The factor r/s cancels the one that the chain rule brings:

       -dE/da_n = gelu(s a_n / r).

3. The gradient. The scores return through the transpose of K:

       -dE/dh_d = sum_n K_nd gelu(s a_n / r).

4. The layer. At c = h, which is where one step takes it, and at step size 1,

       h+ = h + K^T gelu(s K h / |K h|):

   Pattention (arXiv:2410.23168, equations 4 to 6) with the values tied to the keys, and the residual
   of Tokenformer. With r moving along and F(0) = 0, the energy would give one term more,

       K^T u sum_n (F(z_n)/s - u_n gelu(z_n)),    u = K h / |K h|,    z = s u,

   and the energy `consistent_token_parameters`.

5. Descent. At the fixed temperature the Hessian is -(s/r) K^T diag(gelu'(s a / r)) K, and gelu' is
   at least -0.129, so small steps descend; with relu in its place E is concave, and all do. No
   energy of h alone has this step as its gradient: with p = K^T u and q = K^T diag(gelu'(z)) u the
   Jacobian J of the layer has

       J - J^T = (s/|K h|) (p q^T - q p^T),

   which is zero only where q is parallel to p.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import token_parameters as energy


def closed_form(h: Tensor, *, K: Tensor, scale: float | None = None) -> Tensor:
    """h + K^T gelu(s K h / |K h|), for states (..., T, D); ``scale`` is sqrt(N) if None."""
    scale = len(K) ** 0.5 if scale is None else scale
    scores = h @ K.mT  # (..., T, N)
    return h + F.gelu(scale * scores / scores.norm(dim=-1, keepdim=True)) @ K


def layer() -> cem.EnergyLayer:
    """The derived layer at small odd sizes, in float64."""
    return cem.derive(energy, dim=13, tokens=17, dtype=torch.float64)


def derivation() -> cem.Derivation:
    """The same derivation as the toolkit finds it."""
    return layer().derivation


def check() -> None:
    """Raise ``AssertionError`` unless closed form and layer, gradient and SymPy agree."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 13, dtype=torch.float64, generator=generator)
    assert_layer_matches(layer(), closed_form, h)
    assert_gradient_matches_sympy(energy, dim=3, tokens=2)


if __name__ == "__main__":
    check()
    print(derivation())
