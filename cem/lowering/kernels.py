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
    token that sees nothing both are 0. ``visible`` may also be a bias of the scores.
    """
    if k.shape[1] < q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if q.device.type == "cpu":
        bias = visible
        if visible is not None and visible.dtype == torch.bool:
            bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -math.inf)
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
        if visible is not None and visible.dtype == torch.bool:
            scores = scores.masked_fill(~visible, -math.inf)
        elif visible is not None:
            scores = scores + visible
        lse = scores.logsumexp(-1)
        out = torch.softmax(scores, -1) @ v
    if visible is not None:
        seen = visible if visible.dtype == torch.bool else visible > -math.inf
        empty = ~seen.any(-1)
        lse = lse.masked_fill(empty, 0.0)
        out = out.masked_fill(empty.unsqueeze(-1), 0.0)
    return out, lse.to(q.dtype)


def zero_unseen(values: Tensor, visible: Tensor | None) -> Tensor:
    """Values (B, H, T) with zeros where a token sees nothing by a mask or a bias (B or 1, H or 1, T, S)."""
    if visible is None:
        return values
    some = visible if visible.dtype == torch.bool else visible > -math.inf
    return values.masked_fill(~some.any(-1), 0.0)


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


def seen(visible: Tensor | None, causal: bool, holds: Tensor) -> Tensor:
    """The visible tokens for which a condition (B or 1, H or 1, T, S) holds, as a mask."""
    if visible is not None:
        return visible & holds
    return holds.tril() if causal else holds


def bias(visible: Tensor | None, causal: bool, bias: Tensor) -> Tensor:
    """A bias of scores (B or 1, H or 1, T, S) with minus infinity where nothing is visible."""
    if visible is not None:
        return bias.masked_fill(~visible, -math.inf)
    if causal:
        hidden = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
        return bias.masked_fill(hidden, -math.inf)
    return bias


def settled(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers made of positions (B or 1, ...) in the type of ``like``, one row a sequence."""
    return numbers.to(like.dtype).expand(like.shape[0], *numbers.shape[1:])


def exact_parts(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers (B or 1, ...) as three columns (B, ..., 3) of the type of ``like`` with the digits of float32."""
    parts = []
    for _ in range(3):
        part = numbers.to(like.dtype)
        parts.append(part)
        numbers = numbers - part.to(numbers.dtype)
    columns = torch.stack(parts, -1)
    return columns.expand(like.shape[0], *columns.shape[1:])


def lookup(array: Tensor, number: Tensor) -> Tensor:
    """The last axis of an array (..., N) read at whole numbers (*shape), clamped: (..., *shape)."""
    return array[..., number.floor().long().clamp(0, array.shape[-1] - 1)]


def turns(
    position: Tensor, frequencies: tuple[float, ...] | float, size: int, like: Tensor
) -> Tensor:
    """Cosines and sines of position (...) times frequency, (..., 2, n), in the type of ``like``.

    ``frequencies`` may be the base b of n = size/2 frequencies b^(-2i/size). Angles are float32 at least.
    """
    if isinstance(frequencies, tuple):
        rates = torch.tensor(frequencies, dtype=position.dtype, device=position.device)
    else:
        powers = torch.arange(0, size, 2, dtype=position.dtype, device=position.device) / -size
        rates = frequencies**powers
    angle = position.unsqueeze(-1) * rates
    return torch.stack((angle.cos(), angle.sin()), -2).to(like.dtype)


def rotate(value: Tensor, turns: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """The first 2 n coordinates of (..., R) turned in pairs, by minus the angle for the inverse."""
    cos, sin = turns.unbind(-2)
    count, sign = cos.shape[-1], -1 if inverse else 1
    if interleaved:
        u, v = value[..., : 2 * count].unflatten(-1, (count, 2)).unbind(-1)
    else:
        u, v = value[..., :count], value[..., count : 2 * count]
    pair = [torch.addcmul(u * cos, v, sin, value=-sign), torch.addcmul(v * cos, u, sin, value=sign)]
    if interleaved:
        pair = [torch.stack(pair, -1).flatten(-2)]
    if 2 * count < value.shape[-1]:
        pair.append(value[..., 2 * count :].expand(*pair[0].shape[:-1], -1))
    return pair[0] if len(pair) == 1 else torch.cat(pair, -1)
