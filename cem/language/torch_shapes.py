"""Axes of symbolic tensors for the torch pen: permute, index, view, repeat, read sizes."""

from __future__ import annotations

import torch
from sympy import Mul

from .symbols import frozen
from .torch_tensor import (
    Untranslatable,
    Value,
    as_size,
    fresh,
    lift,
    place,
    places,
    product,
    regroup,
    show,
    stretch,
)


def permute(input, *dims) -> Value:
    order = places(input, _flat(dims))
    if sorted(order) != list(range(input.ndim)):
        raise Untranslatable(
            f"`permute` must name each axis of the shape {show(input.shape)} once: got {dims}"
        )
    return Value(input.expression, tuple(input.axes[axis] for axis in order))


def transpose(input, dim0, dim1) -> Value:
    order = list(range(input.ndim))
    first, second = place(input.ndim, dim0), place(input.ndim, dim1)
    order[first], order[second] = second, first
    return permute(input, order)


def reverse(input) -> Value:
    return Value(input.expression, input.axes[::-1])


def matrix_transpose(input) -> Value:
    return transpose(input, -2, -1)


def movedim(input, source, destination) -> Value:
    moved, target = places(input, source), places(input, destination)
    order = [axis for axis in range(input.ndim) if axis not in moved]
    for new, old in sorted(zip(target, moved, strict=True)):
        order.insert(new, old)
    return permute(input, order)


def unsqueeze(input, dim) -> Value:
    position = place(input.ndim + 1, dim)
    return Value(input.expression, (*input.axes[:position], (), *input.axes[position:]))


def squeeze(input, dim=None) -> Value:
    gone = [axis for axis in places(input, dim) if not input.axes[axis]]
    return Value(
        input.expression, tuple(one for axis, one in enumerate(input.axes) if axis not in gone)
    )


def getitem(input, index):
    if isinstance(input, tuple):
        return input[index]
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(item is not None and item is not ... for item in items)
    if ... not in items:
        items.append(...)
    rest, axes = list(input.axes), []
    for item in items:
        if item is None:
            axes.append(())
        elif item is ...:
            for _ in range(len(input.axes) - used):
                axes.append(rest.pop(0))
        elif isinstance(item, slice) and item in (slice(None), slice(0, None)) and rest:
            axes.append(rest.pop(0))
        elif isinstance(item, int) and item in (0, -1) and rest and not rest[0]:
            rest.pop(0)
        else:
            raise Untranslatable(
                f"picking entries by number, `[{index}]`, has no meaning for tokens that a mask may"
                " hide: sum over the axis, or declare a parameter for each part"
            )
    return Value(input.expression, tuple(axes))


def _flat(sizes: tuple) -> tuple:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def reshape(input, *shape, size=()) -> Value:
    return regroup(input, [as_size(one) for one in _flat(shape) or size])


def flatten(input, start_dim=0, end_dim=-1) -> Value:
    first, last = place(input.ndim, start_dim), place(input.ndim, end_dim)
    middle = tuple(idx for axis in input.axes[first : last + 1] for idx in axis)
    return Value(input.expression, (*input.axes[:first], middle, *input.axes[last + 1 :]))


def unflatten(input, dim, sizes) -> Value:
    position = place(input.ndim, dim)
    part = Value(input.expression, (input.axes[position],))
    split = regroup(part, [as_size(one) for one in sizes])
    return Value(
        split.expression, (*input.axes[:position], *split.axes, *input.axes[position + 1 :])
    )


def expand(input, *size) -> Value:
    return stretch(input, [as_size(one) for one in _flat(size)])


def expand_as(input, other) -> Value:
    return stretch(input, other.shape)


def reshape_as(input, other) -> Value:
    return regroup(input, other.shape)


def same(input, *args, **kwargs) -> Value:
    for option in (*args, *kwargs.values()):
        if isinstance(option, torch.dtype) and not option.is_floating_point:
            raise Untranslatable(
                f"a conversion to {option} rounds and has no gradient: leave it out"
            )
    return input


def detach(input) -> Value:
    return Value(frozen(input.expression), input.axes)


def full_like(input, fill_value, **options) -> Value:
    axes = tuple(axis and fresh(product(axis)) for axis in input.axes)
    return Value(lift(fill_value).expression, axes)


def size(input, dim=None):
    sizes = tuple(map(Value, input.shape))
    return sizes if dim is None else sizes[place(input.ndim, dim)]


def numel(input) -> Value:
    return Value(Mul(*input.shape))
