"""The descent of a layer: its steps, one after another, at the context and the gates of the call.

Legend: B batch, T tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from .energy import Energy
from .inputs import Seen
from .lowering import Lowering
from .update import AbstractUpdate


class Descending(Protocol):
    """What the loop needs of the layer whose steps it takes."""

    energy_function: Energy
    update: AbstractUpdate
    preconditioner: nn.Module | None
    norm: nn.Module
    lowering: Lowering
    steps: int
    refresh: str


class LayerObjective:
    """What one step of a layer descends: an :class:`~cem.update.Objective` made of programs.

    Attributes:
        g: norm(h) at the input of the step, (B, T, D).
        frozen: the gates: norm(h) at the input of the layer or of the step.
        seen: what the tokens see.
        values: parameters and learned scalars.
        fixed: what the lowering has computed once for all steps.
    """

    def __init__(
        self,
        layer: Descending,
        g: Tensor,
        frozen: Tensor,
        seen: Seen,
        values: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        step: int = 0,
    ) -> None:
        self.layer, self.g, self.frozen, self.seen = layer, g, frozen, seen
        self.values, self.fixed, self.step = values, fixed, step

    def at(self, h: Tensor, step: int) -> LayerObjective:
        """That of another step, which begins at h; called on the one of the first step."""
        if step == 0:
            return self
        g = self.layer.norm(h)
        frozen = g if self.layer.refresh == "step" else self.frozen
        return type(self)(self.layer, g, frozen, self.seen, self.values, self.fixed, step)

    @property
    def around(self) -> tuple:
        """What every program takes after the state."""
        return (self.frozen, *self.seen, *self.values)

    def gradient(self, g: Tensor) -> Tensor:
        """dE/dg (B, T, D) divided by ``lowering.scale``."""
        return self.layer.lowering.gradient(g, *self.around, *self.fixed)

    def taken(self, before: Tensor, after: Tensor) -> None:
        """Told after the step with the states before and after it."""

    def energy(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer.lowering.fast_energy(self.layer.norm(h), *self.around)

    @property
    def curvature(self) -> str:
        return self.layer.lowering.hessian_product.curvature

    def hessian(self, h: Tensor) -> Callable[[Tensor], Tensor]:
        return self.layer.lowering.hessian_product(self.layer.norm(h), *self.around)


def needs_dense(update: AbstractUpdate, lowering: Lowering) -> bool:
    """Whether a step needs the visible set as a dense mask; makes the programs that the rule asks for."""
    programs = {"energy": "fast_energy", "hessian": "hessian_product"}
    asked = [getattr(lowering, programs[name]) for name in update.needs]
    return any(part.needs_mask for part in (lowering, *asked))


def take(layer: Descending, objective: LayerObjective, h: Tensor, state) -> tuple:
    """One step of a layer from h (B, T, D): the next h and what its rule remembers."""
    point = layer.update.look(h, state)
    gradient = objective.gradient(objective.g if point is h else layer.norm(point))
    if layer.preconditioner is not None:
        gradient = layer.preconditioner(gradient, point, objective.step)
    return layer.update.update(h, gradient, state, layer.lowering.scale, objective)


def descend(layer: Descending, first: LayerObjective, h: Tensor, state=None) -> tuple:
    """All steps of a layer from h (B, T, D): the last h and what its rule remembers.

    Args:
        layer: whose steps.
        first: the objective of the first step.
        state: what the rule remembers from before; ``update.init(h)`` if None.
    """
    state = layer.update.init(h) if state is None else state
    for step in range(layer.steps):
        objective, before = first.at(h, step), h
        h, state = take(layer, objective, h, state)
        objective.taken(before, h)
    return h, state


def carried(layer: Descending, memory: Tensor, shape: torch.Size) -> Tensor:
    """A memory that fits the layer and its states; ``ValueError`` else."""
    name = layer.energy_function.name
    if not layer.update.remembers:
        raise ValueError(
            f"layer `{name}` has no memory: its update rule is {layer.update}, which remembers nothing; call it"
            " without `memory`"
        )
    if memory.shape != shape:
        raise ValueError(
            f"layer `{name}`: `memory` must have the shape of the state: got {tuple(memory.shape)} and"
            f" {tuple(shape)}; begin with `layer.update.init(h)`"
        )
    return memory
