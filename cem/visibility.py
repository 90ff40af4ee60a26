"""The visible set: which context tokens a token may look at.

Legend: B batch, T tokens, S context tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """The visible set of packed documents with padding, from numbers of the tokens alone: T equals S.

    Attributes:
        documents: (B or 1, T), a number a document; a token sees its own.
        present: bool (B or 1, T), False for padding, which nothing sees.
        causal: also s <= t.
    """

    documents: Tensor
    present: Tensor
    causal: bool

    def dense(self) -> Tensor:
        """The same as a bool tensor (B or 1, 1, T, T).

        >>> one = torch.ones(1, 2, dtype=torch.bool)
        >>> Packed(torch.tensor([[4, 7]]), one, True).dense().int().tolist()
        [[[[1, 0], [0, 1]]]]
        """
        mask = self.documents.unsqueeze(-1) == self.documents.unsqueeze(-2)
        mask = mask & self.present.unsqueeze(-2)
        return (mask.tril() if self.causal else mask).unsqueeze(1)


def packed(
    visible: Tensor | None,
    lead: Sequence[int],
    T: int,
    *,
    causal: bool,
    device: torch.device | str,
    name: str,
    document_ids: Tensor | None = None,
) -> Packed:
    """The visible set of T tokens in themselves as :class:`Packed`; ``visible`` is (*lead, T) or None."""
    documents = present = torch.ones(1, T, dtype=torch.bool, device=device)
    if visible is not None:
        present = _as_pairs(visible, tuple(lead), T, T, name)[:, 0]
    if document_ids is not None:
        documents = _documents(document_ids, tuple(lead), T, T, name)
    return Packed(documents, present, causal)


def visible_mask(
    visible: Tensor | None,
    lead: Sequence[int],
    T: int,
    S: int,
    *,
    causal: bool,
    device: torch.device | str,
    name: str,
    document_ids: Tensor | None = None,
) -> Tensor:
    """The visible set as a bool tensor (B or 1, 1, T, S).

    Args:
        visible: bool, (*lead, S) for padding or (*lead, T, S), or None for everything; an axis may be 1.
        lead: the leading sizes of the state, whose product is B.
        causal: also s <= t + S - T: the T tokens are the last of the S context tokens.
        name: the energy, for messages.
        document_ids: (*lead, S), a number a document: tokens of packed documents do not see each other.
            The T tokens are the last of the S.

    Raises:
        ValueError: a mask of another shape.
        TypeError: a mask that is not bool.

    >>> visible_mask(None, (1,), 2, 3, causal=True, device="cpu", name="e").int().tolist()
    [[[[1, 1, 0], [1, 1, 1]]]]
    """
    everything = torch.ones(1, T, S, dtype=torch.bool, device=device)
    mask = everything.tril(S - T) if causal else everything
    if visible is not None:
        own = _as_pairs(visible, tuple(lead), T, S, name)
        mask = mask & own if causal else own
    if document_ids is not None:
        ids = _documents(document_ids, tuple(lead), T, S, name)
        mask = mask & (ids[:, S - T :, None] == ids[:, None, :])
    return mask.unsqueeze(1)


def _documents(ids: Tensor, lead: tuple[int, ...], T: int, S: int, name: str) -> Tensor:
    """A user's numbers of documents as (B or 1, S)."""
    fits = all(size in (1, full) for size, full in zip(ids.shape[:-1], lead, strict=False))
    if ids.shape[-1:] != (S,) or ids.dim() not in (1, len(lead) + 1) or not fits or S < T:
        raise ValueError(
            f"layer `{name}`: `document_ids` must have shape {(S,)} or {(*lead, S)}: got {tuple(ids.shape)}"
        )
    shared = all(size == 1 for size in ids.shape[:-1])
    return ids.reshape(1, S) if shared else ids.expand(*lead, S).reshape(-1, S)


def _as_pairs(visible: Tensor, lead: tuple[int, ...], T: int, S: int, name: str) -> Tensor:
    """A user's mask as (B or 1, T, S)."""
    if visible.dtype != torch.bool:
        raise TypeError(
            f"layer `{name}`: `visible` must be bool: got {visible.dtype}; type `mask.bool()`"
        )
    pairs = visible
    if visible.dim() == len(lead) + 1 and visible.shape[-1] == S:
        pairs = visible.unsqueeze(-2)
    fits = all(size in (1, full) for size, full in zip(pairs.shape, (*lead, T, S), strict=False))
    if pairs.dim() != len(lead) + 2 or pairs.shape[-1] != S or not fits:
        raise ValueError(
            f"layer `{name}`: `visible` must have shape {(*lead, S)} or {(*lead, T, S)}: got"
            f" {tuple(visible.shape)}; type `mask[None]` for one mask for all"
        )
    # One mask for all sequences stays one.
    lead = lead if any(size > 1 for size in pairs.shape[:-2]) else (1,) * len(lead)
    return pairs.expand(*lead, T, S).reshape(-1, T, S)
