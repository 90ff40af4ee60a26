"""Attention of P queries for each group of keys, (B, G * P, T, E) over (B, G, S, E), with keys never repeated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import one_dtype
from .masked import masked_softmax

HALF = (torch.bfloat16, torch.float16)


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Attention in which query head a reads the keys and values of head a // P, where P = query heads / key heads.

    One token goes to :func:`decode_attention`. More go to torch's kernel with groups; where CUDA has none (float32, or
    a mask), to one call for each of the P.

    Args:
        q: queries (B, G * P, T, E).
        k, v: keys (B, G, S, E) and values (B, G, S, V); V equal to E for a fused kernel on the CPU.
        visible: bool (B or 1, 1, T, S), or None.
        causal: s <= t, where there is no mask and T equals S.
        scale: the factor of the scores.

    Returns:
        (B, G * P, T, V); 0 for a token that sees nothing.

    >>> q, k = torch.zeros(1, 4, 2, 3), torch.ones(1, 2, 2, 3)
    >>> grouped_attention(q, k, k, None, True, 1.0).shape
    torch.Size([1, 4, 2, 3])

    Source: grouped-query attention (arXiv:2305.13245).
    """
    if q.shape[-2] == 1:
        return decode_attention(q, k, v, visible, scale)
    if q.is_cuda and (q.dtype not in HALF or visible is not None):
        rows = q.unflatten(1, (k.shape[1], -1)).unbind(2)
        parts = [visible_attention(row, k, v, visible, causal, scale) for row in rows]
        return torch.stack(parts, 2).flatten(1, 2)
    return visible_attention(q, k, v, visible, causal, scale)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """Attention of one new token over a long context, which is bound by reading it: see :func:`grouped_attention`.

    The P queries of a group are rows against the same keys, so each key is read once, and with ``v is k`` so is each
    value: the fused kernel goes block by block, and finds the values in the cache where it left the keys. The kernel
    for the CPU is slow on few rows in half precision, so there it is two products.

    Args:
        q: queries (B, G * P, 1, E).
        k, v: keys (B, G, S, E) and values (B, G, S, V), fastest where each head is contiguous.
        visible: bool (B or 1, 1, 1, S), or None.
        scale: the factor of the scores.

    Returns:
        (B, G * P, 1, V); 0 for a token that sees nothing.

    >>> q, k = torch.zeros(1, 1, 1, 1), torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1)
    >>> decode_attention(q, k, k, None, 1.0).item()
    2.0
    """
    q, k, v = one_dtype(q, k, v)
    rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (B, G, P, E)
    if q.device.type == "cpu" and q.dtype in HALF:
        scores = (rows @ k.transpose(-1, -2)) * scale
        if visible is None:
            out = torch.softmax(scores, -1) @ v
        else:
            out = masked_softmax(scores, visible, -1) @ v
    else:
        out = visible_attention(rows, k, v, visible, False, scale)
    return out.flatten(1, 2).unsqueeze(2)


def visible_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Torch's attention, with groups where there are more queries than keys, and zeros where nothing is visible."""
    some = None if visible is None else visible.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if some is None else visible | ~some,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out if some is None else out.masked_fill(~some, 0.0)
