"""The few functions that emitted programs call beside torch's own.

Legend: B batch, T tokens, S context tokens, H heads, E features.
``visible`` is a bool tensor of shape (B or 1, 1, T, S) or None; ``causal`` stands for s <= t where there is none (T
equal to S). At most one of them is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_with_logsumexp(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries (B, H, T, E) over keys and values (B, H, S, E), with its log sum exp (B, H, T).

    Both come from one fused kernel where torch returns the second. The log sum exp is not differentiable; for a
    token that sees nothing both are 0.
    """
    # The kernels read rows: called by their own names they do not look at the last stride.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if q.device.type == "cpu":
        bias = (
            None
            if visible is None
            else torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -math.inf)
        )
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    elif q.device.type == "cuda" and visible is None and q.dtype != torch.float64:
        # The kernel wants rows of 16 bytes; columns of zeros change no score.
        width = v.shape[-1]
        q, k, v = (F.pad(t, (0, -width % 8)) for t in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        out, lse = out[..., :width], lse[..., : q.shape[-2]]
    else:
        scores = (q @ k.transpose(-1, -2)) * scale
        if causal:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        lse = scores.logsumexp(-1)
        out = torch.softmax(scores, -1) @ v
    if visible is not None:
        empty = ~visible.any(-1)
        lse = lse.masked_fill(empty, 0.0)
        out = out.masked_fill(empty.unsqueeze(-1), 0.0)
    return out, lse.to(q.dtype)


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
