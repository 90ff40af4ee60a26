"""The soft top-k of the scores up to each token, for causal models: nothing of it depends on later scores.

Legend: B batch, S tokens so far, K chosen tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .top_k import tiny

ROUNDING = 1e-9
"""0.1 times 30 is a little above 3."""
TIE = 1 << 7
"""Scores that differ by so many roundings are equal."""
BLOCK = 1 << 17
"""Pairs of tokens that are looked at together: what fits a cache of a processor."""


def kept_of(share: float, count: Tensor) -> Tensor:
    """How many of so many tokens are kept: the share, rounded up, in float64.

    >>> kept_of(0.3, torch.tensor([1, 10, 11])).tolist()
    [1.0, 3.0, 4.0]
    """
    return (count.double() * share - ROUNDING).ceil().clamp(min=1)


def running_choice(scores: Tensor, share: float, new: int, real: Tensor | None = None) -> Tensor:
    """Whether each of the last tokens is among the best of those up to itself, bool (B, new).

    Token i is chosen where fewer than ceil(share * i) of the scores before it are at least its own: where it is not
    below the (1 - share) quantile of the i scores up to it. Later scores do not enter. Equal tokens have equal scores
    until a context reaches them, but products of matrices of another shape round otherwise. So that they are chosen
    alike in a batch, alone and one by one, a score does not exceed an earlier one by rounding alone.

    Args:
        scores: (B, S).
        share: between 0 and 1.
        new: how many tokens at the end are asked for.
        real: bool (B, S), False for padding, which is neither chosen nor counted.

    >>> running_choice(torch.tensor([[0.0, 1.0, 2.0, -1.0, 1.5]]), 0.5, 5).tolist()
    [[True, True, True, False, True]]
    """
    B, S = scores.shape
    slack = TIE * torch.finfo(scores.dtype).eps
    if real is None:
        count = torch.arange(S - new + 1, S + 1, device=scores.device)
        return running_rank(scores, new, slack) < kept_of(share, count)
    scores = scores.masked_fill(~real, -torch.inf)
    kept = kept_of(share, real.cumsum(-1)[:, S - new :])
    return (running_rank(scores, new, slack) < kept) & real[:, S - new :]


def running_rank(scores: Tensor, new: int, slack: float = 0.0) -> Tensor:
    """How many earlier scores are at least each of the last ones, s - slack (1 + |s|), (B, new), in O(S log^2 S).

    Halves of 2, 4, 8, ... blocks: each score of a right half finds its place in the sorted left half.
    """
    B, S = scores.shape
    old, own = scores[:, : S - new], scores[:, S - new :]
    low = own - slack * (1 + own.abs()) if slack else own
    if new == 1:
        return (old >= low).sum(-1, keepdim=True)
    rank = _at_least(old.sort(-1).values, low)
    size = 32
    earlier, later = (_padded(z, size).unflatten(1, (-1, size)) for z in (own, low))
    before = earlier[..., None, :] >= later[..., None]  # (B, blocks, i, j)
    within = before.tril(-1).sum(-1).flatten(1)
    while size < new:
        left, right = (
            _padded(z, 2 * size).view(-1, 2, size)[:, n] for n, z in enumerate((own, low))
        )
        more = _at_least(left.sort(-1).values, right).view(B, -1, 1, size)
        more = torch.cat([torch.zeros_like(more), more], 2).flatten(1)
        within = within[:, :new] + more[:, :new]
        size *= 2
    return rank + within[:, :new]


def _padded(numbers: Tensor, size: int) -> Tensor:
    return F.pad(numbers, (0, -numbers.shape[1] % size), value=-torch.inf)


def _at_least(ascending: Tensor, values: Tensor) -> Tensor:
    """How many of each sorted row (..., n) are at least each of the values (..., m)."""
    return ascending.shape[-1] - torch.searchsorted(ascending, values.contiguous())


def running_soft_top_k(
    scores: Tensor, index: Tensor, share: float, eps: float, real: Tensor | None = None
) -> Tensor:
    """The own weight of a chosen token in the soft top-k of the scores up to it, (B, K); later scores do not enter.

        lam_i = soft_top_k(s_1..s_i, ceil(share * i), eps)_i

    Exact where :func:`running_choice` chose the token. Memory is O(S); the derivative is exact too and looks at the
    pairs again. All sums run over the tokens in their order, so the weights of earlier tokens are the same to the last
    bit whatever later scores are.

    Args:
        scores, share, real: as in :func:`running_choice`.
        index: places (B, K) of the tokens.
        eps: the temperature.

    >>> s = torch.tensor([[0.3, -1.0, 0.2, 0.5, -0.4, 0.4]])
    >>> from cem import soft_top_k
    >>> running_soft_top_k(s, torch.tensor([[5]]), 0.5, 0.1).allclose(soft_top_k(s, 3, 0.1)[:, 5])
    True
    """
    if real is None:
        count = index + 1
    else:
        scores = scores.masked_fill(~real, -torch.inf)
        count = real.cumsum(-1).gather(1, index)
    return RunningSoftTopK.apply(scores, index, kept_of(share, count).to(scores.dtype), eps)


class RunningSoftTopK(torch.autograd.Function):
    """(scores (B, S), places (B, K), k (B, K), eps) -> weights (B, K).

    x = lam_i is 1 or the root of sum_j min(1, x exp((s_j - s_i) / eps)) = k.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, index: Tensor, k: Tensor, eps: float) -> Tensor:
        found = []
        for place, left in zip(*_blocks(scores, index, k), strict=True):
            ratio = _ratios(scores, place, eps)
            below = ratio.clamp(max=1).sum(-1) > left  # at x = 1 the sum is too large
            found.append(
                torch.ones_like(left).masked_scatter(below, _newton(ratio[below], left[below]))
            )
        weights = torch.cat(found, 1)
        ctx.save_for_backward(scores, index, weights)
        ctx.eps = eps
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None, None]:
        scores, index, weights = ctx.saved_tensors
        slope = (slope * weights).masked_fill(weights >= 1, 0) / ctx.eps
        out = torch.zeros_like(scores).scatter_add_(1, index, slope)
        for place, own, x in zip(*_blocks(scores, index, slope, weights), strict=True):
            others = _ratios(scores, place, ctx.eps) * x[..., None]
            others = others.masked_fill_(others >= 1, 0)
            own = own / others.sum(-1).clamp(min=tiny(scores))
            out -= (own[:, None] @ others)[:, 0]
        return out, None, None, None


