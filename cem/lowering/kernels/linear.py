"""Linear attention, with decay and a recurrent state, in chunks: time and memory linear in the sequence.

No positive number is ever exponentiated where s <= t, and a log decay of -inf, a reset, is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
"""Tokens a chunk. Seconds forward and backward with and without decay, at (1, 4, 4096, 64) in float32, one thread of an
AMD EPYC with 1 MiB of L2: 0.063 and 0.075 for 32, 0.076 and 0.054 for 64, 0.099 and 0.062 for 128."""


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    state: Tensor | None = None,
) -> Tensor:
    """out_t = sum_s exp(D_ts) (q_t.k_s) v_s + exp(D_t) q_t.state, with D_ts the sum of ``log_decay`` after s.

    The sums run over the tokens that are visible and, when causal, at most t; D_t is that over all of them. The T
    tokens are the last of the S of the context. Causal attention of a sequence over itself goes chunk by chunk,
    attention without order and without decay is two products; anything else, a mask with a row for each token among
    it, takes the dense product of T x S.

    Args:
        q: queries (B, H, T, E).
        k, v: keys (B, H, S, E) and values (B, H, S, V).
        log_decay: (B or 1, H or 1, S), at most 0: what of the past is kept at each context token; None keeps all.
        visible: bool (B or 1, 1, T or 1, S), or None.
        causal: s <= t + S - T, besides ``visible``.
        state: (B, H, E, V), the sum over everything before the first context token.

    Returns:
        (B, H, T, V).

    >>> q = k = torch.ones(1, 1, 3, 1)
    >>> v = torch.tensor([1.0, 10.0, 100.0]).reshape(1, 1, 3, 1)
    >>> linear_attention(q, k, v, torch.full((1, 1, 3), 0.5).log()).flatten().tolist()
    [1.0, 10.5, 105.25]

    Source: Linear Transformers (arXiv:2006.16236); chunks and decay as in Mamba-2 (arXiv:2405.21060, section 6).
    """
    T, S = q.shape[-2], k.shape[-2]
    if visible is not None and visible.shape[-2] == 1:
        (k, log_decay), visible = _unhidden(k, log_decay, visible), None
    if visible is None and causal and T == S:
        return linear_recall(q, k, v, log_decay, linear_memory(k, v, log_decay, state))
    if visible is None and not causal and log_decay is None:
        return q @ linear_memory(k, v, None, state)[:, :, -1].to(q.dtype)
    return _dense(q, k, v, log_decay, visible, causal, state)


def linear_context(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    visible: Tensor | None,
    causal: bool,
    states: Sequence[Tensor | None] | None,
    number: int,
) -> Tensor | None:
    """What :func:`linear_recalled` can know of the context alone, or None where it takes the dense product.

    ``states`` are what earlier tokens left, this one's at ``number``; with them the context is the tokens that came
    after. A mask then hides those that the last of them does not see: padding, and nothing else.
    """
    if states is not None:
        k, log_decay = _unhidden(k, log_decay, visible)
        return linear_memory(k, v, log_decay, states[number])
    if visible is None and (causal or log_decay is None):
        return linear_memory(k, v, log_decay)
    return None


def linear_recalled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    visible: Tensor | None,
    causal: bool,
    states: Sequence[Tensor | None] | None,
    memory: Tensor | None,
) -> Tensor:
    """:func:`linear_attention` from the ``memory`` of :func:`linear_context`."""
    if states is not None:
        k, log_decay = _unhidden(k, log_decay, visible)
    if states is not None or (memory is not None and causal):
        return linear_recall(q, k, v, log_decay, memory)
    if memory is not None:
        return q @ memory[:, :, -1].to(q.dtype)
    return linear_attention(q, k, v, log_decay, visible, causal)


def decayed(log_decay: Tensor, visible: Tensor, dim: int) -> Tensor:
    """exp of the sum of the visible entries after each one along an axis."""
    seen = torch.where(visible, log_decay, 0.0).movedim(dim, -1)
    later = F.pad(seen[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return later.exp().movedim(-1, dim)


def linear_memory(
    k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> Tensor:
    """The states before each of the N chunks of the context, and the one after the last: (B, H, N + 1, E, V).

    A state is sum_s exp(D - D_s) k_s v_s^T over the past, with D up to the chunk. It depends on the context alone;
    the last is the ``state`` of what follows. In float32 or wider. Arguments as in :func:`linear_attention`.

    >>> linear_memory(torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1)).flatten().tolist()
    [0.0, 3.0]
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    start = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    k, v = _chunks(k), _chunks(v)
    if log_decay is None:
        added = k.transpose(-1, -2) @ v
        return torch.cat([start.to(dtype).unsqueeze(2), added.to(dtype)], 2).cumsum(2)
    decay = _chunks(log_decay.unsqueeze(-1)).squeeze(-1)
    remaining = F.pad(decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    added = (k * remaining.exp().unsqueeze(-1).to(k.dtype)).transpose(-1, -2) @ v
    kept = decay.sum(-1).exp()[..., None, None].to(dtype)
    states = [start.to(dtype)]
    for keep, more in zip(kept.unbind(2), added.to(dtype).unbind(2), strict=True):
        states.append(torch.addcmul(more, keep, states[-1]))
    return torch.stack(states, 2)


def linear_recall(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, memory: Tensor
) -> Tensor:
    """Causal linear attention (B, H, T, V) of a sequence over itself and the ``memory`` of :func:`linear_memory`.

    >>> q = k = v = torch.ones(1, 1, 3, 1)
    >>> linear_recall(q, k, v, None, linear_memory(k, v)).flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    T = q.shape[-2]
    q, k, v = _chunks(q), _chunks(k), _chunks(v)
    weights = q @ k.transpose(-1, -2)  # (B, H, N, C, C)
    if log_decay is not None:
        decay = _chunks(log_decay.unsqueeze(-1)).squeeze(-1)
        weights = weights * _between(decay).exp().to(weights.dtype)
        q = q * decay.cumsum(-1).exp().unsqueeze(-1).to(q.dtype)
    out = weights.tril() @ v + q @ memory[:, :, :-1].to(q.dtype)
    return out.flatten(2, 3)[:, :, :T]


def _unhidden(
    k: Tensor, log_decay: Tensor | None, visible: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Keys and decays of the tokens that the last one sees: a key of 0 adds nothing, a decay of 0 forgets nothing."""
    if visible is None:
        return k, log_decay
    hidden = ~visible[..., -1, -k.shape[-2] :]  # (B, 1, S)
    k = k.masked_fill(hidden.unsqueeze(-1), 0.0)
    return k, None if log_decay is None else log_decay.masked_fill(hidden, 0.0)


def _chunks(t: Tensor) -> Tensor:
    """(B, H, T, width) as (B, H, N, C, width), with zeros after the end."""
    size = max(1, min(CHUNK, t.shape[2]))
    padded = F.pad(t, (0, 0, 0, -t.shape[2] % size))
    return padded.unflatten(2, (padded.shape[2] // size, size))


def _between(log_decay: Tensor) -> Tensor:
    """D_t - D_s as (..., T, S) for s < t, and 0 elsewhere.

    Summed from s, since the difference of two long sums loses digits, and of two infinite ones everything.
    """
    size = log_decay.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril(-1)
    steps = log_decay.unsqueeze(-1).expand(*log_decay.shape, size)
    return steps.masked_fill(~later, 0.0).cumsum(-2)


def _dense(q, k, v, log_decay, visible, causal, state) -> Tensor:
    T, S = q.shape[-2], k.shape[-2]
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device)
    seen = seen.tril(S - T) if causal else seen
    seen = seen if visible is None else seen & visible
    weights = (q @ k.transpose(-1, -2)).masked_fill(~seen, 0.0)
    if log_decay is not None:
        weights = weights * decayed(log_decay.unsqueeze(-2), seen, -1).to(weights.dtype)
    out = weights @ v
    if state is None:
        return out
    if log_decay is not None:
        kept = torch.where(seen, log_decay.unsqueeze(-2), 0.0).sum(-1, keepdim=True)
        q = q * kept.exp().to(q.dtype)
    return out + q @ state.to(q.dtype)
