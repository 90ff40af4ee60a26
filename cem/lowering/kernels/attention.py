"""Attention with its log-sum-exp, and its transpose; differentiable, with memory linear in the sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import flash


def attention_with_logsumexp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    causal: bool,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention out_t = sum_s p_ts v_s with its log-sum-exp l_t = log sum_s exp(scale q_t.k_s + bias_ts).

    Both are differentiable, from one fused kernel in each direction; a derivative of the derivative, a bias that wants
    a gradient, float64 on CUDA and other devices take the dense product.

    Args:
        q: queries (B, H, T, E).
        k, v: keys (B, H, S, E) and values (B, H, S, V); a divisor of H where heads share them.
        visible: bool (B or 1, 1, T, S), or None.
        causal: s <= t, where there is no mask and T equals S.
        scale: the factor of the scores.
        bias: float, broadcastable to (B, H, T, S), added to the scaled scores.

    Returns:
        The output (B, H, T, V) and the log-sum-exp (B, H, T); both 0 for a token that sees nothing.

    >>> q, k = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)
    >>> out, logsumexp = attention_with_logsumexp(q, k, k + 1, None, True, 1.0)
    >>> logsumexp.exp().round(decimals=4).tolist()
    [[[1.0, 2.0]]]

    Source: the backward pass of FlashAttention (arXiv:2205.14135, algorithm 4), with one more term for l.
    """
    q, k, v = one_dtype(q, k, v)
    if k.shape[1] < q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out, lse = attend(q, k, v, visible, causal, scale, bias)
    return out, lse.to(q.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    causal: bool,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention_with_logsumexp` of tensors of one dtype, with the log-sum-exp as the kernel gives it."""
    added = additive(visible, bias, q.dtype)
    if flash.has_kernel(q, k) and not wants_gradient(bias):
        out, lse = _Attention.apply(*distinct(q, k, v), added, causal, scale)
    else:
        scores = dense_scores(q, k, added, causal, scale)
        out, lse = torch.softmax(scores, -1) @ v, scores.logsumexp(-1)
    if visible is not None:
        empty = ~visible.any(-1)
        lse = lse.masked_fill(empty, 0.0)
        out = out.masked_fill(empty.unsqueeze(-1), 0.0)
    return out, lse


class _Attention(torch.autograd.Function):
    """(out, lse) from the kernel; the log-sum-exp's own gradient rides along as a column.

    The kernel computes dS = P * (grad_out.v - grad_out.out). A column of zeros in v, of ones in grad_out and of
    -grad_lse in out adds P * grad_lse.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, bias, causal, scale):
        return flash.forward(q, k, v, bias, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, bias, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, bias, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, bias, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _dense_gradients(ctx, (q, k, v), bias, (grad_out, grad_lse))
            return *found, None, None, None
        width = v.shape[-1]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_lse is not None:
            grad_out, v = F.pad(grad_out, (0, 1), value=1.0), F.pad(v, (0, 1))
            out = torch.cat([out, -grad_lse.unsqueeze(-1).to(out.dtype)], -1)
        dq, dk, dv = flash.backward(grad_out, q, k, v, out, lse, bias, ctx.causal, ctx.scale)
        return dq, dk, dv[..., :width], None, None, None


def _dense_gradients(ctx, inputs, bias, grads) -> tuple[Tensor, ...]:
    """The same gradients with a graph of their own, through the product of all pairs."""

    def dense(q, k, v):
        scores = dense_scores(q, k, bias, ctx.causal, ctx.scale)
        return torch.softmax(scores, -1) @ v, scores.logsumexp(-1)

    # Not `torch.autograd.grad`: an input may depend on another, and each wants its partial derivative.
    outputs, pull = torch.func.vjp(dense, *inputs)
    pairs = zip(outputs, grads, strict=True)
    return pull(tuple(torch.zeros_like(o) if g is None else g.to(o.dtype) for o, g in pairs))


def transposed_attention(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    visible: Tensor | None,
    causal: bool,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """What every context token receives, y_s = sum_t p_ts u_t, with the weights p_t of attention.

    Weights are normalised over s, as in :func:`attention_with_logsumexp`, and the sum runs over t: the transpose of
    attention, which is how token t acts as context of others where an energy is differentiated for all tokens at
    once. It is the gradient of attention for its values, so the backward kernel computes it, and its own gradient
    takes one call in each direction. Differentiable once; the dense product where there is no kernel.

    Args:
        q: queries (B, H, T, E).
        k: keys (B, H, S, E); a divisor of H where heads share them.
        u: what the tokens hand out, (B, H, T, V).
        visible, causal, scale, bias: as in :func:`attention_with_logsumexp`.

    Returns:
        (B, H, S, V); a token that sees nothing hands out nothing.

    >>> q, k = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)
    >>> transposed_attention(q, k, torch.tensor([[[[1.0], [10.0]]]]), None, True, 1.0).tolist()
    [[[[6.0], [5.0]]]]

    Source: Energy Transformer (arXiv:2302.07253), the gradient of its attention energy.
    """
    q, k, u = one_dtype(q, k, u)
    if k.shape[1] < q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    added = additive(visible, bias, q.dtype)
    if visible is not None:
        u = u.masked_fill(~visible.any(-1).unsqueeze(-1), 0.0)
    if flash.has_kernel(q, k) and not wants_gradient(bias):
        return _TransposedAttention.apply(*distinct(q, k, u), added, causal, scale)
    scores = dense_scores(q, k, added, causal, scale)
    return torch.softmax(scores, -1).transpose(-1, -2) @ u


class _TransposedAttention(torch.autograd.Function):
    """The values' gradient of attention; with out = P g, dS = P * (u.g - u.out) is attention's own backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, u, bias, causal, scale):
        _, lse = flash.forward(q, k, k, bias, causal, scale)
        # Values and output serve the gradients for q and k alone, which are not used here.
        values = u.new_zeros(*k.shape[:-1], u.shape[-1])
        return flash.backward(u, q, k, values, u, lse, bias, causal, scale)[2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, u, bias, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(q, k, u, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, u, bias = ctx.saved_tensors
        out, lse = flash.forward(q, k, grad, bias, ctx.causal, ctx.scale)
        dq, dk, _ = flash.backward(u, q, k, grad, out, lse, bias, ctx.causal, ctx.scale)
        return dq, dk, out, None, None, None


def one_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of autocast where it is on, as torch's own attention does; float64 stays."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def distinct(*tensors: Tensor) -> list[Tensor]:
    """A view for a tensor that comes a second time: Dynamo traces no function with one tensor in two places."""
    return [
        t.view_as(t) if any(t is earlier for earlier in tensors[:n]) else t
        for n, t in enumerate(tensors)
    ]


def wants_gradient(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad and torch.is_grad_enabled()


def additive(visible: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores; a token that sees nothing keeps its scores, and its results are to be zeroed."""
    if visible is None:
        return bias
    hidden = ~visible & visible.any(-1, keepdim=True)
    if bias is None:
        bias = torch.zeros((), dtype=dtype, device=visible.device)
    return bias.masked_fill(hidden, -math.inf)


def dense_scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Scores (B, H, T, S), -inf where hidden."""
    scores = (q @ k.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~past, -math.inf)
    return scores
