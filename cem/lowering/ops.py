"""Tensor operations on values with named axes: alignment, products, contractions, reductions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from sympy import Idx
from torch import fx
from torch.nn import functional as F

from .values import TYPICAL, TYPICAL_SEQ, Value, is_seq, rank_of_axis

VIEWS = {"flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze", "expand"}
"""Tensor methods that show the same numbers in another layout."""

WIDTHS = "widths"
"""In the ``meta`` of a product of features with a matrix: how many features it takes and gives."""


def product_name(left: Value, right: Value) -> str | None:
    """A product is called as its factors, ``u_silu``, while that stays short."""
    if left.is_number or right.is_number:
        return None
    parts = [shown(value.node).name.lower() for value in (left, right)]
    name = "_".join(parts)
    return name if len(name) <= 12 else None


def shown(node: fx.Node) -> fx.Node:
    """The node that a chain of views shows."""
    while node.op == "call_method" and node.target in VIEWS:
        node = node.args[0]
    return node


class Ops:
    """Appends torch operations on named axes to a graph."""

    def __init__(self, graph: fx.Graph, size: Callable[[Idx], int]) -> None:
        self.graph = graph
        self.size = size
        self.kernels: set[str] = set()
        self.kept: dict[fx.Node, str] = {}

    def call(self, target, *args, name: str | None = None, **kwargs) -> fx.Node:
        if isinstance(target, str):
            return self.graph.create_node("call_method", target, args, kwargs, name=name)
        return self.graph.create_node("call_function", target, args, kwargs, name=name)

    def keep(self, node: fx.Node, how: str) -> None:
        """Mark what a decoder keeps of the context: ``"append"`` along the tokens, ``"state"``, or the ``"new"``."""
        self.kept.setdefault(node, how)

    # -- layout ---------------------------------------------------------------------------------------------

    def permute(self, value: Value, axes: Sequence[Idx]) -> Value:
        """The same value with its axes in another order."""
        axes = tuple(axes)
        if value.axes == axes:
            return value
        order = [value.axes.index(axis) for axis in axes]
        moved = [n for n, old in enumerate(order) if n != old]
        if len(moved) == 2:
            node = self.call("transpose", value.node, *moved)
        else:
            node = self.call("permute", value.node, *order)
        return Value(node, axes)

    def flatten(self, node: fx.Node, start: int, count: int) -> fx.Node:
        """Merge ``count`` neighbouring axes into one; an empty group becomes an axis of size 1."""
        if count == 1:
            return node
        if count == 0:
            return self.call("unsqueeze", node, start)
        return self.call("flatten", node, start, start + count - 1)

    def unflatten(self, node: fx.Node, axis: int, group: Sequence[Idx]) -> fx.Node:
        """Undo ``flatten`` for the axes in ``group``."""
        if len(group) == 1:
            return node
        if not group:
            return self.call("squeeze", node, axis)
        return self.call("unflatten", node, axis, tuple(map(self.size, group)))

    def grouped(self, value: Value, groups: Sequence[Sequence[Idx]]) -> fx.Node:
        """A node with one axis per group of axes, in the order of the groups."""
        node = self.permute(value, [axis for group in groups for axis in group]).node
        for position, group in enumerate(groups):
            node = self.flatten(node, position, len(group))
        return node

    def spread(self, value: Value, axes: Sequence[Idx]) -> fx.Node:
        """A node that broadcasts against the layout ``axes``, with size 1 for the axes it lacks."""
        value = self.permute(value, [axis for axis in axes if axis in value.axes])
        missing = [n for n, axis in enumerate(axes) if axis not in value.axes]
        node = value.node
        # Leading axes are added by broadcasting itself.
        lead = 0
        while lead in missing:
            lead += 1
        for position in missing[lead:]:
            node = self.call("unsqueeze", node, position - lead)
        return node

    def full(self, value: Value, axes: Sequence[Idx]) -> fx.Node:
        """As ``spread``, with the leading axes too."""
        node = self.spread(value, axes)
        for _ in range(next((n for n, axis in enumerate(axes) if axis in value.axes), len(axes))):
            node = self.call("unsqueeze", node, 0)
        return node

    @staticmethod
    def union(values: Iterable[Value]) -> tuple[Idx, ...]:
        """The common layout of several values: leading axes first, the others as the widest value has them."""
        axes: dict[Idx, None] = {}
        for value in sorted(values, key=lambda value: -len(value.axes)):
            axes.update(dict.fromkeys(value.axes))
        return tuple(sorted(axes, key=rank_of_axis))

    def align(self, *values: Value) -> tuple[list[fx.Node | float], tuple[Idx, ...]]:
        axes = self.union(values)
        return [v.node if v.is_number else self.spread(v, axes) for v in values], axes

    # -- element-wise ---------------------------------------------------------------------------------------

    def binary(self, target, left: Value, right: Value, name: str | None = None) -> Value:
        if left.is_number and right.is_number:
            return Value(target(left.node, right.node))
        (a, b), axes = self.align(left, right)
        return Value(self.call(target, a, b, name=name), axes)

    def multiply(self, left: Value, right: Value) -> Value:
        for one, other in ((left, right), (right, left)):
            if one.is_number and one.node == 1:
                return other
            if one.is_number and one.node == -1 and not other.is_number:
                return Value(self.call(torch.neg, other.node), other.axes)
        return self.binary(operator.mul, left, right, product_name(left, right))

    # -- contraction ----------------------------------------------------------------------------------------

    def cost(self, axes: Iterable[Idx]) -> int:
        return math.prod(
            TYPICAL.get(axis) or (TYPICAL_SEQ if is_seq(axis) else self.size(axis)) for axis in axes
        )

    def contract(
        self, factors: Sequence[Value], over: frozenset[Idx], name: str | None = None
    ) -> Value:
        """The product of all factors, summed over the indices ``over``, cheapest pair first."""
        numbers = [f.node for f in factors if f.is_number]
        work = [f for f in factors if not f.is_number]
        if not work:
            return Value(math.prod(numbers) * math.prod(map(self.size, over)))
        if len(work) == 1:
            work = [self.sum(work[0], over)]
        while len(work) > 1:
            best = None
            for i in range(len(work)):
                for j in range(i + 1, len(work)):
                    pair = set(work[i].axes) | set(work[j].axes)
                    others = {
                        axis for n, f in enumerate(work) if n not in (i, j) for axis in f.axes
                    }
                    gone = (over & pair) - others
                    price = (self.cost(pair), self.cost(pair - gone), i, j)
                    if best is None or price < best[0]:
                        best = (price, i, j, gone)
            _, i, j, gone = best
            merged = self.pair(work[i], work[j], frozenset(gone), name if len(work) == 2 else None)
            work = [f for n, f in enumerate(work) if n not in (i, j)] + [merged]
        result = work[0]
        scale = math.prod(numbers)
        return result if scale == 1 else self.multiply(Value(scale), result)

    def sum(self, value: Value, over: Iterable[Idx]) -> Value:
        positions = tuple(value.axes.index(axis) for axis in over)
        if not positions:
            return value
        rest = tuple(axis for axis in value.axes if axis not in over)
        return Value(self.call("sum", value.node, tuple(sorted(positions))), rest)

    def pair(self, left: Value, right: Value, over: frozenset[Idx], name: str | None) -> Value:
        shared = frozenset(left.axes) & frozenset(right.axes)
        alone = over - shared
        left = self.sum(left, alone & frozenset(left.axes))
        right = self.sum(right, alone & frozenset(right.axes))
        over = over & shared
        if not over:
            return self.multiply(left, right)
        if shared == over:
            for weight, features in ((right, left), (left, right)):
                if not any(rank_of_axis(axis) < 3 for axis in weight.axes):
                    return self.linear(features, weight, over, name)
        return self.einsum(left, right, over, name)

    def linear(
        self, features: Value, weight: Value, over: frozenset[Idx], name: str | None
    ) -> Value:
        """Features times a weight that has no axis in common with them but the summed ones."""
        self.kernels.add("matmul")
        inner = [axis for axis in weight.axes if axis in over]
        outer = [axis for axis in weight.axes if axis not in over]
        keep = [axis for axis in features.axes if axis not in over]
        keep.sort(key=rank_of_axis)
        x = self.grouped(features, [*([axis] for axis in keep), inner])
        if not outer:
            node = self.call(torch.matmul, x, self.grouped(weight, [inner]), name=name)
        elif list(weight.axes[: len(inner)]) == inner:
            node = self.call(torch.matmul, x, self.grouped(weight, [inner, outer]), name=name)
        else:
            node = self.call(F.linear, x, self.grouped(weight, [outer, inner]), name=name)
        if outer:
            node.meta[WIDTHS] = tuple(math.prod(map(self.size, axes)) for axes in (inner, outer))
        if len(outer) > 1:
            node = self.unflatten(node, -1, outer)
        return Value(node, (*keep, *outer))

    def einsum(self, left: Value, right: Value, over: frozenset[Idx], name: str | None) -> Value:
        self.kernels.add("einsum")
        axes = self.union([left, right])
        letters = {axis: chr(ord("a") + n) for n, axis in enumerate(axes)}
        out = tuple(axis for axis in axes if axis not in over)
        spell = ["".join(letters[axis] for axis in group) for group in (left.axes, right.axes, out)]
        equation = f"{spell[0]},{spell[1]}->{spell[2]}"
        return Value(self.call(torch.einsum, equation, left.node, right.node, name=name), out)

    # -- reductions over one axis ---------------------------------------------------------------------------

    def reduce(
        self, target, value: Value, axis: Idx, visible: Value | None, keep: bool, *options: float
    ) -> Value:
        """Apply a reduction (or, with ``keep``, a normalisation) to one axis, masked where ``visible`` is given."""
        if visible is None:
            if axis not in value.axes:
                node = self.call("unsqueeze", value.node, -1)
                node = self.call("expand", node, *(-1 for _ in value.axes), self.size(axis))
                value = Value(node, (*value.axes, axis))
            position = value.axes.index(axis)
            axes = value.axes if keep else value.axes[:position] + value.axes[position + 1 :]
            return Value(self.call(target, value.node, position, *options), axes)
        axes = self.union([value, visible])
        position = axes.index(axis)
        # A leading axis that only the mask has must exist before the reduction counts its axes.
        node, mask = self.full(value, axes), self.full(visible, axes)
        out = axes if keep else axes[:position] + axes[position + 1 :]
        return Value(self.call(target, node, mask, position, *options), out)
