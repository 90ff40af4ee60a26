"""Retrieval of a modern Hopfield network from the memory energy.

Legend: T tokens, D dim, M hidden (stored patterns).

1. The energy. A parabola that keeps the state finite, and a log-sum-exp that pulls it to the
   patterns U_m:

       E(h) = 1/2 sum_i h_i^2 - (1/beta) log sum_m exp(beta u_m),    u_m = sum_i U_mi h_i.

2. The adjoints. With p = softmax_m(beta u_m):

       -dE/du_m = p_m.

3. The gradient. The parabola gives h itself, and the adjoint of u returns through the transpose
   of U:

       dE/dh_d = h_d - sum_m U_md p_m.

4. The layer. One step of size 1 cancels the state:

       h+ = h - (h - U^T p) = U^T softmax(beta U h).

   The new state is a mean of the patterns, weighted by their likeness to the old one: one query of
   attention whose keys and values are the rows of one matrix.

5. Descent. E is convex plus concave. Replace the concave log-sum-exp term by its tangent at h:
   what results lies above E, touches it at h and has its minimum at h+. It is a parabola of
   curvature 1, so

       E(h+) <= E(h) - 1/2 |h+ - h|^2,

   for all patterns and every beta > 0, although E may have many minima.
"""

import torch
from torch import Tensor

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import memory as energy


def closed_form(h: Tensor, *, U: Tensor, beta: float | None = None) -> Tensor:
    """U^T softmax(beta U h), for states (..., T, D); ``beta`` is 1/sqrt(dim) if None."""
    beta = U.shape[-1] ** -0.5 if beta is None else beta
    weights = (beta * h @ U.mT).softmax(-1)  # (..., T, M)
    return weights @ U


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
    assert_gradient_matches_sympy(energy, dim=3, hidden=4)


if __name__ == "__main__":
    check()
    print(derivation())
