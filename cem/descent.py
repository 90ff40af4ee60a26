"""The descent of a layer: its steps, one after another, at the context and the gates of the call.

Legend: B batch, T tokens, D dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .energy import Energy
from .inputs import Seen
from .lowering import Lowering
from .preconditioner import pull_back
from .update import AbstractUpdate, GradientDescent, Momentum, Nesterov

REFRESH = ("layer", "step")
# Linear in the state, the gradient and the memory together, so that they commute with matrices.
LINEAR = (GradientDescent, Momentum, Nesterov)
# In the span the state is h_0 + B^T c: right to the digits of h_0, where that of the loop keeps its own digits
# as it goes to zero over many steps.
MOST_STEPS = 16


class Descending(Protocol):
    """What the loop needs of the layer whose steps it takes."""

    energy_function: Energy
    update: AbstractUpdate
    preconditioner: nn.Module | None
    norm: nn.Module
    lowering: Lowering
    steps: int
    refresh: str
    moving: bool
    tolerance: float | None
    checkpoint: bool
    steps_taken: int


class LayerObjective:
    """What one step of a layer descends: an :class:`~cem.update.Objective` made of programs.

    Attributes:
        g: norm(h) at the input of the step, (B, T, D).
        frozen: the gates: norm(h) at the input of the layer or of the step.
        seen: what the tokens see.
        values: parameters and learned scalars.
        fixed: what the lowering has computed once for all steps, or what a cache holds.
        program: the program of the gradient, which takes ``fixed`` last.
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
        program: Callable[..., Tensor] | None = None,
    ) -> None:
        self.layer, self.g, self.frozen, self.seen = layer, g, frozen, seen
        self.values, self.fixed, self.step = values, fixed, step
        self.program = layer.lowering.gradient if program is None else program

    def at(self, h: Tensor, step: int) -> LayerObjective:
        """That of another step, which begins at h; called on the one of the first step."""
        if step == 0:
            return self
        g = self.layer.norm(h)
        frozen = g if self.layer.refresh == "step" else self.frozen
        seen = self.seen._replace(x=g) if self.layer.moving else self.seen
        return type(self)(self.layer, g, frozen, seen, self.values, self.fixed, step, self.program)

    @property
    def around(self) -> tuple:
        """What every program takes after the state."""
        return (self.frozen, *self.seen, *self.values)

    def gradient(self, g: Tensor) -> Tensor:
        """dE/dg (B, T, D) divided by ``lowering.scale``."""
        return self.program(g, *self.around, *self.fixed)

    def taken(self, before: Tensor, after: Tensor) -> None:
        """Told after the step with the states before and after it."""

    def energy(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer.lowering.energy(self.layer.norm(h), *self.around)

    def slope(self, h: Tensor, direction: Tensor) -> Tensor:
        with torch.no_grad():
            gradient = pull_back(self.layer.norm, self.gradient(self.layer.norm(h)), h)
            return self.layer.lowering.scale * (gradient * direction).sum(-1)

    @property
    def curvature(self) -> str:
        return self.layer.lowering.hessian_product.curvature

    def hessian(self, h: Tensor) -> Callable[[Tensor], Tensor]:
        return self.layer.lowering.hessian_product(self.layer.norm(h), *self.around)


class SpanObjective:
    """What a step descends as a function of c, where h = h_0 + B^T c; see :mod:`cem.lowering.span`.

    Attributes:
        g: c at the input of the step, (B, T, M).
    """

    def __init__(self, first: LayerObjective, h: Tensor) -> None:
        self.first, self.h, self.step = first, h, 0
        span = first.layer.lowering.span
        self.force = span.force
        A, self.B = span.matrices(h, *first.around, *first.fixed)
        self.z, self.gram = F.linear(h, A), self.B @ A.transpose(0, 1)
        self.g = self.origin = h.new_zeros(()).expand(*h.shape[:-1], span.coefficients)

    def at(self, c: Tensor, step: int) -> SpanObjective:
        found = copy(self)
        found.g, found.step = c, step
        return found

    def gradient(self, c: Tensor) -> Tensor:
        """f (B, T, M): c moves along it as h along dE/dh = B^T f."""
        z = self.z
        if c is not self.origin:
            z = torch.addmm(z.flatten(0, 1), c.flatten(0, 1), self.gram).view_as(z)
        return self.force(z, *self.first.around, *self.first.fixed)

    def taken(self, before: Tensor, after: Tensor) -> None:
        """Nobody is told of states that nobody computes."""

    def state(self, c: Tensor) -> Tensor:
        """h (B, T, D)."""
        return self.h + c @ self.B


def least_tokens(layer: Descending) -> float:
    """The number of tokens from which a layer steps in the span of what it moves along; infinity where it cannot.

    It can where its rule is linear and nothing but the rule asks for the state between the steps.
    """
    plain = layer.preconditioner is None and type(layer.norm) is nn.Identity
    fixed = layer.refresh == "layer" and not layer.moving and layer.tolerance is None
    fixed = fixed and layer.steps <= MOST_STEPS
    if layer.lowering.span is None or type(layer.update) not in LINEAR or not (plain and fixed):
        return math.inf
    return layer.lowering.span.least(layer.dim, layer.steps)


def code(layer: Descending) -> str:
    """The program of dE/dh as readable Python, and that of a step in the span where the layer takes such."""
    least = least_tokens(layer)
    if least == math.inf:
        return layer.lowering.code
    told = (
        f"# From {math.ceil(least)} tokens on, with A, B = matrices(...): every step moves c, 0 at first, along\n"
        "# force(z, ...) at z = h @ A.T + c @ (B @ A.T), and the layer returns h + c @ B."
    )
    return "\n\n".join((layer.lowering.code, told, layer.lowering.span.code))


def needs_dense(layer: Descending, lowering: Lowering) -> bool:
    """Whether a step needs the visible set as a dense mask; makes all that the steps ask for, before they run."""
    if layer.checkpoint and lowering.kind == "autograd":
        raise ValueError(
            f"energy `{layer.energy_function.name}` is lowered to autograd, which cannot be checkpointed:"
            f" {'; '.join(lowering.reasons)}; type `checkpoint=False`"
        )
    programs = {"energy": "energy", "hessian": "hessian_product"}
    names = (*layer.update.needs, *(() if layer.tolerance is None else ("energy",)))
    asked = [getattr(lowering, programs[name]) for name in names]
    return any(part.needs_mask for part in (lowering, *asked))


def take(layer: Descending, objective: LayerObjective, h: Tensor, state) -> tuple:
    """One step of a layer from h (B, T, D): the next h and what its rule remembers."""
    point = layer.update.look(h, state)
    gradient = objective.gradient(objective.g if point is h else layer.norm(point))
    if layer.preconditioner is not None:
        gradient = layer.preconditioner(gradient, point, objective.step)
    return layer.update(h, gradient, state, layer.lowering.scale, objective)


def descend(layer: Descending, first: LayerObjective, h: Tensor, state=None) -> tuple:
    """All steps of a layer from h (B, T, D): the last h and what its rule remembers.

    Args:
        layer: whose steps; how many were taken is written to ``steps_taken`` where it has a tolerance.
        first: the objective of the first step.
        state: what the rule remembers from before; ``update.init(h)`` if None.
    """
    if state is None and type(first) is LayerObjective and first.program is layer.lowering.gradient:
        tokens = h.shape[0] * h.shape[1]
        if not torch.compiler.is_exporting() and tokens >= least_tokens(layer):
            within = SpanObjective(first, h)
            c, state = _descend(layer, within, within.g, layer.update.init(within.g))
            return within.state(c), state
    return _descend(layer, first, h, layer.update.init(h) if state is None else state)


def _descend(layer: Descending, first: LayerObjective | SpanObjective, h: Tensor, state) -> tuple:
    energy = None
    for step in range(layer.steps):
        before = h
        if layer.checkpoint and torch.is_grad_enabled():
            h, state = checkpoint(_again, layer, first, h, state, step, use_reentrant=False)
        else:
            objective = first.at(h, step)
            h, state = take(layer, objective, h, state)
            objective.taken(before, h)
        if layer.tolerance is not None:
            layer.steps_taken = step + 1
            objective = first.at(before, step)
            if energy is None or layer.moving or layer.refresh == "step":
                energy = objective.energy(before).mean()
            energy, last = objective.energy(h).mean(), energy
            if not last - energy > layer.tolerance:
                break
    return h, state


def _again(layer: Descending, first: LayerObjective, h: Tensor, state, step: int) -> tuple:
    """One step from its number, so that a backward pass can take it again."""
    return take(layer, first.at(h, step), h, state)


def check_recursion(
    energy: Energy, steps: int, refresh: str, moving: bool, tolerance: float | None, same: bool
) -> None:
    """Refuse, with ``ValueError``, arguments of ``derive`` about steps; ``same``: the context can be the state."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` is a positive integer: got {steps!r}; type `steps=1`")
    if refresh not in REFRESH:
        raise ValueError(f'`refresh` is "layer" or "step": got {refresh!r}; type `refresh="layer"`')
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(
            f"`tolerance` is a fall of the mean energy, at least 0: got {tolerance!r}; type `tolerance=1e-3`"
        )
    if moving and (energy.context is None or not same):
        has = (
            "no context" if energy.context is None else "a context of another width than the state"
        )
        raise ValueError(
            f"energy `{energy.name}` has {has}, so no context can follow the states: got moving=True; type"
            " `moving=False`"
        )


def refuse_context(layer: Descending, context: Tensor | None) -> None:
    """``ValueError`` for a layer whose context is its state and that is given another."""
    if context is not None:
        raise ValueError(
            f"layer `{layer.energy_function.name}` moves its context, which is the state itself: got `context`; call"
            " it without, or derive it with `moving=False`"
        )


def steady(layer: Descending, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the inputs of a program that stay the same from step to step; ``names`` are the parameters."""
    if layer.steps == 1:
        return ()
    seen = tuple(name for name in Seen._fields if not (layer.moving and name == "x"))
    return (*seen, *names, *(("frozen",) if layer.refresh == "layer" else ()))


def is_still(layer: Descending) -> bool:
    """Whether gradients are only taken where ``frozen(h)`` was, at the input of the layer."""
    looks_ahead = type(layer.update).look is not AbstractUpdate.look
    return layer.steps == 1 and not looks_ahead and not layer.update.needs


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
