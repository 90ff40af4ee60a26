"""What a decoder keeps of the tokens it has seen: exactly what the layer's program computes from the context alone.

Legend: B batch, H heads, T new tokens, S tokens held, E features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .descent import LayerObjective
from .inputs import Seen


class Cache:
    """The memory of one layer: keys (and values, where they are not the keys), and states of linear attention.

    Made by :meth:`cem.EnergyLayer.init_cache` and filled by ``layer(h, cache=cache)``. Tied attention keeps one
    tensor (B, H, S, E), half of the usual two. Where every attention of the layer looks back over a window, the
    tensor is a ring of that length. What is kept carries no gradient.

    Attributes:
        length: how many tokens the layer has seen.
        max_seq: how many it may see.
        window: the length of the ring, or None.
        nbytes: the size of all tensors.
    """

    def __init__(
        self,
        kinds: tuple[str, ...],
        sample: tuple[Tensor | None, ...],
        max_seq: int,
        window: int | None,
    ) -> None:
        self.kinds, self.max_seq, self.length = kinds, max_seq, 0
        self.window = window if window is not None and window < max_seq else None
        self.room = self.window or max_seq
        self.tensors: list[Tensor | None] = [None] * len(kinds)
        for n, (kind, one) in enumerate(zip(kinds, sample, strict=True)):
            if kind == "append":
                self.tensors[n] = one.new_zeros(*one.shape[:2], self.room, one.shape[-1])
            elif kind == "state":
                self.tensors[n] = torch.zeros_like(one[:, :, 0])
        self.index = torch.empty(0, dtype=torch.long)
        self.positions: Tensor | None = None
        self.oldest = 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors if t is not None)

    @property
    def has_states(self) -> bool:
        return "state" in self.kinds

    @property
    def batch(self) -> int:
        return next(t.shape[0] for t in self.tensors if t is not None)

    def states(self) -> tuple[Tensor, ...] | None:
        """What the seen tokens left to each linear attention."""
        found = [t for t, kind in zip(self.tensors, self.kinds, strict=True) if kind == "state"]
        return tuple(found) if found else None

    def extend(self, seen: Seen, new: tuple[Tensor | None, ...], count: int) -> tuple[tuple, Seen]:
        """Take in what the program computed of ``count`` new tokens.

        Returns everything that is held, in the order of ``new``, and what is seen now: positions and mask of the
        tokens held.
        """
        fresh = torch.arange(self.length, self.length + count)
        held = len(self.index)
        whole = held + count <= self.room
        in_place = whole or count == 1
        start = held if whole else self.oldest
        values: list[Tensor | None] = []
        for n, (kind, one) in enumerate(zip(self.kinds, new, strict=True)):
            tensor = self.tensors[n]
            if kind == "append" and in_place:
                tensor[:, :, start : start + count] = one.detach()
                values.append(tensor[:, :, : held + count] if whole else tensor)
            elif kind == "append":
                both = torch.cat([tensor[:, :, :held], one.to(tensor.dtype)], 2)
                tensor[:, :, : self.room] = both[:, :, -self.room :].detach()
                values.append(both)
            else:
                values.append(one)
                if kind == "state":
                    self.tensors[n] = one[:, :, -1].detach()
        places = seen.context_position
        if in_place and not whole:
            index = self.index.clone()
            index[start] = fresh[0]
            if places is not None:
                # A copy, since the program may still hold the old ones.
                self.positions = self.positions.expand(
                    max(len(places), len(self.positions)), -1
                ).clone()
                self.positions[:, start] = places[:, 0]
            places = self.positions
            self.oldest = (self.oldest + 1) % self.room
        else:
            index = torch.cat([self.index, fresh])
            if places is not None and self.positions is not None:
                rows = max(len(places), len(self.positions))
                places = torch.cat([self.positions.expand(rows, -1), places.expand(rows, -1)], 1)
        self.length += count
        self.index, self.positions = index[-self.room :], places
        if places is not None:
            self.positions = places[:, -self.room :]
        if not in_place:
            self.oldest = 0
        visible = seen.visible
        if visible is not None and len(index) < visible.shape[-1]:
            visible = visible[..., index.to(visible.device)]
        return tuple(values), seen._replace(context_position=places, visible=visible)

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order, (B,) whole numbers, as a beam search does."""
        self.tensors = [
            None if t is None else t.index_select(0, rows.to(t.device)) for t in self.tensors
        ]
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions.index_select(0, rows.to(self.positions.device))

    def crop(self, length: int) -> None:
        """Forget all but the first tokens; ``ValueError`` where they cannot be told apart any more."""
        if self.has_states or len(self.index) < self.length or not 0 <= length <= self.length:
            raise ValueError(
                f"a cache of {self.length} tokens cannot go back to {length}: a state or a ring has let go of the"
                " past; begin with `layer.init_cache(batch, max_seq)`"
            )
        self.length, self.index = length, self.index[:length]
        if self.positions is not None:
            self.positions = self.positions[:, :length]

    def __repr__(self) -> str:
        ring = "" if self.window is None else f", window={self.window}"
        return f"Cache(length={self.length}, max_seq={self.max_seq}{ring}, nbytes={self.nbytes})"


