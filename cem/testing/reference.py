"""What a layer means: one token at a time, by slicing and autograd.

It shares no code with the lowering, which is tested against it.

Legend: T tokens, S context tokens, V visible ones, D dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import product

import torch
from sympy import Expr
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..energy import Energy
from ..layer import EnergyLayer


def reference_update(
    energy: Energy,
    h: Tensor,
    *,
    context: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    step_size: float | Tensor = 1.0,
    steps: int = 1,
    refresh: str = "layer",
    norm: Callable[[Tensor], Tensor] | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    **parameters_and_scalars: float | Tensor,
) -> Tensor:
    """The state after ``steps`` updates, by definition.

        h+_t = h_t - step_size * P dE(g_t | x_V, frozen_t) / dg_t

    One token at a time: g = norm(h), x_V holds the context tokens that token t may see and no
    others, and frozen is g at the input of the layer or of the step. Only g_t is differentiated.
    Training gradients flow through everything: h, the context, the frozen state, parameters,
    scalars and the step size.

    Args:
        energy: the energy of one token.
        h: states, shape (..., T, D).
        context: shape (..., S, D), the states themselves if None. Causal tokens see s <= t + S - T.
        visible: bool, True where a token may look: (..., S) or (..., T, S), beside causality.
        causal: whether token t is kept from seeing what comes after it.
        step_size, steps, refresh, norm, preconditioner: as in :func:`cem.derive`.
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
    tokens = _Tokens(energy, h, context, visible, causal, norm, parameters_and_scalars)
    states, frozen = h, tokens.read(h)
    for step in range(steps):
        g = tokens.read(states)
        if step and refresh == "step":
            frozen = g
        gradient = tokens.each(derivative, g, frozen).reshape(h.shape)
        states = states - step_size * (preconditioner or _same)(gradient)
    return states


def reference_energy(
    energy: Energy,
    h: Tensor,
    *,
    context: Tensor | None = None,
    frozen: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    norm: Callable[[Tensor], Tensor] | None = None,
    **parameters_and_scalars: float | Tensor,
) -> Tensor:
    """The energy of every token, shape (..., T), by definition.

    Arguments as in :func:`reference_update`; ``context`` and ``frozen`` default to ``h``.
    """
    tokens = _Tokens(energy, h, context, visible, causal, norm, parameters_and_scalars)
    g = tokens.read(h)
    gates = g if frozen is None else tokens.read(frozen)
    return tokens.each(_value, g, gates).reshape(h.shape[:-1])


def reference_of(layer: EnergyLayer, h: Tensor, **inputs: Tensor | None) -> Tensor:
    """:func:`reference_update` with everything that a layer of plain gradient descent holds.

    ``inputs`` are ``context`` and ``visible``; the result depends on the parameters of the layer.
    """
    return reference_update(
        layer.energy_function,
        h,
        causal=layer.causal,
        step_size=layer.update.step_size,
        steps=layer.steps,
        refresh=layer.refresh,
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


class _Tokens:
    """The tokens of a batch, with the slice of the context that each of them sees."""

    def __init__(self, energy, h, context, visible, causal, norm, values) -> None:
        self.energy, self.values, self.norm = _token_energy(energy), values, norm or _same
        places = product(*map(range, h.shape[:-1]))
        self.seen: list[Tensor | None] = [None for _ in places]
        if energy.context is None:
            return
        T, x = h.shape[-2], h if context is None else context
        x = self.norm(x) if x.shape[-1] == h.shape[-1] else x
        S = x.shape[-2]
        allowed = torch.ones(*h.shape[:-2], T, S, dtype=torch.bool, device=h.device)
        if causal:
            allowed = allowed.tril(S - T)
        if visible is not None:
            padding = visible.dim() == h.dim() - 1
            allowed = allowed & (visible.unsqueeze(-2) if padding else visible)
        sequences = zip(x.reshape(-1, S, x.shape[-1]), allowed.reshape(-1, T, S), strict=True)
        self.seen = [tokens[row] for tokens, rows in sequences for row in rows]

    def read(self, h: Tensor) -> Tensor:
        """What the energy reads of states: norm(h), one row a token."""
        return self.norm(h).reshape(-1, h.shape[-1])

    def each(self, function: Callable, g: Tensor, frozen: Tensor) -> Tensor:
        """``function(energy of the token, its state)`` for every token."""
        found = []
        for state, gate, seen in zip(g, frozen, self.seen, strict=True):
            rest = (gate, seen, self.values)
            found.append(function(lambda z, rest=rest: self.energy(z, *rest), state))
        return torch.stack(found)


def _same(value: Tensor) -> Tensor:
    return value


def _value(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return function(at)


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
        keywords = dict(values)
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
