"""Functions of numbers for the torch pen; tensors broadcast from the right."""

from __future__ import annotations

import operator
from collections.abc import Callable

import sympy
from sympy import Abs, Expr, Integer, exp, log, sqrt

from . import words
from .positions import lookup, rope
from .torch_tensor import Untranslatable, Value, elementwise, is_size, lift

ELEMENTWISE: dict[str, Callable[[Expr], Expr]] = {
    "abs": Abs,
    "absolute": Abs,
    "neg": lambda z: -z,
    "negative": lambda z: -z,
    "pos": lambda z: z,
    "positive": lambda z: z,
    "exp": exp,
    "exp2": lambda z: Integer(2) ** z,
    "expm1": lambda z: exp(z) - 1,
    "log": log,
    "log1p": lambda z: log(1 + z),
    "log2": lambda z: log(z) / log(2),
    "log10": lambda z: log(z) / log(10),
    "sqrt": sqrt,
    "rsqrt": lambda z: 1 / sqrt(z),
    "square": lambda z: z**2,
    "reciprocal": lambda z: 1 / z,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "sinh": lambda z: (exp(z) - exp(-z)) / 2,
    "cosh": lambda z: (exp(z) + exp(-z)) / 2,
    "tanh": sympy.tanh,
    "sign": sympy.sign,
    "sgn": sympy.sign,
    "erf": lambda z: 2 * words.normal_cdf(sqrt(2) * z) - 1,
    "ndtr": words.normal_cdf,
    "sigmoid": words.sigmoid,
    "expit": words.sigmoid,
    "logsigmoid": lambda z: -words.softplus(-z),
    "log_sigmoid": lambda z: -words.softplus(-z),
    "softsign": lambda z: z / (1 + Abs(z)),
    "tanhshrink": lambda z: z - sympy.tanh(z),
}
"""Functions of one number without options."""


def pointwise(input, *, function: Callable[[Expr], Expr], inplace: bool = False) -> Value:
    del inplace
    return elementwise(function, input)


def add(input, other, *, alpha=1) -> Value:
    return elementwise(lambda a, b, c: a + c * b, input, other, alpha)


def sub(input, other, *, alpha=1) -> Value:
    return elementwise(lambda a, b, c: a - c * b, input, other, alpha)


def rsub(input, other, *, alpha=1) -> Value:
    return sub(other, input, alpha=alpha)


def mul(input, other) -> Value:
    return elementwise(operator.mul, input, other)


def div(input, other, *, rounding_mode=None) -> Value:
    if rounding_mode is not None:
        raise Untranslatable("division with rounding has no gradient: leave `rounding_mode` out")
    return elementwise(operator.truediv, input, other)


def floordiv(input, other) -> Value:
    left, right = lift(input), lift(other)
    quotient = left.expression / right.expression
    if left.axes or right.axes or not is_size(quotient):
        raise Untranslatable(
            f"`{left.expression} // {right.expression}` is no product of named sizes: declare the"
            " split,"
            ' such as h="(heads block)"'
        )
    return Value(quotient)


def pow(input, exponent) -> Value:
    return elementwise(operator.pow, input, exponent)


def addcmul(input, tensor1, tensor2, *, value=1) -> Value:
    return elementwise(lambda a, b, c, d: a + d * b * c, input, tensor1, tensor2, value)


def lerp(input, end, weight) -> Value:
    return elementwise(lambda a, b, w: a + w * (b - a), input, end, weight)


def logaddexp(input, other) -> Value:
    return elementwise(lambda a, b: a + words.softplus(b - a), input, other)


def relu(input, inplace=False) -> Value:
    return pointwise(input, function=words.relu, inplace=inplace)


def leaky_relu(input, negative_slope=0.01, inplace=False) -> Value:
    del inplace
    return elementwise(lambda z, c: c * z + (1 - c) * words.relu(z), input, negative_slope)


def silu(input, inplace=False) -> Value:
    return pointwise(input, function=words.silu, inplace=inplace)


def mish(input, inplace=False) -> Value:
    return pointwise(input, function=lambda z: z * sympy.tanh(words.softplus(z)), inplace=inplace)


def gelu(input, *, approximate="none") -> Value:
    return elementwise({"none": words.gelu, "tanh": words.gelu_tanh}[approximate], input)


def softplus(input, beta=1, threshold=20) -> Value:
    # Above the threshold torch takes the identity, which differs by less than float32 resolves.
    del threshold
    return elementwise(lambda z, c: words.softplus(c * z) / c, input, beta)


def clamp(input, min=None, max=None) -> Value:
    bounds = [None if bound is None else lift(bound).expression for bound in (min, max)]
    if bounds == [0, None]:
        return elementwise(words.relu, input)
    if bounds == [None, 0]:
        return elementwise(lambda z: -words.relu(-z), input)
    raise Untranslatable(
        "`clamp` is understood at 0 only: type `x.clamp(min=0)`, or `c + torch.relu(x - c)`"
    )


def maximum(input, other, *, sign=1) -> Value:
    for moving, bound in ((input, other), (other, input)):
        if lift(bound).expression == 0:
            return elementwise(lambda z, b: sign * words.relu(sign * z), moving, bound)
    raise Untranslatable(
        "`maximum` and `minimum` are understood against 0 only: type `b + torch.relu(a - b)`"
    )


def greater(input, other) -> Value:
    return elementwise(lambda a, b: words.step(a - b), input, other)


def less(input, other) -> Value:
    return greater(other, input)


def no(input) -> Value:
    """The indicator of the opposite."""
    return elementwise(lambda z: 1 - z, input)


def turned(input, position, **options) -> Value:
    """A rotation of the last axis by positions, one a row."""
    where = lift(position)
    if not input.axes or len(input.axes[-1]) != 1:
        raise Untranslatable(
            "`rope` turns the last axis of a tensor, one named size: flatten it later"
        )
    where = Value(where.expression, (*where.axes, ()))
    (idx,) = input.axes[-1]
    return elementwise(lambda body, token: rope(body, idx, token, **options), input, where)


def looked_up(input, number) -> Value:
    """The last axis of a tensor read at numbers, whose axes take its place."""
    where = lift(number)
    if not input.axes or len(input.axes[-1]) != 1:
        raise Untranslatable(
            "`lookup` reads the last axis of a tensor, one named size: flatten it later"
        )
    (idx,) = input.axes[-1]
    found = lookup(input.expression, idx, where.expression)
    return Value(found, (*input.axes[:-1], *where.axes))


def compare(input, other, *, same: bool):
    left, right = lift(input), lift(other)
    if left.axes or right.axes:
        raise Untranslatable(
            "comparing entries has no gradient: write the energy with smooth functions"
        )
    if left.expression == right.expression:
        return same
    raise Untranslatable(
        f"`{left.expression}` == `{right.expression}` is not known before a layer is derived"
    )
