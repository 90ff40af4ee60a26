"""Softmax, log-sum-exp and plain values where some entries are not visible.

Legend: B batch, T tokens, S context tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def seen(visible: Tensor | None, causal: bool, holds: Tensor) -> Tensor:
    """The visible tokens for which a condition (B or 1, H or 1, T, S) holds, as a mask."""
    if visible is not None:
        return visible & holds
    return holds.tril() if causal else holds


def visible_count(visible: Tensor | None, causal: bool, h: Tensor, x: Tensor) -> Tensor:
    """How many tokens of the context x (B, S, D) each token of h (B, T, D) sees, (B or 1, T), in the type of h."""
    if visible is not None:
        return visible.squeeze(1).sum(-1).to(h.dtype)
    if causal:
        return torch.arange(1, h.shape[1] + 1, dtype=h.dtype, device=h.device)[None]
    return h.new_full((1, h.shape[1]), x.shape[1])


def bias(visible: Tensor | None, causal: bool, bias: Tensor) -> Tensor:
    """A bias of scores (B or 1, H or 1, T, S) with minus infinity where nothing is visible."""
    if visible is not None:
        return bias.masked_fill(~visible, -math.inf)
    if causal:
        hidden = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
        return bias.masked_fill(hidden, -math.inf)
    return bias


def zero_unseen(values: Tensor, visible: Tensor | None) -> Tensor:
    """Values (B, H, T) with zeros where a token sees nothing by a mask (B or 1, H or 1, T, S)."""
    return values if visible is None else values.masked_fill(~visible.any(-1), 0.0)


def one_unseen(values: Tensor, visible: Tensor) -> Tensor:
    """Values with ones where nothing is visible."""
    return torch.where(visible, values, 1.0)


def masked_softmax(scores: Tensor, visible: Tensor, dim: int) -> Tensor:
    """Softmax over the visible entries of an axis; zeros where nothing is visible."""
    some = visible.any(dim, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~visible & some, -math.inf), dim)
    return weights.masked_fill(~visible, 0.0)


def masked_logsumexp(scores: Tensor, visible: Tensor, dim: int) -> Tensor:
    """log sum exp over the visible entries of an axis; 0 where nothing is visible."""
    some = visible.any(dim, keepdim=True)
    value = torch.logsumexp(scores.masked_fill(~visible & some, -math.inf), dim)
    return value.masked_fill(~some.squeeze(dim), 0.0)
