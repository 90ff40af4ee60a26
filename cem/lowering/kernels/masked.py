"""Softmax, log-sum-exp and plain values where some entries are not visible.

Legend: B batch, T tokens, S context tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def zero_unseen(values: Tensor, visible: Tensor | None, axis: int) -> Tensor:
    """Values with the batch in front and tokens at ``axis``, with zeros for the tokens that see nothing."""
    if visible is None:
        return values
    empty = ~visible.any(-1)
    shape = [1] * values.dim()
    shape[0], shape[axis] = empty.shape[0], empty.shape[-1]
    return values.masked_fill(empty.view(shape), 0.0)


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
