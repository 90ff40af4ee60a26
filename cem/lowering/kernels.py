"""The few functions that emitted programs call beside torch's own.

Legend: B batch, T tokens, S context tokens, H heads, E features.
``visible`` is a bool tensor of shape (B or 1, 1, T, S) or None, ``causal`` adds s <= t (T equal to S).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Attention of queries (B, H, T, E) over keys and values (B, H, S, E), by the fused kernel.

    A token that sees nothing gets zeros.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=scale)


def attention_with_logsumexp(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention together with its log sum exp (B, H, T), from the kernel where torch returns it.

    The log sum exp is not differentiable; it is 0 for a token that sees nothing.
    """
    if q.device.type == "cpu":
        bias = None
        if visible is not None:
            bias = torch.zeros((), dtype=q.dtype).masked_fill(~visible, -math.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        lse = lse.to(q.dtype)
    elif q.device.type == "cuda" and q.dtype != torch.float64 and not torch.is_grad_enabled():
        bias = None
        if visible is not None:
            bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~visible, -math.inf)
            bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, causal, scale=scale
        )
        lse = lse[..., : q.shape[-2]]
    else:
        scores = (q @ k.transpose(-1, -2)) * scale
        seen = allowed(scores, visible, causal)
        lse = scores.masked_fill(~seen, -math.inf).logsumexp(-1)
        out = torch.exp(scores.masked_fill(~seen, -math.inf) - lse.unsqueeze(-1)) @ v
    if visible is not None:
        empty = ~visible.any(-1)
        lse = lse.masked_fill(empty, 0.0)
        out = out.masked_fill(empty.unsqueeze(-1), 0.0)
    return out, lse


def allowed(scores: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
    """The visible set as a dense mask that broadcasts to scores (B, H, T, S)."""
    if visible is None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        return visible.tril() if causal else visible
    return visible


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


def masked_sum(terms: Tensor, visible: Tensor, dim: int) -> Tensor:
    """Sum over the visible entries of an axis."""
    return terms.masked_fill(~visible, 0.0).sum(dim)
