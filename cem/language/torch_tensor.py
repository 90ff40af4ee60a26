"""Symbolic tensors of the torch pen: an expression with a named size on every axis.

An axis is a tuple of indices: ``()`` has size 1, ``(i,)`` runs over one size, and ``(a, r)`` is the
flattened pair whose slot is ``rank*a + r``. The free indices of the expression are among those of
its axes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from sympy import Dummy, Expr, Float, Idx, Indexed, Integer, Mul, Rational, exp

from .conversion import as_expression
from .indices import free_indices, rename
from .positions import Rope
from .reductions import LogSumExp, Softmax
from .symbols import SEQ, Dim, NamedArray, join, size_of, total

Axis = tuple[Idx, ...]
Label = Hashable


class Untranslatable(Exception):
    """A torch callable has no expression: the message says which operation, where, what to do."""


@dataclass(frozen=True)
class Value:
    """What a torch tensor, a size or a scalar means; sizes and scalars have no axes."""

    expression: Expr
    axes: tuple[Axis, ...] = ()

    @property
    def shape(self) -> tuple[Expr, ...]:
        return tuple(map(product, self.axes))

    @property
    def ndim(self) -> int:
        return len(self.axes)


def product(axis: Sequence[Idx]) -> Expr:
    """The size of an axis."""
    return Mul(*map(size_of, axis))


def show(shape: Sequence[Expr]) -> str:
    """A shape as torch prints one, ``(heads,)``."""
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def number(value: int | float) -> Expr:
    """A Python number, exact where its denominator is a small power of two: 0.5 is 1/2."""
    if isinstance(value, int):
        return Integer(value)
    if value == value and abs(value) < 2.0**53:
        numerator, denominator = value.as_integer_ratio()
        return Rational(numerator, denominator) if denominator <= 2**20 else Float(value)
    raise Untranslatable(f"the number {value} has no place in an energy: type a finite one")


def lift(value) -> Value:
    """A number as a symbolic tensor without axes."""
    if isinstance(value, Value):
        return value
    if isinstance(value, int | float):
        return Value(number(value))
    raise Untranslatable(f"a tensor or a number is needed here: got {value!r}")


def is_size(size: Expr) -> bool:
    """Whether a size is a product of named sizes."""
    return all(
        isinstance(base, Dim) and power.is_Integer and power > 0
        for base, power in size.as_powers_dict().items()
        if base != 1
    )


def fresh(size: Expr) -> Axis:
    """An axis over a size, on an index that nothing else uses."""
    if size == 1:
        return ()
    if not is_size(size):
        raise Untranslatable(
            f"`{size}` is not a named size: read sizes from `.shape` and multiply or divide them"
        )
    if size != SEQ and size.has(SEQ):
        raise Untranslatable(
            f"the size `{size}` mixes tokens with coordinates: keep the axis `seq` by itself"
        )
    return (Idx(Dummy(str(size)[0], integer=True), size),)


def leaf(base: NamedArray) -> Value:
    """A named array with one index on each axis."""
    axes = tuple(map(fresh, base.shape))
    return Value(Indexed(base, *(axis[0] for axis in axes)), axes)


def relabel(expression: Expr, names: dict[Idx, Expr]) -> Expr:
    """Rename indices; one over heads*block may also become a slot such as ``block*a + b``."""
    names = {old: new for old, new in names.items() if old != new}
    slots = {old for old, new in names.items() if not isinstance(new, Idx)}
    slots &= free_indices(expression)
    if slots:
        if any(node.index in slots for node in expression.atoms(Rope)):
            raise Untranslatable("the axis that `rope` turns cannot be cut: reshape before it")
        # The index of a softmax cannot be a slot, so its quotient is written out.
        while weights := [node for node in expression.atoms(Softmax) if node.index in slots]:
            expression = expression.xreplace(
                {node: exp(node.body - LogSumExp(node.body, node.index)) for node in weights}
            )
    expression = rename(expression, names)
    if slots:
        entries = expression.atoms(Indexed)
        expression = expression.xreplace(
            {
                node: Indexed(node.base, *(slot.expand() for slot in node.indices))
                for node in entries
            }
        )
    return expression


def cover(axis: Axis, target: Axis) -> dict[Idx, Expr] | None:
    """What the indices of an axis are in terms of a finer one; None where their sizes differ."""
    names: dict[Idx, Expr] = {}
    rest = list(target)
    for idx in axis:
        run: list[Idx] = []
        while product(run) != size_of(idx):
            if not rest:
                return None
            run.append(rest.pop(0))
        names[idx] = join(tuple(run)) if len(run) > 1 else run[0]
    return None if rest else names


def unify(
    values: Sequence[Value], labels: Sequence[Sequence[Label]]
) -> tuple[list[Expr], dict[Label, Axis]]:
    """Rename the indices of several tensors so that axes with one label share their indices.

    An axis of size 1 fits any other. Axes with different labels get different indices.
    """
    found: dict[Label, list[Axis]] = {}
    for value, names in zip(values, labels, strict=True):
        for axis, label in zip(value.axes, names, strict=True):
            found.setdefault(label, []).append(axis)
    shared: dict[Label, Axis] = {}
    taken: set[Idx] = set()
    for label, axes in found.items():
        axis = max(axes, key=len)
        for other in axes:
            if other and cover(other, axis) is None:
                sizes = " and ".join(f"`{product(each)}`" for each in (axis, other))
                raise Untranslatable(
                    f"the sizes {sizes} do not match: give axes that meet the same name"
                    ' in the shapes, or a product of names such as h="(heads block)"'
                )
        if taken.intersection(axis):
            axis = tuple(idx for old in axis for idx in fresh(size_of(old)))
        taken.update(axis)
        shared[label] = axis
    expressions = []
    for value, names in zip(values, labels, strict=True):
        renaming: dict[Idx, Expr] = {}
        for axis, label in zip(value.axes, names, strict=True):
            if axis:
                renaming.update(cover(axis, shared[label]))
        expressions.append(relabel(value.expression, renaming))
    return expressions, shared


def elementwise(function: Callable[..., Expr], *operands) -> Value:
    """Apply a function of numbers to tensors that broadcast from the right."""
    values = [lift(operand) for operand in operands]
    rank = max(value.ndim for value in values)
    expressions, shared = unify(values, [range(-value.ndim, 0) for value in values])
    return Value(function(*expressions), tuple(shared[place] for place in range(-rank, 0)))


def contract(
    values: Sequence[Value], labels: Sequence[Sequence[Label]], output: Sequence[Label]
) -> Value:
    """The product of tensors, summed over the labels that the output lacks: einsum."""
    expressions, shared = unify(values, labels)

    # The widths of the state and of the tokens are summed first: features before scores.
    def narrowest(label: Label) -> int:
        return min(len(names) for names in labels if label in names)

    summed = sorted((label for label in shared if label not in output), key=narrowest)
    indices = [idx for label in summed for idx in reversed(shared[label])]
    return Value(total(Mul(*expressions), indices), tuple(shared[label] for label in output))


def places(value: Value, dim) -> tuple[int, ...]:
    """The axes that a ``dim`` argument names, all of them for None or ()."""
    if dim is None or dim == () or dim == []:
        return tuple(range(value.ndim))
    dims = tuple(dim) if isinstance(dim, tuple | list) else (dim,)
    return tuple(place(value.ndim, one) for one in dims)


def place(rank: int, dim) -> int:
    """One axis, counted from the left."""
    if not isinstance(dim, int) or not -max(rank, 1) <= dim < max(rank, 1):
        raise Untranslatable(f"there is no axis {dim} in a tensor with {rank} axes")
    return dim % max(rank, 1)


def reduce(
    value: Value, dim, keepdim: bool, function: Callable[[Expr, tuple[Idx, ...]], Expr]
) -> Value:
    """Bind the indices of some axes; ``function`` gets the expression and them, innermost first."""
    gone = places(value, dim) if value.ndim else ()
    indices = tuple(idx for axis in reversed(sorted(gone)) for idx in reversed(value.axes[axis]))
    axes = tuple(
        () if position in gone else axis
        for position, axis in enumerate(value.axes)
        if keepdim or position not in gone
    )
    return Value(function(value.expression, indices), axes)


def regroup(value: Value, sizes: Sequence[Expr]) -> Value:
    """Read the entries in row-major order under another shape; one size may be -1."""
    got, total_size = list(sizes), Mul(*value.shape)
    if got.count(-1) == 1:
        got[got.index(-1)] = total_size / -Mul(*got)
    wanted = f"cannot view the shape {show(value.shape)} as {show(sizes)}"
    if Mul(*got) != total_size or not all(map(is_size, got)):
        raise Untranslatable(
            f"{wanted}: declare an axis that is split as a product of names,"
            ' such as h="(heads block)",'
            " and read the sizes from `.shape`"
        )
    queue = [idx for axis in value.axes for idx in axis]
    parts: dict[Idx, list[Idx]] = {idx: [idx] for idx in queue}
    source = {idx: idx for idx in queue}
    axes = []
    for size in got:
        axis: list[Idx] = []
        while product(axis) != size:
            idx, left = queue.pop(0), size / product(axis)
            if not is_size(left / size_of(idx)):
                if not is_size(size_of(idx) / left):
                    raise Untranslatable(f"{wanted}: the sizes do not line up in row-major order")
                head, tail = fresh(left)[0], fresh(size_of(idx) / left)[0]
                origin = source[idx]
                source[head] = source[tail] = origin
                parts[origin][-1:] = [head, tail]
                queue.insert(0, tail)
                idx = head
            axis.append(idx)
        axes.append(tuple(axis))
    names = {idx: join(tuple(pieces)) for idx, pieces in parts.items() if len(pieces) > 1}
    return Value(relabel(value.expression, names), tuple(axes))


def stretch(value: Value, sizes: Sequence[Expr]) -> Value:
    """Repeat axes of size 1, and new ones on the left, up to the given sizes; -1 keeps an axis."""
    missing = len(sizes) - value.ndim
    axes = ((),) * missing + value.axes
    if missing < 0 or any(
        axis and size not in (-1, product(axis)) for axis, size in zip(axes, sizes, strict=True)
    ):
        raise Untranslatable(f"cannot expand the shape {show(value.shape)} to {show(sizes)}")
    return Value(
        value.expression,
        tuple(
            axis or (() if size == -1 else fresh(size))
            for axis, size in zip(axes, sizes, strict=True)
        ),
    )


def as_size(value) -> Expr:
    """A size argument of view, reshape or expand."""
    if isinstance(value, Value) and not value.axes:
        return value.expression
    if isinstance(value, int) and value in (-1, 1):
        return as_expression(value)
    raise Untranslatable(
        f"the size {value} is not a named one: read it from `.shape`, as in `heads = Q.shape[0]`"
    )
