"""Products of tensors for the torch pen: everything that is an einsum."""

from __future__ import annotations

import operator

from .symbols import total
from .torch_shapes import matrix_transpose
from .torch_tensor import (
    Untranslatable,
    Value,
    contract,
    elementwise,
    lift,
    place,
    places,
    reduce,
    show,
)


def einsum(equation, *operands) -> Value:
    if isinstance(equation, str):
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        left, arrow, right = equation.replace(" ", "").partition("->")
        terms = [_letters(term) for term in left.split(",")]
        output = _letters(right) if arrow else None
    else:
        rest = (equation, *operands)
        operands, terms = rest[0 : len(rest) // 2 * 2 : 2], [tuple(term) for term in rest[1::2]]
        output = tuple(rest[-1]) if len(rest) % 2 else None
    values = [lift(operand) for operand in operands]
    if len(terms) != len(values):
        raise Untranslatable(
            f"the equation `{equation}` has {len(terms)} terms for {len(values)} tensors"
        )
    labels = []
    for term, value in zip(terms, values, strict=True):
        extra = value.ndim - len(term) + (... in term)
        if extra < 0 or (extra and ... not in term):
            raise Untranslatable(
                f"a term of `{equation}` does not fit a tensor of shape {show(value.shape)}"
            )
        labels.append(_spread(term, range(-extra, 0)))
    dots = range(
        min((label for names in labels for label in names if _is_dots(label)), default=0), 0
    )
    if output is None:
        seen = [label for names in labels for label in names if not _is_dots(label)]
        output = (..., *sorted(label for label in set(seen) if seen.count(label) == 1))
    return contract(values, labels, _spread(output, dots))


def _letters(term: str) -> tuple:
    """The labels of one term of an equation; three dots are one label."""
    return tuple(... if letter == "." else letter for letter in term.replace("...", "."))


def _spread(term: tuple, dots: range) -> tuple:
    """Put the axes that three dots stand for in their place: -1 is the rightmost."""
    return tuple(label for one in term for label in (dots if one is ... else (one,)))


def _is_dots(label) -> bool:
    return isinstance(label, int) and label < 0


def matmul(input, other) -> Value:
    values = [lift(input), lift(other)]
    if not all(value.ndim for value in values):
        raise Untranslatable("`@` needs tensors with axes: type `*` for a number")
    batches = [range(-max(value.ndim - 2, 0), 0) for value in values]
    row = ("row",) if values[0].ndim > 1 else ()
    column = ("column",) if values[1].ndim > 1 else ()
    labels = [(*batches[0], *row, "inner"), (*batches[1], "inner", *column)]
    return contract(values, labels, (*max(batches, key=len), *row, *column))


def linear(input, weight, bias=None) -> Value:
    image = matmul(input, matrix_transpose(weight) if weight.ndim > 1 else weight)
    return image if bias is None else elementwise(operator.add, image, bias)


def inner(input, other) -> Value:
    if not input.ndim or not other.ndim:
        return elementwise(operator.mul, input, other)
    return tensordot(input, other, ([-1], [-1]))


def outer(input, vec2) -> Value:
    return contract([input, vec2], [("row",), ("column",)], ("row", "column"))


def tensordot(a, b, dims=2) -> Value:
    if isinstance(dims, int):
        dims = (range(-dims, 0), range(dims))
    left, right = (
        places(value, list(one)) if len(one) else ()
        for value, one in zip((a, b), dims, strict=True)
    )
    names_a = [("left", axis) for axis in range(a.ndim)]
    names_b = [("right", axis) for axis in range(b.ndim)]
    for one, other in zip(left, right, strict=True):
        names_b[other] = names_a[one]
    kept = [name for axis, name in enumerate(names_a) if axis not in left]
    kept += [name for axis, name in enumerate(names_b) if axis not in right]
    return contract([a, b], [names_a, names_b], kept)


def vecdot(input, other, *, dim=-1) -> Value:
    return reduce(elementwise(operator.mul, input, other), dim, False, total)


def addmm(input, mat1, mat2, *, beta=1, alpha=1) -> Value:
    return elementwise(lambda a, b, c, d: c * a + d * b, input, matmul(mat1, mat2), beta, alpha)


def trace(input) -> Value:
    return contract([input], [("a", "a")], ())


def diagonal(input, offset=0, dim1=0, dim2=1) -> Value:
    first, second = place(input.ndim, dim1), place(input.ndim, dim2)
    if offset != 0:
        raise Untranslatable("only the main diagonal has a translation: leave `offset` out")
    labels: list = ["diagonal" if axis in (first, second) else axis for axis in range(input.ndim)]
    kept = [label for label in labels if label != "diagonal"]
    return contract([input], [labels], (*kept, "diagonal"))
