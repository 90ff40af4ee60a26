"""Attention under a mask or a bias in blocks, those left out that nothing sees: torch's ``flex_attention``."""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention as torch_flex

from ...visibility import Packed
from . import masked
from .attention import one_dtype, wants_gradient
from .grouped import grouped_attention

BLOCK = {"cpu": 64, "cuda": 128}
"""Tokens a block. Seconds forward at (4, 4, 2048, 64), documents of 341 tokens, float32, one thread of an AMD EPYC, for
blocks of 32, 64, 128, 256: 0.098, 0.092, 0.153, 0.254; 0.41 with a dense mask. On CUDA 128 is torch's own choice."""

LEAST = 128
"""Tokens from which on blocks can be left out."""

HAS_CPU = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and sys.platform != "darwin"
"""Whether torch has a kernel for this CPU."""


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | Packed | None,
    causal: bool,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention out_t = sum_s p_ts v_s under a mask or a bias, by ``flex_attention`` where that runs.

    It runs for whole sequences (T equal to S) from 128 tokens on: on CUDA, training included, but for float64, features
    below 16 and a bias that wants a gradient; and without gradients on CPUs with AVX2, in float32 and bfloat16, outside
    ``torch.compile``. Elsewhere, and where there is neither mask nor bias, it is torch's attention, with a dense mask.
    It is compiled once a shape, which takes seconds and, on a CPU, a C++ compiler; after as many shapes as
    ``torch._dynamo.config.recompile_limit`` the others take torch's attention.

    Args:
        q: queries (B, H, T, E).
        k, v: keys (B, H, S, E) and values (B, H, S, V); a divisor of H where heads share them.
        visible: bool (B or 1, H or 1, T, S), the documents of the tokens, or None.
        causal: s <= t, where there is no mask and T equals S.
        scale: the factor of the scores.
        bias: float, broadcastable to (B, H, T, S), added to the scaled scores.

    Returns:
        (B, H, T, V); 0 for a token that sees nothing.

    >>> v = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 4, 1)
    >>> documents = Packed(torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.bool), True)
    >>> flex_attention(0 * v, v, v, documents, False, 1.0).flatten().tolist()
    [1.0, 1.5, 3.0, 3.5]

    Source: FlexAttention (arXiv:2412.05496).
    """
    if (visible is not None or bias is not None) and runs(q, k, v, bias):
        try:
            return _flex(q, k, v, visible, causal, scale, bias)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            pass
    return _dense(q, k, v, visible, causal, scale, bias)


def runs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``flex_attention`` takes a call."""
    T, kind, dtype = q.shape[2], q.device.type, one_dtype(q)[0].dtype
    if T < LEAST or k.shape[2] != T or q.numel() == 0 or wants_gradient(bias):
        return False
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting():
        return False
    if kind == "cuda":
        return dtype != torch.float64 and min(q.shape[-1], v.shape[-1]) >= 16
    return (
        kind == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and HAS_CPU
        and not any(map(wants_gradient, (q, k, v)))
        and not torch.compiler.is_compiling()
    )


def _flex(q, k, v, visible, causal, scale, bias) -> Tensor:
    shape = (*q.shape[:3], k.shape[2])
    if visible is None and causal:
        one = torch.ones(1, shape[-1], dtype=torch.bool, device=q.device)
        visible = Packed(one, one, True)
    training = any(map(wants_gradient, (q, k, v)))
    block_mask = None if visible is None else _block_mask(visible, shape, training)
    shared = v is k
    q, k, v = one_dtype(q, k, v)
    run = torch_flex.flex_attention if torch.compiler.is_compiling() else _compiled(q.device.type)
    return run(
        *(q, k, k if shared else v),
        score_mod=None if bias is None else _added(bias.expand(shape)),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


@cache
def _compiled(kind: str):
    # The kernel for CPUs does not compile for sizes that vary.
    dynamic = False if kind == "cpu" else None
    return torch.compile(torch_flex.flex_attention, fullgraph=True, dynamic=dynamic)


def _added(bias: Tensor):
    return lambda score, b, h, t, s: score + bias[b, h, t, s]


def _block_mask(visible: Tensor | Packed, shape: tuple[int, ...], training: bool):
    size = BLOCK[visible[0].device.type]
    if isinstance(visible, Packed):
        some, full, holds = _packed_blocks(visible, shape[0], size)
    else:
        tiles = F.pad(visible, (0, -shape[3] % size, 0, -shape[2] % size))
        tiles = tiles.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        some, full = tiles.any(5).any(3), tiles.all(5).all(3)
        holds = _looked_up(visible.expand(shape))
    return torch_flex.BlockMask.from_kv_blocks(
        *(*_listed(some & ~full), *_listed(full)),
        BLOCK_SIZE=size,
        mask_mod=holds,
        seq_lengths=shape[2:],
        compute_q_blocks=training,
    )


def _looked_up(visible: Tensor):
    return lambda b, h, t, s: visible[b, h, t, s]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries meets, and which, those first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def _packed_blocks(visible: Packed, batch: int, size: int):
    """Blocks of pairs that may be seen and those seen in full, (B or 1, 1, N, N), and what decides about a pair."""
    documents, present, causal = visible
    T = documents.shape[-1]
    last = torch.arange(T + -T % size, device=documents.device).clamp_max(T - 1)
    tiles = documents[:, last].unflatten(1, (-1, size))
    low, high = tiles.amin(2), tiles.amax(2)
    single = low == high
    held = F.pad(present, (0, -T % size)).unflatten(1, (-1, size))
    some = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    full = some & single[:, :, None] & single[:, None] & held.all(2)[:, None]
    full[:, T // size :] = False  # queries past the end
    some = some & held.any(2)[:, None]
    if causal:
        past = torch.ones(some.shape[1:], dtype=torch.bool, device=some.device)
        some, full = some & past.tril(), full & past.tril(-1)
    documents, present = documents.expand(batch, T), present.expand(batch, T)

    def holds(b, h, t, s):
        own = (documents[b, t] == documents[b, s]) & present[b, s]
        return own & (s <= t) if causal else own

    return some[:, None], full[:, None], holds


def _dense(q, k, v, visible, causal, scale, bias) -> Tensor:
    if isinstance(visible, Packed):
        visible = visible.dense()
    grouped = q.shape[1] != k.shape[1]
    if grouped and bias is None:
        return grouped_attention(q, k, v, visible, causal, scale)
    if bias is not None:
        visible, causal = masked.bias(visible, causal, bias), False
    options = {"enable_gqa": True} if grouped else {}
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=causal, scale=scale, **options
    )
