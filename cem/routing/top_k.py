"""The soft top-k: weights between 0 and 1 that sum to k, exactly, by one sort.

    lam = argmax  s . lam + eps H(lam),   H = -sum_i lam_i log lam_i,   0 <= lam_i <= 1,  sum_i lam_i = k

By the conditions of optimality lam_i = min(1, exp((s_i + a) / eps)) with one unknown number a. In descending order of s
the first j weights are 1, and then a = eps log(k - j) - eps logsumexp of the others' s / eps; j is the first for which
none of the others is above 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_top_k(
    scores: Tensor,
    k: float | Tensor,
    eps: float = 0.1,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Weights lam = argmax s . lam + eps H(lam) with 0 <= lam <= 1 and sum lam = k.

    One sort and one cumulative sum in O(n) memory, with nothing to iterate. k = 1 is softmax(s / eps), k = n all ones,
    and eps -> 0 the indicator of the k largest. Adding a number to all scores changes nothing, and a larger score never
    gets a smaller weight. With F where lam < 1, the derivative is exact and symmetric positive semi-definite,

        d lam_F / d s_F = (diag(lam_F) - lam_F lam_F^T / sum lam_F) / eps,    0 elsewhere.

    It can be differentiated again. The weights are the gradient of :func:`soft_top_k_sum`.

    Args:
        scores: s, any shape.
        k: how many, a number or a tensor of the shape of the scores without ``dim``; it need not be whole.
        eps: the temperature, in units of the scores.
        dim: the axis of the n scores.
        mask: bool, broadcast to the scores, False where a weight is to be 0. Where k or fewer are left, they get 1.

    Raises:
        ValueError: an eps that is not positive, a k below 0 or above n.

    >>> soft_top_k(torch.tensor([2.0, 1.0, 0.0, -1.0]), 2, eps=0.5).tolist()
    [1.0, 0.86..., 0.117..., 0.015...]

    Source: Lei et al., Conditional Adapters, arXiv:2304.04947, who iterate on a and on the dual variables of lam <= 1.
    """
    if not eps > 0:
        raise ValueError(
            f"`soft_top_k` needs a positive `eps`: got {eps}; type `scores.topk(k)` for the hard one"
        )
    n = scores.shape[dim]
    if not isinstance(k, Tensor) and not 0 <= k <= n:
        raise ValueError(f"`soft_top_k` takes k of {n} scores: got k={k}; type `k=min(k, {n})`")
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    s = scores.movedim(dim, -1).to(torch.promote_types(scores.dtype, torch.float32))
    k = torch.as_tensor(k, device=s.device, dtype=s.dtype).expand(s.shape[:-1])
    return SoftTopK.apply(s, k, float(eps)).to(scores.dtype).movedim(-1, dim)


def soft_top_k_sum(
    scores: Tensor,
    k: float | Tensor,
    eps: float = 0.1,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """max s . lam + eps H(lam): a smooth, convex sum of the k largest scores, whose gradient is :func:`soft_top_k`.

    Arguments as there; the result lacks ``dim``.

    >>> s = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    >>> torch.autograd.grad(soft_top_k_sum(s, 2), s)[0].allclose(soft_top_k(s, 2))
    True
    """
    weights = soft_top_k(scores, k, eps, dim, mask=mask)
    terms = scores * weights - eps * torch.xlogy(weights, weights.clamp(min=tiny(weights)))
    return terms.masked_fill(weights == 0, 0).sum(dim)


def soft_top_k_level(scores: Tensor, k: Tensor, eps: float) -> Tensor:
    """The number a of the weights min(1, exp((s + a) / eps)), shape (...); infinite where all are 1."""
    return eps * _solve(scores / eps, k)


def tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def _solve(t: Tensor, k: Tensor) -> Tensor:
    """a / eps from scores t / eps (..., n) and k (...)."""
    n = t.shape[-1]
    t = t.sort(dim=-1, descending=True).values
    k = k[..., None]
    whole = k.ceil()
    # The k-th largest is not saturated, so -a is at least it, and at most log(n / remainder) above it: in units of
    # it nothing that counts can underflow, and what is further above is saturated.
    middle = t.gather(-1, (whole.long() - 1).clamp(0, n - 1))
    highest = math.log(n) + 1 - (k - whole + 1).log()
    w = (t - middle).minimum(highest).exp()
    rest = w.flip(-1).cumsum(-1).flip(-1)
    left = k - torch.arange(n, device=t.device)
    count = (left * w > rest).sum(-1, keepdim=True)
    a = ((k - count) / rest.gather(-1, count)).log() - middle
    everything = k >= (t > -torch.inf).sum(-1, keepdim=True)
    return a.masked_fill(everything, torch.inf)[..., 0]


class SoftTopK(torch.autograd.Function):
    """(scores (..., n), k (...), eps) -> weights (..., n)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, k: Tensor, eps: float) -> Tensor:
        t = scores / eps
        weights = (t + _solve(t, k)[..., None]).clamp(max=0).exp()
        return weights.masked_fill(scores == -torch.inf, 0)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.eps = inputs[2]

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        free = weights.masked_fill(weights >= 1, 0)
        mean = (free * slope).sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp(
            min=tiny(free)
        )
        return free * (slope - mean) / ctx.eps, None, None
