"""What a layer means: one token at a time, by slicing and autograd.

It shares no code with the lowering, which is tested against it.

Legend: T tokens, S context tokens, V visible ones, D dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from sympy import Expr
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..energy import Energy
from ..layer import EnergyLayer
from ..update import AbstractUpdate


def reference_update(
    energy: Energy,
    h: Tensor,
    *,
    context: Tensor | None = None,
    visible: Tensor | None = None,
    positions: Tensor | None = None,
    context_positions: Tensor | None = None,
    document_ids: Tensor | None = None,
    causal: bool = True,
    step_size: float | Tensor = 1.0,
    update: AbstractUpdate | None = None,
    steps: int = 1,
    refresh: str = "layer",
    moving: bool = False,
    joint: bool = False,
    norm: Callable[[Tensor], Tensor] | None = None,
    preconditioner: Callable[..., Tensor] | None = None,
    **parameters_and_scalars: float | Tensor,
) -> Tensor:
    """The state after ``steps`` updates, by definition.

        h+_t = h_t - step_size * P dE(g_t | x_V, frozen_t) / dg_t

    One token at a time: g = norm(h), x_V holds the context tokens that token t may see and no
    others, and frozen is g at the input of the layer or of the step. Only g_t is differentiated.
    An update rule is given the gradient where it looks, g = norm(update.look(h, memory)).
    Training gradients flow through everything: h, the context, the frozen state, parameters,
    scalars and what the rule learns. ``joint`` differentiates the sum of all energies for all states instead, each
    the others' context.

    Args:
        energy: the energy of one token.
        h: states, shape (..., T, D).
        context: shape (..., S, D), the states themselves if None. Causal tokens see s <= t + S - T.
        visible: bool, True where a token may look: (..., S) or (..., T, S), beside causality.
        positions, context_positions, document_ids: as in :meth:`cem.EnergyLayer.forward`.
        causal: whether token t is kept from seeing what comes after it.
        step_size: of plain gradient descent; an update rule has its own.
        update, steps, refresh, moving, joint, norm: as in :func:`cem.derive`.
        preconditioner: called as ``preconditioner(gradient, h, step)``.
        **parameters_and_scalars: every parameter by name, and scalars other than their default.

    Returns:
        states, shape (..., T, D).

    >>> import torch, cem
    >>> from cem.energies import interaction
    >>> layer = cem.derive(interaction, dim=4, heads=2, rank=3, dtype=torch.float64)
    >>> h = torch.randn(5, 4, dtype=torch.float64)
    >>> expected = cem.testing.reference_update(interaction, h, Q=layer.Q, K=layer.K)
    >>> torch.allclose(layer(h), expected, rtol=1e-12)
    True
    """
    places = (positions, context_positions, document_ids)
    tokens = _Tokens(energy, h, context, visible, places, causal, norm, parameters_and_scalars)
    states, frozen = h, tokens.read(h)
    memory = None if update is None else update.init(h)
    for step in range(steps):
        if step and refresh == "step":
            frozen = tokens.read(states)
        if step and moving:
            tokens = _Tokens(
                energy, states, None, visible, places, causal, norm, parameters_and_scalars
            )
        point = states if update is None else update.look(states, memory)
        g = tokens.read(point)
        if joint:

            def total(z: Tensor, frozen: Tensor = frozen) -> Tensor:
                together = _Tokens(
                    energy, z, None, visible, places, causal, None, parameters_and_scalars
                )
                return together.each(_value, z.reshape(frozen.shape), frozen).sum()

            gradient = derivative(total, g.reshape(h.shape))
        else:
            gradient = tokens.each(derivative, g, frozen).reshape(h.shape)
        if preconditioner is not None:
            gradient = preconditioner(gradient, point, step)
        if update is None:
            states = states - step_size * gradient
        else:
            objective = _Objective(tokens, frozen, step, energy.curvature)
            states, memory = update.update(states, gradient, memory, 1.0, objective)
    return states


def reference_energy(
    energy: Energy,
    h: Tensor,
    *,
    context: Tensor | None = None,
    frozen: Tensor | None = None,
    visible: Tensor | None = None,
    positions: Tensor | None = None,
    context_positions: Tensor | None = None,
    document_ids: Tensor | None = None,
    causal: bool = True,
    norm: Callable[[Tensor], Tensor] | None = None,
    **parameters_and_scalars: float | Tensor,
) -> Tensor:
    """The energy of every token, shape (..., T), by definition.

    Arguments as in :func:`reference_update`; ``context`` and ``frozen`` default to ``h``.
    """
    places = (positions, context_positions, document_ids)
    tokens = _Tokens(energy, h, context, visible, places, causal, norm, parameters_and_scalars)
    g = tokens.read(h)
    gates = g if frozen is None else tokens.read(frozen)
    return tokens.each(_value, g, gates).reshape(h.shape[:-1])


def reference_of(layer: EnergyLayer, h: Tensor, **inputs: Tensor | None) -> Tensor:
    """:func:`reference_update` with everything that a layer holds.

    ``inputs`` are those of ``layer.forward``; the result depends on the parameters of the layer.
    """
    return reference_update(
        layer.energy_function,
        h,
        causal=layer.causal,
        update=layer.update,
        steps=layer.steps,
        refresh=layer.refresh,
        moving=layer.moving,
        joint=layer.joint,
        norm=layer.norm,
        preconditioner=layer.preconditioner,
        **inputs,
        **values_of(layer),
    )


def values_of(layer: EnergyLayer) -> dict[str, float | Tensor]:
    """Parameters and scalars of a layer by name; learned ones as tensors that autograd follows."""
    names = [str(p.name) for p in layer.energy_function.parameters]
    names += [scalar.name for scalar in layer._learned]
    return {**layer.scalars, **dict(zip(names, layer.values(), strict=True))}


PLACES = ("position", "context_position")


class _Tokens:
    """The tokens of a batch, with the slice of the context that each of them sees."""

    def __init__(self, energy, h, context, visible, places, causal, norm, values) -> None:
        self.energy, self.values, self.norm = _token_energy(energy), values, norm or _same
        lead, T = h.shape[:-2], h.shape[-2]
        x = h if context is None else context
        S = x.shape[-2]
        positions, context_positions, document_ids = places
        if context_positions is None:
            context_positions = positions if context is None else None
        others = torch.arange(S) if context_positions is None else context_positions
        others = others.expand(*lead, S).reshape(-1, S)
        if positions is not None:
            own = positions.expand(*lead, T).reshape(-1, T)
        else:
            own = others[:, S - T :] if causal else torch.arange(T).expand(len(others), T)
        self.seen: list[dict[str, Tensor]] = [{} for _ in own.flatten()]
        if energy.has_positions:
            self.seen = [{"position": one} for one in own.flatten()]
        if energy.context is None:
            return
        x = self.norm(x) if x.shape[-1] == h.shape[-1] else x
        allowed = torch.ones(*lead, T, S, dtype=torch.bool, device=h.device)
        if causal:
            allowed = allowed.tril(S - T)
        if visible is not None:
            padding = visible.dim() == h.dim() - 1
            allowed = allowed & (visible.unsqueeze(-2) if padding else visible)
        if document_ids is not None:
            ids = document_ids.expand(*lead, S)
            allowed = allowed & (ids[..., S - T :, None] == ids[..., None, :])
        x, allowed = x.reshape(-1, S, x.shape[-1]), allowed.reshape(-1, T, S)
        for n, seen in enumerate(self.seen):
            row = allowed[n // T, n % T]
            seen["x"] = x[n // T][row]
            if energy.has_positions:
                seen["context_position"] = others[n // T][row.to(others.device)]

    def read(self, h: Tensor) -> Tensor:
        """What the energy reads of states: norm(h), one row a token."""
        return self.norm(h).reshape(-1, h.shape[-1])

    def each(self, function: Callable, g: Tensor, frozen: Tensor) -> Tensor:
        """``function(energy of the token, its state)`` for every token."""
        found = []
        for state, gate, seen in zip(g, frozen, self.seen, strict=True):
            rest = (gate, seen.get("x"), self.values | {k: v for k, v in seen.items() if k != "x"})
            found.append(function(lambda z, rest=rest: self.energy(z, *rest), state))
        return torch.stack(found)


@dataclass(frozen=True)
class _Objective:
    """What an update rule may ask of one step, token by token; see :class:`cem.update.Objective`."""

    tokens: _Tokens
    frozen: Tensor
    step: int
    curvature: str

    def energy(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            return self.tokens.each(_value, self.tokens.read(h), self.frozen).reshape(h.shape[:-1])

    def slope(self, h: Tensor, direction: Tensor) -> Tensor:
        def through(at: Tensor) -> Tensor:
            with torch.enable_grad():
                return self.tokens.each(_value, self.tokens.read(at), self.frozen).sum()

        with torch.no_grad():
            return (derivative(through, h) * direction).sum(-1)

    def hessian(self, h: Tensor) -> Callable[[Tensor], Tensor]:
        matrices = self.tokens.each(_hessian, self.tokens.read(h), self.frozen)  # (tokens, D, D)
        return lambda v: torch.einsum("nde,ne->nd", matrices, v.reshape(-1, v.shape[-1])).reshape(
            v.shape
        )


def _same(value: Tensor) -> Tensor:
    return value


def _value(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return function(at)


def _hessian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The second derivative at one state, (D, D), row by row."""
    rows = [derivative(lambda z, d=d: derivative(function, z)[d], at) for d in range(len(at))]
    return torch.stack(rows)


