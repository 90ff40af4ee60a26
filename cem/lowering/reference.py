"""Autograd of the energy of one token, mapped over tokens and batch: the fall-back that is always right.

Legend: B batch, T tokens, S context tokens, D dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.overrides import TorchFunctionMode

TokenEnergy = Callable[..., Tensor]
"""(h (D,), frozen (D,), x (S, D), visible (S,), position (), context_position (S,), *parameters) -> energy ().

What the energy does not have is None.
"""


class _Detached(TorchFunctionMode):
    """Records what is detached, or hands out replacements for it in the same order."""

    def __init__(self, replay: Iterator[Tensor] | None = None) -> None:
        super().__init__()
        self.recorded: list[Tensor] = []
        self.replay = replay

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.detach, torch.detach):
            if self.replay is not None:
                return next(self.replay)
            self.recorded.append(args[0])
            return args[0]
        return func(*args, **(kwargs or {}))


def from_callable(
    function: Callable[..., Tensor],
    names: tuple[str, ...],
    scalars: dict[str, float],
    has_context: bool,
) -> TokenEnergy:
    """The token energy of a torch callable, with ``detach`` read as *frozen*.

    A literal ``detach`` would cut the training gradient. The callable is therefore run once at the frozen state
    to learn the value of everything it detaches, and once at the state with those values in place.
    """
    accepted = set(inspect.signature(function).parameters)

    def energy(
        h: Tensor,
        frozen: Tensor,
        x: Tensor | None,
        visible: Tensor | None,
        position: Tensor | None,
        context_position: Tensor | None,
        *values: Tensor,
    ) -> Tensor:
        keywords: dict = {**scalars, **dict(zip(names, values, strict=True))}
        roles = {"visible": visible, "frozen": frozen}
        roles |= {"position": position, "context_position": context_position}
        keywords |= {role: value for role, value in roles.items() if role in accepted}
        context = (x,) if has_context else ()
        with _Detached() as first:
            value = function(frozen, *context, **keywords)
        if value.dim():
            raise ValueError(
                f"energy `{function.__name__}` must return one value per token: got shape {tuple(value.shape)};"
                " did you forget `.sum()`?"
            )
        if not first.recorded:
            return function(h, *context, **keywords)
        with _Detached(iter(first.recorded)):
            return function(h, *context, **keywords)

    return energy


def _dense(h: Tensor, x: Tensor | None, visible: Tensor | None, causal: bool) -> Tensor | None:
    """The visible set as a bool tensor (B, T, S), or None without a context."""
    if x is None:
        return None
    shape = (h.shape[0], h.shape[1], x.shape[1])
    if visible is not None:
        return visible.squeeze(1).expand(shape)
    mask = torch.ones(shape[1:], dtype=torch.bool, device=h.device)
    return (mask.tril() if causal else mask).expand(shape)


def map_tokens(
    function: Callable[..., Tensor],
    h: Tensor,
    frozen: Tensor | None,
    x: Tensor | None,
    visible: Tensor | None,
    causal: bool,
    position: Tensor | None,
    context_position: Tensor | None,
    states: None,
    ordered: bool,
    *parameters: Tensor,
) -> Tensor:
    """Apply a function of one token to every token of every sequence."""
    del states, ordered
    frozen = h if frozen is None else frozen
    mask = _dense(h, x, visible, causal)
    own, others = _rows(position, len(h)), _rows(context_position, len(h))
    shared = (None,) * len(parameters)
    has = None if x is None else 0
    placed = None if own is None else 0
    tokens = vmap(function, in_dims=(0, 0, None, has, placed, None, *shared))
    batch = vmap(tokens, in_dims=(0, 0, has, has, placed, placed, *shared))
    return batch(h, frozen, x, mask, own, others, *parameters)


def loop_tokens(
    function: Callable[..., Tensor],
    h: Tensor,
    frozen: Tensor | None,
    x: Tensor | None,
    visible: Tensor | None,
    causal: bool,
    position: Tensor | None,
    context_position: Tensor | None,
    states: None,
    ordered: bool,
    *parameters: Tensor,
) -> Tensor:
    """What ``map_tokens`` does, one token after the other: for callables that branch on their data."""
    del states, ordered
    frozen = h if frozen is None else frozen
    mask = _dense(h, x, visible, causal)
    own, others = _rows(position, len(h)), _rows(context_position, len(h))

    def one(b: int, t: int) -> Tensor:
        seen = (None, None) if x is None else (x[b], mask[b, t])
        places = (None, None) if own is None else (own[b, t], others[b])
        return function(h[b, t], frozen[b, t], *seen, *places, *parameters)

    return torch.stack([torch.stack([one(b, t) for t in range(h.shape[1])]) for b in range(len(h))])


def _rows(positions: Tensor | None, count: int) -> Tensor | None:
    """Positions with one row a sequence."""
    return None if positions is None else positions.expand(count, -1)


def branches_on_data(token_energy: TokenEnergy, *inputs: Tensor | None) -> bool:
    """Whether a callable asks for the value of a tensor, which cannot be mapped over tokens at once."""
    try:
        with torch.no_grad():
            map_tokens(token_energy, *inputs)
    except RuntimeError as error:
        return "vmap" in str(error)
    return False


def gradient_of(
    token_energy: TokenEnergy, mapping: Callable[..., Tensor] = map_tokens
) -> Callable[..., Tensor]:
    """(h (B, T, D), frozen, *seen, *parameters) -> dE/dh (B, T, D), by autograd."""
    return partial(mapping, grad(token_energy))


def joint_gradient_of(
    token_energy: TokenEnergy, mapping: Callable[..., Tensor] = map_tokens
) -> Callable[..., Tensor]:
    """The derivative (B, T, D) of all energies together, for states that are each other's context."""

    def total(h: Tensor, frozen: Tensor, *rest) -> Tensor:
        return mapping(token_energy, h, frozen, h, *rest).sum()

    def gradient(h: Tensor, frozen: Tensor | None, x: Tensor, *rest) -> Tensor:
        del x
        return grad(total)(h, h if frozen is None else frozen, *rest)

    return gradient


def hessian_of(gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """(h (B, T, D), frozen, *seen, *parameters, v (B, T, D)) -> d2E/dh2 v (B, T, D), from ``gradient_of``.

    The Hessian of a token is symmetric and tokens do not mix, so the product with v is a vector-Jacobian product.
    """

    def product(h: Tensor, frozen: Tensor | None, *rest) -> Tensor:
        *rest, v = rest
        frozen = h if frozen is None else frozen
        return vjp(lambda z: gradient(z, frozen, *rest), h)[1](v)[0]

    return product


def energy_of(
    token_energy: TokenEnergy, mapping: Callable[..., Tensor] = map_tokens
) -> Callable[..., Tensor]:
    """(h (B, T, D), frozen, *seen, *parameters) -> energies (B, T)."""
    return partial(mapping, token_energy)
