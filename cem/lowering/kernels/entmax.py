"""Sparse weights and the maximum that they belong to, exactly, by sorting.

The support is found without derivatives. Given it, the threshold is a closed form of the scores, so
autograd differentiates weights and maximum as often as asked. Legend: S scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entmax(scores: Tensor, dim: int, alpha: float) -> Tensor:
    """max((alpha - 1) scores - tau, 0)^(1 / (alpha - 1)) along an axis, alpha 1.5 or 2; they sum to 1."""
    return _weights(scores, None, dim, alpha).to(scores.dtype)


def masked_entmax(scores: Tensor, visible: Tensor, dim: int, alpha: float) -> Tensor:
    """The weights of the visible scores of an axis; zeros where nothing is visible."""
    return _weights(scores, visible, dim, alpha).to(scores.dtype)


def entmax_conjugate(scores: Tensor, dim: int, alpha: float) -> Tensor:
    """max_p p.scores + (1 - sum p^alpha) / (alpha (alpha - 1)) along an axis, whose slopes are the weights."""
    return _maximum(scores, None, dim, alpha)


def masked_entmax_conjugate(scores: Tensor, visible: Tensor, dim: int, alpha: float) -> Tensor:
    """The maximum over the visible scores of an axis; 0 where nothing is visible."""
    found = _maximum(scores.masked_fill(~visible, 0.0), visible, dim, alpha)
    return found.masked_fill(~visible.any(dim), 0.0)


def _maximum(scores: Tensor, visible: Tensor | None, dim: int, alpha: float) -> Tensor:
    roots = _roots(scores, visible, dim, alpha)  # p^(alpha - 1)
    p = roots if alpha == 2 else roots.square()
    entropy = (1 - (p * roots).sum(dim)) / (alpha * (alpha - 1))
    return ((p * scores).sum(dim) + entropy).to(scores.dtype)


def _weights(scores: Tensor, visible: Tensor | None, dim: int, alpha: float) -> Tensor:
    roots = _roots(scores, visible, dim, alpha)
    return roots if alpha == 2 else roots.square()


def _roots(scores: Tensor, visible: Tensor | None, dim: int, alpha: float) -> Tensor:
    """max((alpha - 1) scores - tau, 0), in float32 at least."""
    z = (alpha - 1) * scores.to(torch.promote_types(scores.dtype, torch.float32))
    support = _support(z.detach(), visible, dim, alpha)
    count = support.sum(dim, keepdim=True, dtype=z.dtype).clamp_min(1)
    mean = torch.where(support, z, 0.0).sum(dim, keepdim=True) / count
    away = torch.where(support, z - mean, 0.0)
    if alpha == 2:
        gap = 1 / count
    else:
        gap = ((1 - away.square().sum(dim, keepdim=True)) / count).sqrt()
    return torch.where(support, away + gap, 0.0)


def _support(z: Tensor, visible: Tensor | None, dim: int, alpha: float) -> Tensor:
    """Where the weights are positive: the largest k scores, for the last k whose score exceeds its threshold."""
    if visible is not None:
        z = z.masked_fill(~visible, -math.inf)
    ordered = z.sort(dim, descending=True).values
    below = ordered - ordered.narrow(
        dim, 0, 1
    )  # from the largest down; NaN where nothing is visible
    shape = [-1 if axis == dim % z.dim() else 1 for axis in range(z.dim())]
    k = torch.arange(1, z.shape[dim] + 1, device=z.device, dtype=z.dtype).view(shape)
    mean = below.cumsum(dim) / k
    if alpha == 2:
        threshold = mean - 1 / k
    else:
        spread = below.square().cumsum(dim) - k * mean.square()
        threshold = mean - ((1 - spread) / k).clamp_min(0).sqrt()
    count = (below > threshold).sum(dim, keepdim=True).clamp_min(1)
    support = z >= ordered.gather(dim, count - 1)
    return support if visible is None else support & visible
