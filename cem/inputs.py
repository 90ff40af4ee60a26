"""What a layer is called with: checked, with one batch axis, as the programs of a lowering take it.

Legend: B batch, T tokens, S context tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .energy import Energy
from .lowering.kernels import sharing
from .visibility import Packed, packed, visible_mask


class Seen(NamedTuple):
    """What the tokens see, in the order in which programs take it.

    Attributes:
        x: norm(context), (B, S, D), or None for an energy without a context.
        visible: bool (B or 1, 1, T, S), or None where everything is visible or ``causal`` says it; documents and
            padding of the tokens where all that reads it is ``flex_attention``.
        causal: s <= t, where there is no mask (T equal to S).
        position: positions of the states, (B or 1, T), or None for an energy without positions.
        context_position: positions of the context tokens, (B or 1, S), or None.
        states: what earlier tokens left to each linear attention, where a decoder has seen some, else None.
        ordered: whether the states are the context and stand at positions 0, 1, 2, ...
    """

    x: Tensor | None
    visible: Tensor | Packed | None
    causal: bool
    position: Tensor | None
    context_position: Tensor | None
    states: tuple[Tensor | None, ...] | None = None
    ordered: bool = False


@dataclass(frozen=True)
class Reader:
    """Checks and reshapes the inputs of one layer; ``placed`` says whether its energy reads positions."""

    energy: Energy
    dim: int
    context_dim: int
    causal: bool
    placed: bool

    def __call__(
        self,
        norm: Callable[[Tensor], Tensor],
        h: Tensor,
        *,
        context: Tensor | None = None,
        visible: Tensor | None = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        dense: bool = False,
        packed: bool = False,
        past: int | None = None,
    ) -> tuple[Tensor, Tensor, Seen]:
        """(h, norm(h), what is seen), each with one batch axis.

        ``dense`` asks for the mask (B or 1, 1, T, S) even where a kernel could do with ``causal`` alone, ``packed`` for
        none where documents and padding are all that hides tokens from each other. With ``past`` earlier tokens in a
        cache, the mask is over them too, x and ``context_position`` are those of the new ones.
        """
        self.check(h, "state", self.dim)
        tokens = h.reshape(-1, *h.shape[-2:])
        g = norm(tokens)
        if self.energy.context is None:
            self._refuse_context(
                context=context,
                visible=visible,
                context_positions=context_positions,
                document_ids=document_ids,
            )
            x, T, S = None, h.shape[-2], h.shape[-2]
            mask, causal = None, False
        else:
            x = g if context is None else self._context(context, h, norm)
            if context is None and self.context_dim != self.dim:
                raise ValueError(
                    f"layer `{self.energy.name}` needs a context of width {self.context_dim}: got none;"
                    " call it with `context=`"
                )
            T, S = tokens.shape[1], x.shape[1] + (past or 0)
            mask, causal = self._visible(T, S, visible, document_ids, h, dense, packed)
        ordered = all(given is None for given in (context, positions, context_positions))
        ordered = ordered and self.placed and not past
        if past is not None and self.placed and positions is None:
            positions = torch.arange(past, past + T, device=h.device)
        length = S if past is None else T
        own, others = self._positions(positions, context_positions, T, length, context, h)
        return tokens, g, Seen(x, mask, causal, own, others, None, ordered)

    def check(self, h: Tensor, what: str, width: int) -> None:
        """Refuse a state or a context of another kind or shape."""
        name = self.energy.name
        if not h.is_floating_point():
            raise TypeError(
                f"layer `{name}` takes a floating-point {what}: got {h.dtype}; embed tokens first or type"
                " `h.float()`"
            )
        if h.dim() < 2 or h.shape[-1] != width:
            raise ValueError(
                f"layer `{name}` takes a {what} of shape (..., tokens, {width}): got {tuple(h.shape)}"
            )
        if h.shape[-2] == 0:
            raise ValueError(
                f"layer `{name}` needs at least one token: got a {what} of shape {tuple(h.shape)}"
            )

    def _refuse_context(self, **given: Tensor | None) -> None:
        for what, value in given.items():
            if value is not None:
                raise ValueError(
                    f"layer `{self.energy.name}` has no context: got `{what}`; call it without `{what}`"
                )

    def _context(self, context: Tensor, h: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        self.check(context, "context", self.context_dim)
        if context.shape[:-2] != h.shape[:-2]:
            raise ValueError(
                f"layer `{self.energy.name}`: state and context must have the same leading sizes:"
                f" got {tuple(h.shape)} and {tuple(context.shape)}; expand one of them"
            )
        x = context.reshape(-1, *context.shape[-2:])
        return norm(x) if self.context_dim == self.dim else x

    def _visible(
        self,
        T: int,
        S: int,
        visible: Tensor | None,
        document_ids: Tensor | None,
        h: Tensor,
        dense: bool,
        compact: bool,
    ) -> tuple[Tensor | Packed | None, bool]:
        """The mask (B or 1, 1, T, S), documents or None, and whether a kernel must still apply causality."""
        energy = self.energy
        if self.causal and S < T:
            raise ValueError(
                f"causal layer `{energy.name}` needs a context at least as long as the state: got {S} context"
                f" tokens for {T}; derive it with `causal=False` for cross attention"
            )
        masked = visible is not None or document_ids is not None
        if T == 1 and self.causal and not masked and not dense:
            return None, False
        if not masked and not dense and not (self.causal and S != T):
            return None, self.causal
        if masked and energy.expression is None and not energy.masks_itself:
            raise ValueError(
                f"layer `{energy.name}` cannot be masked: {energy.reason}; give the callable an argument"
                " `visible` (bool, (seq,)) and mask with it"
            )
        lead, given = h.shape[:-2], {"document_ids": document_ids, "device": h.device}
        padding = visible is None or visible.dim() == len(lead) + 1
        if compact and not dense and T == S and padding:
            return packed(visible, lead, T, causal=self.causal, name=energy.name, **given), False
        mask = visible_mask(visible, lead, T, S, causal=self.causal, name=energy.name, **given)
        return mask, False

    def _positions(
        self,
        positions: Tensor | None,
        context_positions: Tensor | None,
        T: int,
        S: int,
        context: Tensor | None,
        h: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Positions of the states and of the context tokens, (B or 1, T) and (B or 1, S)."""
        if not self.placed:
            for what, value in (
                ("positions", positions),
                ("context_positions", context_positions),
            ):
                if value is not None:
                    raise ValueError(
                        f"layer `{self.energy.name}` has no positions: got `{what}`; use `cem.position` or"
                        f" `cem.rope` in the energy, or call it without `{what}`"
                    )
            return None, None
        lead, dtype = h.shape[:-2], torch.promote_types(h.dtype, torch.float32)
        own = self._own(positions, "positions", lead, T, h)
        if context_positions is None and context is None and own is not None:
            own = _typed(own, dtype)
            return own, own
        others = self._own(context_positions, "context_positions", lead, S, h)
        counted = others is None
        others = _typed(torch.arange(S, device=h.device)[None] if counted else others, dtype)
        if own is None and S == T and (counted or self.causal):
            return others, others
        if own is None:
            own = others[:, S - T :] if self.causal else torch.arange(T, device=h.device)[None]
        return _typed(own, dtype), others

    def _own(
        self, positions: Tensor | None, what: str, lead: torch.Size, length: int, h: Tensor
    ) -> Tensor | None:
        """A user's positions as (B or 1, length)."""
        if positions is None:
            return None
        if positions.dtype == torch.bool or positions.is_complex():
            raise TypeError(
                f"layer `{self.energy.name}`: `{what}` are whole numbers: got {positions.dtype};"
                " type `torch.arange(T)`"
            )
        shape = tuple(positions.shape)
        fits = all(size in (1, full) for size, full in zip(shape[:-1], lead, strict=False))
        if not shape or shape[-1] != length or len(shape) not in (1, len(lead) + 1) or not fits:
            raise ValueError(
                f"layer `{self.energy.name}`: `{what}` must have shape {(length,)} or {(*lead, length)}: got"
                f" {shape}"
            )
        positions = positions.to(h.device)
        if len(shape) == 2 and len(lead) == 1:
            return positions
        if all(size == 1 for size in shape[:-1]):
            return positions.reshape(1, length)
        return positions.expand(*lead, length).reshape(-1, length)


def _typed(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Positions in a type; those that are new here keep what is made of them."""
    typed = positions.to(dtype)
    return typed if typed is positions else sharing(typed)
