"""Iterative shrinkage-thresholding, and its learned form, from the sparse coding energy.

Legend: T tokens, D dim (atoms), F features of the signal, N steps.

1. The energy. The state is a code; D turns it into the signal that A reads from the token as it was
   at the input of the layer, c = frozen(h):

       E(h) = 1/2 sum_f (y_f - z_f)^2,    z_f = sum_i D_fi h_i,    y_f = sum_i A_fi c_i.

   What makes the code sparse is a second term, F(h) = E(h) + lambda sum_i |h_i|, which has no
   gradient at 0 and is left to step 5.

2. The adjoints. Only the reconstruction moves:

       -dE/dz_f = y_f - z_f.

3. The gradient. h reaches z through D, so what is missing returns through the transpose of D:

       -dE/dh_d = sum_f D_fd (y_f - z_f).

4. The layer. One step of size eta:

       v = h - eta D^T (D h - y) = (1 - eta D^T D) h + eta D^T y.

   The signal does not move, so y = A c is read once, however many steps are taken. Learned
   shrinkage-thresholding is the second form with free matrices, S in the place of 1 - eta D^T D and
   W in that of eta D^T A. Here D makes both, and reads what it writes.

5. The proximal step. h+ = prox(v) is the minimum of 1/2 |h - v|^2 + eta lambda |h|_1 over h, which
   is taken coordinate by coordinate:

       h+_i = sign(v_i) relu(|v_i| - eta lambda).

   Over h >= 0 it is relu(v_i - eta lambda), a layer with the activation relu and a bias.

6. Descent. E is convex and its Hessian is D^T D, of largest eigenvalue L = |D|_2^2, so a gradient
   step gives E(v) <= E(h) - (1/eta - L/2) |v - h|^2. What prox minimises has the curvature 1/eta,
   and a whole step gives F(h+) <= F(h) - (1/eta - L/2) |h+ - h|^2. Both descend for eta < 2/L.
"""

import torch
from torch import Tensor

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import sparse_coding as energy

STEP_SIZE = 0.2


def closed_form(h: Tensor, *, D: Tensor, A: Tensor, steps: int = 1) -> Tensor:
    """(1 - eta D^T D) h + eta D^T A c, repeated, for states (..., T, D): step 4."""
    pull = STEP_SIZE * h @ A.mT @ D
    for _ in range(steps):
        h = h - STEP_SIZE * h @ D.mT @ D + pull
    return h


def shrink(v: Tensor, threshold: float) -> Tensor:
    """sign(v) relu(|v| - threshold), the minimum of 1/2 |h - v|^2 + threshold |h|_1: step 5."""
    return v.sign() * torch.relu(v.abs() - threshold)


def layer(*, steps: int = 1) -> cem.EnergyLayer:
    """The derived layer, without its threshold, at small odd sizes, in float64."""
    update = cem.GradientDescent(STEP_SIZE)
    sizes = {"dim": 13, "features": 5}
    return cem.derive(energy, steps=steps, update=update, dtype=torch.float64, **sizes)


def derivation() -> cem.Derivation:
    """The same derivation as the toolkit finds it."""
    return layer().derivation


def assert_descent(h: Tensor, weight: float = 0.1, steps: int = 30) -> None:
    """A step with its threshold lowers F by at least (1/eta - L/2) |h+ - h|^2: step 6."""
    smooth = layer()
    largest = float(torch.linalg.matrix_norm(smooth.D.detach(), 2)) ** 2
    start = h
    assert 0 < STEP_SIZE < 2 / largest
    with torch.no_grad():
        # The layer would read the signal afresh from every state; here it stays that of the start.
        signal = start @ smooth.A.mT
        for _ in range(steps):
            v = h - STEP_SIZE * (h @ smooth.D.mT - signal) @ smooth.D
            moved = shrink(v, STEP_SIZE * weight)
            before, after = (
                smooth.energy(z, frozen=start) + weight * z.abs().sum(-1) for z in (h, moved)
            )
            least = (1 / STEP_SIZE - largest / 2) * (moved - h).square().sum(-1)
            assert (before - after >= least - 1e-12).all(), "a step fell by less than it promises"
            h = moved
        assert (h == 0).any(), "no coordinate of the code is zero"


def check() -> None:
    """Raise ``AssertionError`` unless closed form and layer, gradient and SymPy agree."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 13, dtype=torch.float64, generator=generator)
    for steps in (1, 3):

        def by_hand(h, *, steps=steps, **parameters):
            return closed_form(h, steps=steps, **parameters)

        assert_layer_matches(layer(steps=steps), by_hand, h)
    assert_gradient_matches_sympy(energy, dim=3, features=2)
    assert_descent(h)


if __name__ == "__main__":
    check()
    print(derivation())
