"""What a decoder keeps of a routed layer: the caches of its layers, and the scores so far.

Legend: B batch, T new tokens, S tokens held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import Cache
from ..layer import EnergyLayer
from .router import Choice
from .rows import Given, looks, stages_of


class RoutedCache:
    """The memory of one routed layer; made by :meth:`cem.Routed.init_cache`.

    Attributes:
        layers: the :class:`~cem.cache.Cache` of every layer of the stack, None for those that look at no others.
        length: how many tokens were seen.
        max_seq: how many may be.
        nbytes: the size of all tensors.
    """

    def __init__(
        self,
        layers: list[Cache | None],
        max_seq: int,
        scores: Tensor | None,
        present: Tensor | None,
    ) -> None:
        self.layers, self.max_seq, self.length, self.held = layers, max_seq, 0, 0
        self.scores, self.present = scores, present

    @property
    def nbytes(self) -> int:
        own = [tensor.nbytes for tensor in (self.scores, self.present) if tensor is not None]
        return sum(own) + sum(layer.nbytes for layer in self.layers if layer is not None)

    def check(self, batch: int, count: int, given: Given) -> None:
        """Refuse, with ``ValueError``, what cannot be taken in."""
        if self.length + count > self.max_seq:
            raise ValueError(
                f"the cache of a routed layer holds {self.max_seq} tokens: got {count} more after {self.length}; type"
                f" `routed.init_cache(batch, {2 * self.max_seq})`"
            )
        for name in ("context", "documents"):
            if getattr(given, name) is not None:
                raise ValueError(
                    f"a routed layer takes its context from the cache: got `{name}`; call it without"
                )

    def scores_with(self, new: Tensor) -> Tensor:
        """All scores so far, (B, S), with those of new tokens (B, T); the new ones alone where none are kept."""
        if self.scores is None:
            return new
        stop = self.length + new.shape[1]
        self.scores[:, self.length : stop] = new.detach()
        return self.scores[:, :stop]

    def seen_with(self, choice: Choice, count: int) -> Tensor | None:
        """Which columns the chosen tokens may see, (B, held), with those of the choice among ``count`` new tokens."""
        start = self.held
        self.held += count if choice.index is None else choice.index.shape[1]
        if self.present is None:
            return None
        self.present[:, start : self.held] = True if choice.present is None else choice.present
        seen = self.present[:, : self.held]
        return None if seen.all() else seen

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order, (B,) whole numbers, as a beam search does."""
        for layer in self.layers:
            if layer is not None:
                layer.reorder(rows)
        self.scores, self.present = (
            None if tensor is None else tensor.index_select(0, rows.to(tensor.device))
            for tensor in (self.scores, self.present)
        )

    def __repr__(self) -> str:
        return f"RoutedCache(length={self.length}, max_seq={self.max_seq}, nbytes={self.nbytes})"


def new_cache(routed, batch: int, max_seq: int) -> RoutedCache:
    """See :meth:`cem.Routed.init_cache`."""
    router, stages = routed.router, stages_of(routed.layer)
    if router.causal is None:
        raise ValueError(
            "a routed layer that chooses from a whole sequence cannot be decoded: got causal=None; type"
            ' `Routed(..., causal="threshold")`'
        )
    for stage in stages:
        if not isinstance(stage, EnergyLayer):
            raise ValueError(
                f"a routed {type(stage).__name__} may look at other tokens, and nothing says what it would keep of"
                " them: call it without `cache`"
            )
    if routed.scored == "energy" and looks(stages[0]):
        raise ValueError(
            f"energies of `{stages[0].energy_function.name}` as scores need all tokens anew: call it without `cache`"
        )
    layers = [stage.init_cache(batch, max_seq) if looks(stage) else None for stage in stages]
    scores = present = None
    like = next(routed.parameters())
    if router.causal == "threshold":
        dtype = torch.promote_types(like.dtype, torch.float32)
        scores = torch.zeros(batch, max_seq, dtype=dtype, device=like.device)
    if routed.context == "selected" and batch > 1:
        for layer in filter(None, layers):
            if layer.window is not None or layer.has_states:
                raise ValueError(
                    "sequences that choose different tokens do not share a ring or a sum over what was seen: got"
                    f' batch={batch}; decode them one by one, or type `context="all"`'
                )
        present = torch.zeros(batch, max_seq, dtype=torch.bool, device=like.device)
    return RoutedCache(layers, max_seq, scores, present)
