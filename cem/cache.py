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
        places: Tensor | None,
    ) -> None:
        self.kinds, self.max_seq, self.length, self.oldest = kinds, max_seq, 0, 0
        self.window = window if window is not None and window < max_seq else None
        self.room = self.window or max_seq
        self.tensors = [
            self._empty(one) if kind == "append" else torch.zeros_like(one[:, :, 0])
            for kind, one in zip(kinds, sample, strict=True)
            if kind != "new"
        ]
        first = self.tensors[0]
        self.batch = first.shape[0]
        self.positions = None
        if places is not None:
            self.positions = self._empty(places.new_zeros(self.batch, 1, 1, 1))
        # Which tokens a ring holds; without one it is all of them, in order.
        self.index = None
        if self.window is not None:
            self.index = self._empty(first.new_zeros(1, 1, 1, 1, dtype=torch.long))

    def _empty(self, one: Tensor) -> Tensor:
        return one.new_zeros(*one.shape[:2], self.room, one.shape[-1])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def has_states(self) -> bool:
        return "state" in self.kinds

    def past(self, count: int) -> int:
        """How many tokens stand before ``count`` new ones in what :meth:`extend` returns."""
        return self.length

    def check(
        self,
        name: str,
        batch: int,
        count: int,
        *,
        visible: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """Refuse, with ``ValueError``, what cannot be taken in."""
        if self.has_states and visible is not None:
            raise ValueError(
                f"layer `{name}` keeps sums over all tokens it has seen, so none can be hidden later: got `visible`"
                " with a cache; leave it out"
            )
        if self.length + count > self.max_seq:
            raise ValueError(
                f"the cache of layer `{name}` holds {self.max_seq} tokens: got {count} more after {self.length};"
                f" type `layer.init_cache(batch, {2 * self.max_seq})`"
            )
        if self.window and positions is not None and (positions.diff(dim=-1) < 1).any():
            raise ValueError(
                f"the cache of layer `{name}` is a ring of {self.window} tokens, which needs positions that grow: got"
                " `positions` that do not"
            )
        if batch != self.batch:
            raise ValueError(
                f"the cache of layer `{name}` is for {self.batch} sequences: got {batch}; type"
                f" `layer.init_cache({batch}, max_seq)`"
            )

    def states(self) -> tuple[Tensor, ...] | None:
        """What the seen tokens left to each linear attention."""
        kept = [kind for kind in self.kinds if kind != "new"]
        found = [t for t, kind in zip(self.tensors, kept, strict=True) if kind == "state"]
        return tuple(found) if found else None

    def extend(self, seen: Seen, new: tuple[Tensor | None, ...], count: int) -> tuple[tuple, Seen]:
        """Take in what the program computed of ``count`` new tokens.

        Returns everything that is held, in the order of ``new``, and what is seen now: positions and mask of the
        tokens held.
        """
        values, place = [], 0
        for kind, one in zip(self.kinds, new, strict=True):
            if kind == "append":
                values.append(self._append(self.tensors[place], one))
            else:
                values.append(one)
            if kind == "state":
                self.tensors[place] = one[:, :, -1].detach()
            place += kind != "new"
        if self.positions is not None:
            own = seen.context_position.expand(self.batch, -1)[:, None, :, None]
            seen = seen._replace(context_position=self._append(self.positions, own)[:, 0, :, 0])
        if self.index is not None:
            own = torch.arange(self.length, self.length + count, device=self.index.device)
            index = self._append(self.index, own[None, None, :, None]).flatten()
            if seen.visible is not None:
                seen = seen._replace(visible=seen.visible[..., index])
        full = self.length + count > self.room
        self.oldest = (self.oldest + 1) % self.room if full and count == 1 else 0
        self.length += count
        return tuple(values), seen

    def _append(self, tensor: Tensor, one: Tensor) -> Tensor:
        """Put new tokens behind those held, or in place of the oldest; returns all that the new ones may see."""
        held, count = min(self.length, self.room), one.shape[2]
        if held + count <= self.room:
            tensor[:, :, held : held + count] = one.detach()
            return tensor[:, :, : held + count]
        if count == 1:
            tensor[:, :, self.oldest : self.oldest + 1] = one.detach()
            return tensor
        both = torch.cat([tensor[:, :, :held].roll(-self.oldest, 2), one.to(tensor.dtype)], 2)
        tensor.copy_(both[:, :, -self.room :].detach())
        return both

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order, (B,) whole numbers, as a beam search does."""
        self.tensors = [t.index_select(0, rows.to(t.device)) for t in self.tensors]
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows.to(self.positions.device))

    def crop(self, length: int) -> None:
        """Forget all but the first tokens; ``ValueError`` where they cannot be told apart any more."""
        if self.has_states or self.length > self.room or not 0 <= length <= self.length:
            raise ValueError(
                f"a cache of {self.length} tokens cannot go back to {length}: a state or a ring has let go of the"
                " past, or it never was there; begin with `layer.init_cache(batch, max_seq)`"
            )
        self.length = length

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
    return Cache(decoding.kinds, new, max_seq, decoding.window, seen.context_position)


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
    cache.check(name, h.shape[:-2].numel(), count, **inputs)
    past = cache.past(count)
    dense = layer.dense or (decoding.counts and past > 0)
    h, g, seen = layer.reader(layer.norm, h, dense=dense, past=past, **inputs)
    values, seen = layer.values(), seen._replace(states=cache.states())
    new = decoding.context(g, g, *seen, *values)
    held, seen = cache.extend(seen, new, count)
    return h, LayerObjective(layer, g, g, seen, values, held, program=decoding.gradient)
