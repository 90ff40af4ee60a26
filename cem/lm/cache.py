"""A cache of transformers as the cache of an energy layer.

Legend: B batch, H heads, T new tokens, S tokens held, E features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from cem.inputs import Seen

# transformers 5.24 calls the cache of a forward pass `cache`, earlier versions `past_key_values`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class HeldByTransformers:
    """One layer of a ``transformers.Cache`` with the methods of :class:`cem.cache.Cache`.

    Tied attention keeps one tensor: it is held as the keys (B, H, S, E), beside values (B, H, S, 0) without
    content. So every kind of cache that transformers has works as it does for any model: dynamic, static, offloaded,
    with the reordering of beams and the cropping of assisted decoding. States of linear attention are held by a
    :class:`StateLayer` that takes the place of the layer.

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
            hold_states(cache, index)
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
            held = iter(appended(self.cache, self.index, new_keys))
        values = [
            next(held) if kind == "append" else one
            for one, kind in zip(new, self.kinds, strict=True)
        ]
        states = [one for one, kind in zip(new, self.kinds, strict=True) if kind == "state"]
        if states:
            layer = self.cache.layers[self.index]
            layer.length += count
            layer.states = [one[:, :, -1].detach() for one in states]
        if seen.context_position is not None and self.places is not None:
            seen = seen._replace(context_position=self.places.to(seen.context_position.dtype))
        return tuple(values), seen


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


def hold_states(cache, index: int) -> None:
    """Put a :class:`StateLayer` in the place of a layer of a ``transformers.Cache``, if there is none yet."""
    if not isinstance(cache.layers[index], StateLayer):
        cache.layers[index] = StateLayer(cache.layers[index])


class StateLayer(CacheLayerMixin):
    """A layer of a ``transformers.Cache`` that holds states of linear attention, whose size does not grow.

    Attributes:
        inner: the layer whose place it takes; it holds what does grow.
        states: one tensor (B, H, ...) a linear attention.
        length: how many tokens were seen.
    """

    is_sliding = False

    def __init__(self, inner: CacheLayerMixin) -> None:
        super().__init__()
        self.inner, self.states, self.length = inner, [], 0

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

    def reset(self) -> None:
        self.states, self.length = [], 0
        self.inner.reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a state of linear attention cannot forget its last tokens: got `crop` on it; generate without an"
                " assistant"
            )

    def _map(self, function, inner: str, *arguments) -> None:
        self.states = [function(state) for state in self.states]
        getattr(self.inner, inner)(*arguments)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda s: s.index_select(0, beam_idx.to(s.device)), "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda s: s.repeat_interleave(repeats, 0), "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda s: s[indices], "batch_select_indices", indices)