def new_cache(layer, batch: int, max_seq: int) -> Cache:
    """The cache of a layer; see :meth:`cem.EnergyLayer.init_cache`."""
    name = layer.energy_function.name
    if batch < 1 or max_seq < 1:
        raise ValueError(
            f"a cache holds at least one token of one sequence: got batch={batch} and max_seq={max_seq}"
        )
    if not layer.causal:
        raise ValueError(
            f"layer `{name}` sees later tokens, so it cannot be decoded: derive it with `causal=True`"
        )
    if layer.moving or layer.update.needs or layer.tolerance is not None:
        what = "moves its context" if layer.moving else "asks for energies or Hessians in its steps"
        raise ValueError(
            f"layer `{name}` {what}, which a cache does not keep: call it without `cache`"
        )
    if layer.energy_function.context is None or layer.context_dim != layer.dim:
        raise ValueError(
            f"layer `{name}` has no context made of its own states: call it without `cache`"
        )
    decoding = layer.lowering.decoding
    like = next(iter(layer.energy_function.parameters), None)
    like = torch.empty(()) if like is None else getattr(layer, str(like.name))
    h = torch.zeros(batch, 1, layer.dim, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        _, g, seen = layer.reader(layer.norm, h, past=0)
        states = (None,) * len(decoding.kinds) if "state" in decoding.kinds else None
        new = decoding.context(g, g, *seen._replace(states=states), *layer.values())
    return Cache(decoding.kinds, new, max_seq, decoding.window)


def decode(
    layer, cache: Cache, h: Tensor, **inputs: Tensor | None
) -> tuple[Tensor, LayerObjective]:
    """States (B, T, D) of new tokens, and what their first step descends, with the cache extended by them."""
    name, decoding, count = layer.energy_function.name, layer.lowering.decoding, h.shape[-2]
    for what in ("context", "context_positions", "document_ids"):
        if inputs.pop(what, None) is not None:
            raise ValueError(
                f"layer `{name}` takes its context from the cache: got `{what}`; call it without `{what}`"
            )
    if cache.has_states and inputs.get("visible") is not None:
        raise ValueError(
            f"layer `{name}` keeps sums over all tokens it has seen, so none can be hidden later: got `visible` with"
            " a cache; leave it out"
        )
    if cache.length + count > cache.max_seq:
        raise ValueError(
            f"the cache of layer `{name}` holds {cache.max_seq} tokens: got {count} more after {cache.length};"
            f" type `layer.init_cache(batch, {2 * cache.max_seq})`"
        )
    positions = inputs.get("positions")
    if cache.window is not None and positions is not None and (positions.diff(dim=-1) < 1).any():
        raise ValueError(
            f"the cache of layer `{name}` is a ring of {cache.window} tokens, which needs positions that grow: got"
            " `positions` that do not"
        )
    dense = layer.dense or (decoding.counts and cache.length > 0)
    h, g, seen = layer.reader(layer.norm, h, dense=dense, past=cache.length, **inputs)
    if len(h) != cache.batch:
        raise ValueError(
            f"the cache of layer `{name}` is for {cache.batch} sequences: got {len(h)}; type"
            f" `layer.init_cache({len(h)}, max_seq)`"
        )
    values, seen = layer.values(), seen._replace(states=cache.states())
    new = decoding.context(g, g, *seen, *values)
    held, seen = cache.extend(seen, new, count)
    return h, LayerObjective(layer, g, g, seen, values, held, program=decoding.gradient)
