"""The fused attention kernels of torch, forward and backward, under one signature for every device.

Scores are scale * q.k + bias; ``bias`` is a float tensor that broadcasts to (B, H, T, S), or None. ``causal`` stands
for s <= t. Both directions need memory linear in T and S.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


def has_kernel(q: Tensor, k: Tensor) -> bool:
    """Whether there is a kernel for the device and the dtype; the one for CPUs divides by empty sizes."""
    fused = q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype != torch.float64)
    return fused and q.numel() > 0 and k.numel() > 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, T, V) and its log-sum-exp (B, H, T), the latter in float32 or wider."""
    width, bias = v.shape[-1], _laid_out(bias, q, k)
    if q.device.type == "cpu":
        q, k, v = _widened(q, k, v)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        # The kernel's log-sum-exp of scores that are NaN is a finite number.
        lse = torch.where(out[..., 0].isnan(), math.nan, lse)
    else:
        q, k, v = map(_aligned, (q, k, v))
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, causal, scale=scale
        )
    return out[..., :width], lse[..., : q.shape[-2]]


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for q, k and v, from P = exp(scores - lse) and dS = P * (grad_out.v - grad_out.out).

    ``out`` enters through its product with ``grad_out`` alone.
    """
    E, V, bias = q.shape[-1], v.shape[-1], _laid_out(bias, q, k)
    if q.device.type == "cpu":
        grad_out, q, k, v, out = _widened(grad_out, q, k, v, out)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    else:
        grad_out, q, k, v, out = map(_aligned, (grad_out, q, k, v, out))
        # The kernel reads rows of 32, and exp(scores - inf) is 0; without dropout the seed is not read.
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_out,
            q,
            k,
            v,
            bias,
            out,
            lse,
            seed,
            seed,
            0.0,
            [True] * 3 + [False],
            causal,
            scale=scale,
        )
    return dq[..., :E], dk[..., :E], dv[..., :V]


def _widened(*tensors: Tensor) -> list[Tensor]:
    """Columns of zeros, which change no product, up to one width for all."""
    width = max(t.shape[-1] for t in tensors)
    return [_padded(t, width) for t in tensors]


def _aligned(t: Tensor) -> Tensor:
    """Columns of zeros up to rows of 16 bytes in half precision."""
    return _padded(t, t.shape[-1] + -t.shape[-1] % 8)


def _padded(t: Tensor, width: int) -> Tensor:
    # The kernels read rows, and padding keeps the layout of its argument, which may be by columns.
    if t.shape[-1] < width:
        t = F.pad(t, (0, width - t.shape[-1]))
    return t if t.stride(-1) == 1 else t.contiguous()


def _laid_out(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias with four axes and, for CUDA, as (B, H, T, S) in rows of 16 numbers."""
    if bias is None:
        return None
    bias = bias.to(q.dtype)[(None,) * (4 - bias.dim())]
    if q.device.type == "cpu":
        return bias
    S = k.shape[-2]
    rows = F.pad(bias.expand(*bias.shape[:-1], S), (0, -S % 16))[..., :S]
    return rows.expand(*q.shape[:-1], S)