def _newton(ratio: Tensor, k: Tensor) -> Tensor:
    """The roots x (M,) of sum_j min(1, x ratio_j) = k for ratios (M, S), below 1.

    Newton's method on a concave, piecewise linear function, from the left: every step finds more ratios that are
    saturated, so it ends, and it ends exactly.
    """
    x, saturated = k / ratio.sum(-1), torch.full_like(k, -1)
    while True:
        y = (ratio * x[:, None]).clamp_(max=1)
        high = y.floor()
        count = high.sum(-1)
        more = count > saturated
        if not more.any():
            return x.clamp(max=1)
        # A row that is done stays as it is, whatever the others need.
        x = torch.where(more, x * ((k - count) / y.sub_(high).sum(-1)), x)
        saturated = count


def _blocks(scores: Tensor, *along: Tensor) -> list[tuple[Tensor, ...]]:
    size = max(1, BLOCK // scores.numel())
    return [one.split(size, 1) for one in along]


def _ratios(scores: Tensor, index: Tensor, eps: float) -> Tensor:
    """exp((s_j - s_i) / eps) for tokens i at places (B, K) and j up to i, 0 elsewhere, (B, K, S)."""
    own = scores.gather(1, index).clamp(min=torch.finfo(scores.dtype).min)
    later = torch.arange(scores.shape[1], device=scores.device) > index[..., None]
    ratio = (scores[:, None, :] - own[..., None]).div_(eps)
    # This one is at least the k-th largest, so what is more than log S above it is saturated.
    return ratio.clamp_(max=math.log(scores.shape[1]) + 1).exp_().masked_fill_(later, 0)