def derivative(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """d function / d at, itself differentiable for everything that the function is made of."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        # A new node: what else depends on `at` (the context, the frozen state) is held fixed.
        z = at.clone() if at.requires_grad else at.detach().requires_grad_()
        value = function(z)
        if not value.requires_grad:
            return torch.zeros_like(at)
        (found,) = torch.autograd.grad(value, z, create_graph=keep, allow_unused=True)
    return torch.zeros_like(at) if found is None else found


def _token_energy(energy: Energy) -> Callable[..., Tensor]:
    """(h (D,), frozen (D,), visible context (V, D) or None, values) -> energy of one token, ()."""
    if energy.expression is not None:
        return lambda h, frozen, x, values: energy(h, x, frozen=frozen, **values)
    function = energy.function
    accepted = inspect.signature(function).parameters

    def callable_energy(h: Tensor, frozen: Tensor, x: Tensor | None, values: Mapping) -> Tensor:
        keywords = {name: value for name, value in values.items() if name not in PLACES}
        sizes = energy.infer_sizes(h, x, keywords)
        for scalar in energy.scalars:
            value = keywords.get(scalar.name, scalar.default)
            if isinstance(value, Expr):
                value = float(value.xreplace(sizes))
            keywords[scalar.name] = value
        arguments = () if x is None else (x,)
        if "visible" in accepted and x is not None:
            keywords["visible"] = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if "frozen" in accepted:
            keywords["frozen"] = frozen
        keywords |= {name: values[name] for name in PLACES if name in accepted and name in values}
        # What the callable detaches has its value, and its training gradient, at frozen.
        with _Detaching() as gates:
            function(frozen, *arguments, **keywords)
        with _Detaching(iter(gates.seen)):
            return function(h, *arguments, **keywords)

    return callable_energy


class _Detaching(TorchFunctionMode):
    """Notes what is detached, or puts noted values in its place, in the same order."""

    def __init__(self, instead: Iterator[Tensor] | None = None) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.instead = instead

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (torch.detach, Tensor.detach):
            return func(*args, **(kwargs or {}))
        self.seen.append(args[0])
        return args[0] if self.instead is None else next(self.instead)
