"""Reductions of symbolic tensors for the torch pen: sums, means, norms, log-sum-exp and softmax."""

from __future__ import annotations

import operator

from sympy import Abs, Expr, Idx, Mul, sqrt

from .entmax import entmax_conjugate
from .reductions import LogSumExp, Softmax
from .symbols import SEQ, size_of, total
from .tokens import Decay
from .torch_tensor import Untranslatable, Value, elementwise, lift, place, product, reduce


def sum(input, dim=None, keepdim=False, dtype=None) -> Value:
    del dtype
    return reduce(input, dim, keepdim, total)


def mean(input, dim=None, keepdim=False, dtype=None) -> Value:
    del dtype
    return reduce(input, dim, keepdim, lambda body, over: total(body, over) / product(over))


def var(input, dim=None, unbiased=True, keepdim=False, *, correction=None) -> Value:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    less = lift(int(unbiased) if correction is None else correction).expression
    centred = elementwise(operator.sub, input, mean(input, dim, keepdim=True))
    return reduce(
        centred, dim, keepdim, lambda body, over: total(body**2, over) / (product(over) - less)
    )


def std(input, dim=None, unbiased=True, keepdim=False, *, correction=None) -> Value:
    return elementwise(sqrt, var(input, dim, unbiased, keepdim, correction=correction))


def norm(input, p=2, dim=None, keepdim=False, dtype=None, *, ord=None) -> Value:
    del dtype
    order = p if ord is None else ord
    if order == "fro" or order == 2 or order is None:
        return reduce(input, dim, keepdim, lambda body, over: sqrt(total(body**2, over)))
    if order == 1:
        return reduce(input, dim, keepdim, lambda body, over: total(Abs(body), over))
    raise Untranslatable(
        f"the norm of order {order} has no translation: use the 1-norm, the 2-norm or a sum"
    )


def linalg_vector_norm(input, ord=2, dim=None, keepdim=False, *, dtype=None) -> Value:
    return norm(input, ord, dim, keepdim, dtype)


def linalg_norm(input, ord=None, dim=None, keepdim=False, dtype=None) -> Value:
    if ord in (1, 2) and (
        input.ndim == 2 if dim is None else not isinstance(dim, int) and len(dim) == 2
    ):
        raise Untranslatable(
            f"the matrix norm of order {ord} has no translation: use the Frobenius norm, ord=None"
        )
    return norm(input, 2 if ord is None else ord, dim, keepdim, dtype)


def _log_sum_exp(body: Expr, over: tuple[Idx, ...]) -> Expr:
    for idx in over:
        body = LogSumExp(body, idx)
    return body


def logsumexp(input, dim, keepdim=False) -> Value:
    return reduce(input, dim, keepdim, _log_sum_exp)


def sparse_maximum(input, dim, alpha) -> Value:
    if len(input.axes[place(input.ndim, dim)]) != 1:
        raise Untranslatable(
            "`entmax_conjugate` reduces an axis of one named size: reduce it before it is flattened"
        )
    return reduce(input, dim, False, lambda body, over: entmax_conjugate(body, *over, alpha))


def _weights(body: Expr, over: tuple[Idx, ...]) -> Expr:
    """Softmax over several indices, as a product of softmaxes over one index each."""
    factors = []
    for idx in over:
        factors.append(Softmax(body, idx))
        body = LogSumExp(body, idx)
    return Mul(*factors)


def softmax(input, dim=None, dtype=None, _stacklevel=3) -> Value:
    axis = _softmax_axis(input, dim)
    return Value(_weights(input.expression, axis), input.axes)


def log_softmax(input, dim=None, dtype=None, _stacklevel=3) -> Value:
    axis = _softmax_axis(input, dim)
    return Value(input.expression - _log_sum_exp(input.expression, axis), input.axes)


def _softmax_axis(input: Value, dim) -> tuple[Idx, ...]:
    if dim is None:
        raise Untranslatable("a softmax needs the axis that it sums over: type `dim=-1`")
    return tuple(reversed(input.axes[place(input.ndim, dim)]))


def decayed(input) -> Value:
    """What is left of each context token, along the last axis."""
    value = lift(input)
    if not value.axes or len(value.axes[-1]) != 1 or size_of(value.axes[-1][0]) != SEQ:
        raise Untranslatable("`decay` runs along the context: give a tensor of shape (..., seq)")
    return Value(Decay(value.expression, value.axes[-1][0]), value.axes)
