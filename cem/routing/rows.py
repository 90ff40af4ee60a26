"""The chosen tokens as rows of their own: taken out, sent through layers, put back.

Legend: B batch, T tokens, S tokens so far, D dim, K chosen tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cache import Cache
from ..descent import LayerObjective, descend
from ..layer import EnergyLayer
from .router import Choice


def stages_of(layer: nn.Module) -> list[nn.Module]:
    """What the rows go through, one after the other: a stack is taken apart."""
    if type(layer) is nn.Sequential:
        return [stage for part in layer for stage in stages_of(part)]
    return [layer]


def looks(layer: nn.Module) -> bool:
    """Whether a layer is one of energies and has a context."""
    return isinstance(layer, EnergyLayer) and layer.energy_function.context is not None


@dataclass(frozen=True)
class Given:
    """The inputs of a call, with one batch axis: as in :class:`Rows`, and ``visible`` (B, S) with a cache."""

    context: Tensor | None = None
    visible: Tensor | None = None
    positions: Tensor | None = None
    documents: Tensor | None = None

    @classmethod
    def read(
        cls,
        h: Tensor,
        context: Tensor | None = None,
        visible: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        past: int | None = None,
    ) -> Given:
        """From the inputs of :meth:`cem.Routed.forward`, with ``past`` tokens in a cache."""
        lead, T = h.shape[:-2], h.shape[-2]

        def numbers(name: str, given: Tensor, length: int) -> Tensor:
            fits = given.dim() == 1 or all(
                n in (1, m) for n, m in zip(given.shape, lead, strict=False)
            )
            if given.shape[-1:] != (length,) or given.dim() not in (1, len(lead) + 1) or not fits:
                raise ValueError(
                    f"`Routed` takes `{name}` of shape {(*lead, length)}: got {tuple(given.shape)}"
                )
            return given.expand(*lead, length).reshape(-1, length)

        if context is not None and document_ids is not None:
            raise ValueError(
                "documents are those of the tokens themselves: got `document_ids` and `context`; hide tokens of the"
                " context by `visible`"
            )
        if context is not None:
            context = context.reshape(-1, *context.shape[-2:])
        if visible is not None and visible.dtype != torch.bool:
            raise TypeError(
                f"`Routed` takes a bool `visible`: got {visible.dtype}; type `mask.bool()`"
            )
        if visible is not None and visible.dim() == len(lead) + 2 and past is None:
            S = T if context is None else context.shape[1]
            visible = visible.expand(*lead, T, S).reshape(-1, T, S)
        elif visible is not None:
            length = visible.shape[-1] if context is not None else (past or 0) + T
            visible = numbers("visible", visible, length)
        if positions is not None:
            positions = numbers("positions", positions, T)
        elif past is not None:
            positions = (
                torch.arange(past, past + T, device=h.device).expand(*lead, T).reshape(-1, T)
            )
        if document_ids is not None:
            document_ids = numbers("document_ids", document_ids, T)
        return cls(context, visible, positions, document_ids)

    @property
    def real(self) -> Tensor | None:
        """Which of the tokens are not padding, (B, S), or None for all."""
        padding = self.context is None and self.visible is not None and self.visible.dim() == 2
        return self.visible if padding else None

    def rows(self, choice: Choice | None = None) -> Rows:
        """The chosen of these tokens, or all."""
        index, present = (None, None) if choice is None else (choice.index, choice.present)
        return Rows(index, present, self.visible, self.positions, self.documents, self.context)


@dataclass(frozen=True)
class Rows:
    """The chosen tokens among T, and what these see.

    Attributes:
        index: places (B, K), ascending, or None for all tokens.
        present: bool (B, K), False where nothing stands at a place, or None.
        visible: bool (B, T) or (B, T, T), or None.
        positions: (B, T), or None for 0, 1, 2, ...
        documents: (B, T), or None.
        context: given states (B, S, D) to look at, or None.
    """

    index: Tensor | None
    present: Tensor | None = None
    visible: Tensor | None = None
    positions: Tensor | None = None
    documents: Tensor | None = None
    context: Tensor | None = None

    def _flat(self, count: int) -> Tensor:
        lead = torch.arange(len(self.index), device=self.index.device)[:, None] * count
        return (self.index + lead).flatten()

    def take(self, h: Tensor) -> Tensor:
        """The rows (B, K, D) of (B, T, D)."""
        if self.index is None:
            return h
        rows = h.flatten(0, 1).index_select(0, self._flat(h.shape[1]))
        return rows.view(*self.index.shape, h.shape[-1])

    def put(self, h: Tensor, rows: Tensor) -> Tensor:
        """(B, T, D) with the rows in their places."""
        if self.index is None:
            return rows
        flat = self._flat(h.shape[1])
        return h.flatten(0, 1).index_copy(0, flat, rows.flatten(0, 1)).view_as(h)

    def moved(self, h: Tensor, rows: Tensor) -> Tensor:
        """(B, T, D) with the rows that are there in their places, for the layers that come next."""
        if self.present is not None:
            rows = torch.where(self.present[..., None], rows, self.take(h))
        return self.put(h, rows)

    def along(self, numbers: Tensor) -> Tensor:
        """The entries (B, K) of (B, T)."""
        return numbers if self.index is None else numbers.gather(1, self.index)

    def places(self, h: Tensor) -> Tensor:
        """Positions (B, T) of all tokens."""
        if self.positions is not None:
            return self.positions
        return torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])

    def inputs(self, layer: EnergyLayer, state: Tensor, selected: bool) -> dict:
        """Keywords of a layer of energies for its call with the rows.

        Args:
            state: all tokens (B, T, D) as they are by now.
            selected: the rows see each other alone.
        """
        found = {}
        placed = layer.reader.placed
        if self.index is None or not looks(layer):
            if placed and (self.positions is not None or self.index is not None):
                found["positions"] = self.along(self.places(state))
            if looks(layer):
                found |= {"visible": self.visible, "document_ids": self.documents}
                found["context"] = self.context
            return found
        if placed:
            found["positions"] = self.along(self.places(state))
        if self.context is not None:
            return found | {"context": self.context, "visible": self._rows_of_pairs()}
        if selected:
            return found | self._selected(layer)
        if placed:
            found["context_positions"] = self.places(state)
        mask = self._rows_of_pairs()
        if layer.causal:
            mask = _and(
                mask, torch.arange(state.shape[1], device=state.device) <= self.index[..., None]
            )
        if self.documents is not None:
            own = self.along(self.documents)[..., None] == self.documents[:, None, :]
            mask = _and(mask, own)
        return found | {"context": state, "visible": mask}

    def _rows_of_pairs(self) -> Tensor | None:
        """What hides tokens from the rows, (B, 1 or K, T)."""
        if self.visible is None or self.visible.dim() == 2:
            return None if self.visible is None else self.visible[:, None, :]
        return self.visible.gather(1, self.index[..., None].expand(-1, -1, self.visible.shape[-1]))

    def _selected(self, layer: EnergyLayer) -> dict:
        """Keywords by which the rows see each other; those that are not there stand last."""
        found = {}
        if self.documents is not None:
            found["document_ids"] = self.along(self.documents)
        mask = self._rows_of_pairs()
        if mask is not None:
            mask = mask.gather(2, self.index[:, None, :].expand(-1, mask.shape[1], -1))
            mask = mask[:, 0] if self.visible.dim() == 2 else mask
        if self.present is not None and not (layer.causal and mask is None):
            own = self.present if mask is None or mask.dim() == 2 else self.present[:, None, :]
            mask = _and(mask, own)
        return found | {"visible": mask}

    def through(self, stages: list[nn.Module], h: Tensor, selected: bool) -> Tensor:
        """The rows (B, K, D) of h (B, T, D) after all stages."""
        state, rows = h, self.take(h)
        for place, stage in enumerate(stages):
            if not isinstance(stage, EnergyLayer):
                rows = stage(rows)
                continue
            if place and looks(stage) and not selected and self.index is not None:
                state = self.moved(h, rows)
            rows = stage(rows, **self.inputs(stage, state, selected))
        return rows


def _and(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one & other


def step_some(
    layer: EnergyLayer,
    cache: Cache,
    state: Tensor,
    rows: Tensor,
    chosen: Rows,
    visible: Tensor | None,
) -> Tensor:
    """Take new tokens into a cache and move the chosen of them, (B, K, D).

    Args:
        state: the new tokens (B, T, D) as they are by now.
        rows: those of them that are chosen (B, K, D).
        chosen: which these are; its positions are those of the new tokens.
        visible: bool (B, S) over all tokens so far, or None.
    """
    inputs = {"positions": chosen.positions} if layer.reader.placed else {}
    decoding, T = layer.lowering.decoding, state.shape[1]
    if "state" in decoding.kinds:
        visible = None if visible is None else visible[:, -T:]
    if chosen.index is None or "state" in decoding.kinds:
        return chosen.take(layer(state, cache=cache, visible=visible, **inputs))
    cache.check(layer.energy_function.name, len(state), T, visible=visible, **inputs)
    past = cache.past(T)
    _, g, seen = layer.reader(layer.norm, state, past=past, visible=visible, **inputs)
    values = layer.values()
    new = decoding.context(g, g, *seen, *values)
    mask = torch.arange(past + T, device=g.device) <= past + chosen.index[..., None]
    mask = mask if visible is None else mask & visible[:, None, :]
    seen = seen._replace(visible=mask[:, None], causal=False)
    if seen.position is not None:
        own = seen.position.expand(len(state), T)
        seen = seen._replace(position=chosen.along(own))
    held, seen = cache.extend(seen, new, T)
    if not rows.shape[1]:
        return rows
    g = layer.norm(rows)
    first = LayerObjective(layer, g, g, seen, values, held, program=decoding.gradient)
    return descend(layer, first, rows)[0]
