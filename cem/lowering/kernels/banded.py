"""Causal attention to the last few tokens, in blocks: time linear in the sequence, no T x S anywhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attend, one_dtype
from .flex import flex_attention
from .masked import seen

BLOCK = 64
"""Least queries a block; from 4 * BLOCK on, a quarter of the window. Seconds forward and backward at (1, 4, 4096, 64),
float32, one thread of an AMD EPYC, for blocks of 64, 128, 256, 512: 0.05, 0.06, 0.08, 0.13 with a window of 64; 0.11,
0.10, 0.11, 0.17 with 256; 0.32, 0.26, 0.26, 0.29 with 1024. Causal attention takes 0.43, a dense mask 0.86."""


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, sinks: int = 0
) -> Tensor:
    """Attention in which token t sees the s with t - window < s <= t, and the first ``sinks`` tokens up to t.

    The first ``window`` tokens are plain causal attention. After them every block of queries meets its own keys and
    the ``window`` before it, which are a view of the keys under one small mask for all blocks. The sinks outside the
    window are attended on their own and joined by the two log-sum-exps.

    Args:
        q: queries (B, H, T, E).
        k, v: keys (B, H, T, E) and values (B, H, T, V); one tensor for both is laid out once.
        window: the visible tokens, t itself among them; from T on it is causal attention.
        scale: the factor of the scores.
        sinks: how many first tokens stay visible.

    Returns:
        (B, H, T, V).

    Raises:
        ValueError: a window below 1 or sinks below 0.

    >>> v = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 4, 1)
    >>> banded_attention(v, 0 * v, v, window=2, scale=1.0).flatten().tolist()
    [1.0, 1.5, 2.5, 3.5]

    Source: Longformer (arXiv:2004.05150) for the window, StreamingLLM (arXiv:2309.17453) for the sinks.
    """
    if window < 1 or sinks < 0:
        raise ValueError(
            "banded attention needs a window of at least 1 and sinks of at least 0: got"
            f" window={window} and sinks={sinks}; type `window=1` for the token alone"
        )
    shared = v is k
    q, k, v = one_dtype(q, k, v)
    v = k if shared else v
    lead, later = q.shape[:2], q.shape[2] - window
    start = slice(None, window)
    first, _ = attend(q[:, :, start], k[:, :, start], v[:, :, start], None, True, scale)
    if later <= 0:
        return first
    q = q[:, :, window:]
    size = max(BLOCK, window // 4)
    queries = _spans(q, size, size)  # (B * H, N, size, E)
    keys = _spans(k, window + size, size)  # (B * H, N, window + size, E)
    values = keys if shared else _spans(v, window + size, size)
    t = torch.arange(window, window + size, device=q.device).unsqueeze(-1)
    s = torch.arange(window + size, device=q.device)
    band = ((s <= t) & (s > t - window))[None, None]
    out, lse = attend(queries, keys, values, band, False, scale)
    out = out.unflatten(0, lead).flatten(2, 3)[:, :, :later]
    lse = lse.unflatten(0, lead).flatten(2, 3)[:, :, :later]
    if sinks:
        t = torch.arange(later, device=q.device).unsqueeze(-1)
        outside = (torch.arange(min(sinks, later), device=q.device) <= t)[None, None]
        k, v = k[:, :, : outside.shape[-1]], v[:, :, : outside.shape[-1]]
        sunk, sunk_lse = attend(q, k, v, outside, False, scale)
        share = torch.sigmoid(sunk_lse - lse).unsqueeze(-1).to(out.dtype)
        out = out + share * (sunk - out)
    return torch.cat([first, out], 2)


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    causal: bool,
    ordered: bool,
    position: Tensor,
    context_position: Tensor,
    window: int,
    sinks: int,
    scale: float,
    flex: bool = False,
) -> Tensor:
    """Attention to tokens at a distance of positions below ``window``, and to those at positions below ``sinks``.

    Where the tokens are a whole sequence in order, which ``ordered`` says, it is :func:`banded_attention`; elsewhere
    a mask of all pairs, in blocks if ``flex``.

    Args:
        visible, causal: as in the other kernels.
        position: those of the queries, (B or 1, T).
        context_position: those of the keys, (B or 1, S).
    """
    if ordered and causal and visible is None and window < q.shape[2]:
        return banded_attention(q, k, v, window, scale, sinks)
    holds = position.unsqueeze(-1) - context_position.unsqueeze(-2) < window
    if sinks:
        holds = holds | (context_position < sinks).unsqueeze(-2)
    mask = seen(visible, causal, holds.unsqueeze(1))
    if flex:
        return flex_attention(q, k, v, mask, False, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _spans(t: Tensor, length: int, step: int) -> Tensor:
    """Overlapping stretches (B * H, N, length, width) of (B, H, T, width), a view but for zeros after the end."""
    flat = t.flatten(0, 1)
    padded = F.pad(flat, (0, 0, 0, -(flat.shape[1] - length) % step))
    return padded.unfold(1, length, step).transpose(-1, -2)
