"""Attention whose log-sum-exp comes from the kernel too."""

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
