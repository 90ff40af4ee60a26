"""Damped Newton: a step of the gradient divided by the curvature."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .krylov import conjugate_gradients
from .update import Objective, Promise, Stepping

SIGNS = {"convex": 1.0, "concave": -1.0, "affine": 1.0}


class Newton(Stepping):
    """h+ = h - step_size * d, where (|Hess| + damping I) d = dE/dh for every token.

    |Hess| is Hess for an energy that ``energy.curvature`` proves convex, and -Hess for a concave one, so that the
    matrix is positive semi-definite and d points uphill. The system is solved by conjugate gradients on Hessian
    products in closed form; after k iterations d is the best in a space of k dimensions, and it still points uphill.
    An iteration costs one product, and its attention weights are computed once a step. The program is the same for
    every input, and training differentiates through it.

    Args:
        damping: lambda, in units of curvature, at least 0: a step is at most |dE/dh| / lambda long. 0 is for energies
            with positive curvature in every direction.
        iterations: of conjugate gradients, at most; ``dim`` of them solve the system exactly up to rounding.
        tolerance: a token is done when the residual is below this share of its gradient.
        step_size: eta, or a sequence of them, one a step.
        learn: learn the step size, registered as ``step_size``.

    Raises:
        ValueError: a damping or a tolerance below 0, no iterations, a step size that is not positive; from
            ``derive``, an energy that is neither proved convex nor concave, or a preconditioner: the curvature is one.

    >>> import torch, cem
    >>> @cem.energy(h="dim", w="dim")
    ... def bowl(h, *, w):
    ...     return (w.exp() * h**2).sum() / 2
    >>> layer = cem.derive(bowl, dim=4, update=cem.Newton(damping=0.0, iterations=4))
    >>> bool(layer(torch.randn(1, 2, 4)).abs().max() < 1e-4)
    True

    Source: Nocedal and Wright, Numerical Optimization, 2006, section 7.1.
    """

    needs = ("hessian",)

    def __init__(
        self,
        damping: float = 1e-2,
        iterations: int = 8,
        tolerance: float = 1e-6,
        *,
        step_size: float | Iterable[float] = 1.0,
        learn: bool = False,
    ) -> None:
        super().__init__(step_size, learn=learn)
        if not damping >= 0 or not tolerance >= 0 or iterations < 1:
            raise ValueError(
                "`Newton` needs a damping and a tolerance of at least 0 and an iteration: got"
                f" damping={damping}, tolerance={tolerance}, iterations={iterations}; type"
                " `cem.Newton(damping=0.01, iterations=8)`"
            )
        self.damping, self.iterations, self.tolerance = float(damping), iterations, float(tolerance)

    def check(self, energy, steps: int, preconditioner: nn.Module | None) -> None:
        super().check(energy, steps, preconditioner)
        if energy.curvature not in SIGNS:
            raise ValueError(
                f"energy `{energy.name}` is not known to be convex or concave in the state, so Newton's |Hess| is not"
                f" a Hessian: got curvature {energy.curvature!r}; type `update=cem.Momentum()`, or"
                " `cem.LineSearch()` for inference"
            )
        if preconditioner is not None:
            raise ValueError(
                f"energy `{energy.name}`: `Newton` takes no preconditioner, its curvature is one: got"
                f" {preconditioner}; type `preconditioner=None`"
            )

    def update(
        self,
        h: Tensor,
        gradient: Tensor,
        state: None,
        scale: float = 1.0,
        objective: Objective | None = None,
    ) -> tuple[Tensor, None]:
        hessian, sign = objective.hessian(h), SIGNS[objective.curvature]

        def apply(v: Tensor) -> Tensor:
            return sign * hessian(v) + self.damping * v

        d = conjugate_gradients(apply, gradient, self.iterations, self.tolerance)
        return self.along(h, d, objective, scale), state

    def promise(self, smoothness: float, *, steps: int, scalar: bool, normed: bool) -> Promise:
        """Every step size, where the energy is concave: the direction points uphill after any iteration."""
        del steps, scalar
        if smoothness or normed:
            why = "behind a norm" if normed else "for an energy that is not concave"
            return Promise(None, False, f"Nothing is promised of a Newton step {why}.")
        return self.up_to(0.0, ", since the direction of conjugate gradients has g.d > 0")

    def extra_repr(self) -> str:
        own = (
            f"damping={self.damping:g}, iterations={self.iterations}, tolerance={self.tolerance:g}"
        )
        return f"{own}, {super().extra_repr()}"
