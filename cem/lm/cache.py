"""A cache of transformers as the cache of an energy layer, and of one behind a router.

Legend: B batch, H heads, T new tokens, S tokens held, E features, K chosen tokens held.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from cem import Routed
from cem.inputs import Seen
from cem.routing import Choice
from cem.routing.rows import looks, stages_of

# transformers 5.24 calls the cache of a forward pass `cache`, earlier versions `past_key_values`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class HeldByTransformers:
    """One layer of a ``transformers.Cache`` with the methods of :class:`cem.cache.Cache`.

    Tied attention keeps one tensor: it is held as the keys (B, H, S, E), beside values (B, H, S, 0) without
    content. So every kind of cache that transformers has works as it does for any model: dynamic, static, offloaded,
    with the reordering of beams and the cropping of assisted decoding. States of linear attention are held by a
    :class:`MoreThanKeys` that takes the place of the layer.

    Args:
        cache: the cache of the model.
        index: of the layer of the cache.
        kinds: what the layer's program keeps, ``layer.lowering.decoding.kinds``.
        view: the :class:`~cem.lm.view.View` of the new tokens.

    Attributes:
        stateful: whether states are kept; what is looked at is then the new tokens alone.
        visible: which tokens are, as the layer takes it.
    """

    def __init__(self, cache, index: int, kinds: tuple[str, ...], view):
        self.cache, self.index, self.kinds = cache, index, kinds
        self.stateful = "state" in kinds
        self.seen, self.places = 0 if self.stateful else view.past, view.places
        self.visible = view.visible
        if self.stateful:
            hold_more(cache, index).length = view.seen + view.positions.shape[-1]
            self.visible = view.visible if view.pairs else view.padding

    def past(self, count: int) -> int:
        return self.seen

    def check(self, name: str, batch: int, count: int, *, visible=None, positions=None) -> None:
        if self.stateful and visible is not None and visible.dim() > 2:
            raise ValueError(
                f"layer `{name}` keeps one sum over the tokens it has seen, so all later ones see the same of them:"
                " got a mask for every pair with a cache; type `use_cache=False`"
            )

    def states(self) -> tuple[Tensor | None, ...] | None:
        if not self.stateful:
            return None
        return tuple(self.cache.layers[self.index].states or (None,) * self.kinds.count("state"))

    def extend(self, seen: Seen, new: tuple[Tensor | None, ...], count: int) -> tuple[tuple, Seen]:
        new_keys = [one for one, kind in zip(new, self.kinds, strict=True) if kind == "append"]
        if new_keys:
            held = iter(self.columns(appended(self.cache, self.index, new_keys), count))
        values = [
            next(held) if kind == "append" else one
            for one, kind in zip(new, self.kinds, strict=True)
        ]
        states = [one for one, kind in zip(new, self.kinds, strict=True) if kind == "state"]
        if states:
            self.cache.layers[self.index].states = [one[:, :, -1].detach() for one in states]
        if seen.context_position is not None and self.places is not None:
            seen = seen._replace(context_position=self.places.to(seen.context_position.dtype))
        return tuple(values), seen

    def columns(self, held: list[Tensor], count: int) -> list[Tensor]:
        """What the new tokens may look at of all that the cache gives back."""
        return held


class HeldRows(HeldByTransformers):
    """The same for a layer behind a router, whose columns are all tokens so far, or the chosen of them."""

    def __init__(self, cache, index: int, kinds: tuple[str, ...], view, chosen: bool):
        super().__init__(cache, index, kinds, view)
        self.memory, self.chosen = cache.layers[index], chosen and not self.stateful
        self.seen = 0 if self.stateful else view.seen

    def past(self, count: int) -> int:
        return self.memory.places.shape[1] - count if self.chosen else self.seen

    def columns(self, held: list[Tensor], count: int) -> list[Tensor]:
        stop = self.past(count) + count
        if self.places is not None:
            places = self.memory.places
            if self.chosen:
                self.places = self.places.expand(len(places), -1).gather(1, places.clamp(min=0))
            self.places = self.places[:, :stop]
        return [one[:, :, :stop] for one in held]  # a static cache has room to spare


class RoutedByTransformers:
    """One layer of a ``transformers.Cache`` with the methods of :class:`cem.routing.RoutedCache`.

    Keys are held as those of any layer, of all tokens or, with ``context="selected"``, of the chosen ones. The scores
    that a running threshold compares with, and which tokens were chosen, are held beside them by a
    :class:`MoreThanKeys`.

    Args:
        cache: the cache of the model.
        index: of the layer of the cache.
        name: of the part in its block, whose scores are its own.
        part: the routed part.
        view: the :class:`~cem.lm.view.View` of the new tokens.

    Attributes:
        layers: a :class:`HeldRows` for the layer of the part that looks at other tokens, None for the others.
        length: how many tokens were seen.
    """

    def __init__(self, cache, index: int, name: str, part: Routed, view):
        self.memory, self.name = hold_more(cache, index), name
        self.length = view.seen
        self.memory.length = view.seen + view.positions.shape[-1]
        self.compares = part.router.causal == "threshold"
        self.layers = [
            HeldRows(cache, index, stage.lowering.decoding.kinds, view, part.context == "selected")
            if looks(stage)
            else None
            for stage in stages_of(part.layer)
        ]

    def check(self, batch: int, count: int, given) -> None:
        """There is always room."""

    def scores_with(self, new: Tensor) -> Tensor:
        if not self.compares:
            return new
        scores, held = self.memory.scores, self.memory.scores.get(self.name)
        scores[self.name] = new if held is None else torch.cat([held, new], 1)
        return scores[self.name]

    def seen_with(self, choice: Choice, count: int) -> Tensor | None:
        held = next(filter(None, self.layers), None)
        if held is None:
            return None
        index, weight, present = choice
        if index is None:
            index = torch.arange(count, device=weight.device).expand_as(weight)
        places = self.length + index
        places = places if present is None else places.masked_fill(~present, -1)
        if not held.stateful:
            before = self.memory.places
            places = places if before is None else torch.cat([before, places], 1)
            self.memory.places = places
        seen = places >= 0
        return None if seen.all() else seen


def appended(cache, index: int, new: list[Tensor]) -> list[Tensor]:
    """All that a layer of a cache holds of each tensor: the new tokens (B, H, T, E) behind the earlier ones.

    One tensor is held as the keys, several side by side as the features of one head.
    """
    batch = max(len(one) for one in new)
    new = [one.expand(batch, -1, -1, -1) for one in new]
    if len(new) == 1:
        return [cache.update(new[0], new[0][..., :0], index)[0]]
    folded = torch.cat([one.transpose(1, 2).flatten(2) for one in new], -1)[:, None]
    held = cache.update(folded, folded[..., :0], index)[0][:, 0]
    shapes = [(one.shape[1], one.shape[3]) for one in new]
    parts = held.split([heads * features for heads, features in shapes], -1)
    return [
        part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)
    ]


def hold_more(cache, index: int) -> MoreThanKeys:
    """The :class:`MoreThanKeys` in the place of a layer of a ``transformers.Cache``, put there if there is none yet."""
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if not isinstance(cache.layers[index], MoreThanKeys):
        cache.layers[index] = MoreThanKeys(cache.layers[index])
    return cache.layers[index]


class MoreThanKeys(CacheLayerMixin):
    """A layer of a ``transformers.Cache`` that holds more than the keys of its tokens.

    Attributes:
        inner: the layer whose place it takes; it holds the keys.
        states: of linear attention, one tensor (B, H, ...) each, whose size does not grow.
        scores: by the name of a routed part, (B, S).
        places: which tokens the keys are of, whole numbers (B, K) with -1 for none; None where they are of all.
        length: how many tokens were seen.
    """

    is_sliding = False

    def __init__(self, inner: CacheLayerMixin) -> None:
        super().__init__()
        self.inner = inner
        self._clear()

    def _clear(self) -> None:
        self.states: list[Tensor] = []
        self.scores: dict[str, Tensor] = {}
        self.places: Tensor | None = None
        self.length = 0

    @property
    def is_croppable(self) -> bool:
        return not self.states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.inner.lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.inner.is_compileable:
            # Static: the other layers of the cache give back all that there is room for.
            return self.inner.get_mask_sizes(query_length)
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        self.inner.offload()

    def prefetch(self) -> None:
        self.inner.prefetch()

    def reset(self) -> None:
        self._clear()
        self.inner.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, a number below 0; above 0, as earlier versions have it, all but so many."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.length - tokens_to_remove
        if count <= 0:
            return
        if self.states:
            raise ValueError(
                "a state of linear attention cannot forget its last tokens: got `crop` on it; generate without an"
                " assistant"
            )
        self.length -= count
        self.scores = {name: scores[:, : self.length] for name, scores in self.scores.items()}
        if self.places is not None:
            places = self.places.masked_fill(self.places >= self.length, -1)
            filled = (places >= 0).any(0).nonzero()
            kept = int(filled[-1]) + 1 if len(filled) else 0
            count, self.places = places.shape[1] - kept, places[:, :kept]
        if self.inner.is_initialized:
            self.inner.crop(-count)

    def _map(self, function, inner: str, *arguments) -> None:
        self.states = [function(state) for state in self.states]
        self.scores = {name: function(scores) for name, scores in self.scores.items()}
        self.places = None if self.places is None else function(self.places)
        getattr(self.inner, inner)(*arguments)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda s: s.index_select(0, beam_idx.to(s.device)), "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda s: s.repeat_interleave(repeats, 0), "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda s: s[indices], "batch_select_indices", indices)
