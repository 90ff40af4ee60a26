"""FixedPoint: descend until nothing moves, and differentiate where it stopped instead of how it got there.

Legend: B batch, T tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .descent import LayerObjective, take
from .krylov import conjugate_gradients, conjugate_residuals
from .layer import EnergyLayer
from .preconditioner import PerStep
from .update import Proximal

Solve = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


class FixedPoint(nn.Module):
    """The state h* at which the steps of a layer no longer move, with an implicit derivative.

    At h* the force is zero: F(h*, theta) = 0 with F = dE/dh, or F(h) = h - prox(h - step_size P dE/dh) for
    ``Proximal``. The steps run without a graph, so memory does not depend on their number, and by the implicit
    function theorem

        dL/dtheta = -u^T dF/dtheta,    (dF/dh)^T u = dL/dh*,

    one linear system a token. dF/dh is the Hessian of the energy, and conjugate gradients solve it, where there is
    neither a norm nor a prox and gates are fixed for the layer; elsewhere generalised conjugate residuals do.
    Momentum, step sizes and preconditioners change how h* is reached and not its derivative. Training flows to
    parameters, to the context and to frozen gates; h* depends on h through these alone.

    The energy needs an isolated minimum for every token, as a strongly convex one has. The number of steps depends on
    the data, so ``torch.compile`` breaks the graph here; the derivative is not differentiable again.

    Args:
        layer: whose steps to take, ``layer.steps`` of them at most.
        tolerance: stop when no token moves by more than this times 1 + |h| in a step; also the relative residual of the
            linear system. Gradients are as exact as h* is.

    Attributes:
        steps_taken: how many steps the last call took.
        moved: the largest |step| / (1 + |h|) of its last step; above ``tolerance`` where it did not arrive.

    Raises:
        ValueError: a tolerance that is not positive, a layer of one step, with a context that moves, with a norm that
            forgets the length of h (no fixed point of it stands alone), or with something for each step.

    >>> import torch, cem
    >>> @cem.energy(h="dim", U="hidden dim")
    ... def bowl(h, *, U):
    ...     return 0.5 * (h * h).sum() + cem.softplus(U @ h).sum()
    >>> layer = cem.derive(bowl, dim=4, hidden=8, steps=200, update=cem.Nesterov(0.3, 0.5))
    >>> model = cem.FixedPoint(layer, tolerance=1e-5)
    >>> model(torch.randn(1, 3, 4)).sum().backward()
    >>> model.steps_taken < 200, layer.U.grad.shape
    (True, torch.Size([8, 4]))

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, 2019, theorem 1.
    """

    def __init__(self, layer: EnergyLayer, tolerance: float = 1e-6) -> None:
        super().__init__()
        name = layer.energy_function.name
        if not tolerance > 0:
            raise ValueError(
                f"`FixedPoint` needs a positive tolerance: got {tolerance}; type `tolerance=1e-6`"
            )
        if layer.steps < 2:
            raise ValueError(
                f"`FixedPoint` takes up to `steps` steps: layer `{name}` has 1; type `cem.derive(..., steps=200)`"
            )
        if layer.moving:
            raise ValueError(
                f"`FixedPoint` solves every token at a fixed context: layer `{name}` has moving=True; type"
                " `moving=False`"
            )
        if isinstance(layer.norm, nn.RMSNorm | nn.LayerNorm):
            raise ValueError(
                f"`FixedPoint` needs fixed points that stand alone: layer `{name}` has {layer.norm}, which forgets the"
                " length of h; type `norm=None`"
            )
        if getattr(layer.update, "per_step", False) or isinstance(layer.preconditioner, PerStep):
            raise ValueError(
                f"`FixedPoint` repeats one step: layer `{name}` has step sizes or preconditioners of its own for each;"
                " type one of them"
            )
        self.layer, self.tolerance = layer, tolerance
        self.steps_taken, self.moved = 0, float("inf")

    def forward(self, h: Tensor, **inputs: Tensor | None) -> Tensor:
        """h* of shape (..., T, D); arguments are those of the layer, without ``memory``."""
        shape = h.shape
        h, first = self.layer.begin(h, **inputs)
        with torch.no_grad():
            h = self.arrive(first, h)
        if not torch.is_grad_enabled():
            return h.reshape(shape)
        h = h.detach().requires_grad_()
        return _Implicit.apply(self.force(first, h), h, self.solve).reshape(shape)

    def arrive(self, first: LayerObjective, h: Tensor) -> Tensor:
        """Take steps until no token moves."""
        state = self.layer.update.init(h)
        for step in range(self.layer.steps):
            objective, before = first.at(h, step), h
            h, state = take(self.layer, objective, h, state)
            objective.taken(before, h)
            self.steps_taken = step + 1
            self.moved = float(((h - before).norm(dim=-1) / (1.0 + h.norm(dim=-1))).max())
            if self.moved <= self.tolerance:
                break
        return h

    def force(self, first: LayerObjective, h: Tensor) -> Tensor:
        """F (B, T, D), zero at the fixed point."""
        layer, objective = self.layer, first.at(h, 1)
        if isinstance(layer.update, Proximal):
            return h - take(layer, objective, h, None)[0]
        return layer.lowering.scale * objective.gradient(objective.g)

    def solve(self, apply: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        """u with (dF/dh)^T u = b."""
        layer, count = self.layer, 2 * self.layer.dim + 10
        plain = not isinstance(layer.update, Proximal) and type(layer.norm) is nn.Identity
        if plain and layer.refresh == "layer":
            return conjugate_gradients(apply, b, count, self.tolerance, early=True)
        return conjugate_residuals(apply, b, count, self.tolerance)

    def extra_repr(self) -> str:
        return f"tolerance={self.tolerance:g}"


class _Implicit(torch.autograd.Function):
    """h*, whose derivative is that of the root of F."""

    @staticmethod
    def forward(ctx, force: Tensor, h: Tensor, solve: Solve) -> Tensor:
        ctx.force, ctx.h, ctx.solve = force, h, solve
        return h.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        def transposed(u: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(ctx.force, ctx.h, u, retain_graph=True)
            return found

        return -ctx.solve(transposed, slope), None, None
