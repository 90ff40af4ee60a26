"""Features of tokens and of context tokens in the layout of kernels: (batch, heads, tokens, width)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Protocol

import torch
from sympy import Expr, Idx
from torch import fx

from . import kernels
from .bilinear import EXACT, Feature
from .ops import Ops
from .values import BATCH, TOKEN, Value, is_placed


class Host(Protocol):
    """What a pattern needs of the emitter that it works for."""

    ops: Ops
    flex: bool
    reasons: dict[str, None]

    def lower(self, expression: Expr) -> Value:
        """The value of an expression; emitted once."""

    def constant(self, expression: Expr) -> float | int | None:
        """The number an expression stands for, or None."""

    def size(self, idx: Idx) -> int:
        """The length of an axis."""

    def input(self, name: str) -> fx.Node:
        """An input of the program by name."""


class Features:
    """Emits features side by side."""

    def __init__(self, host: Host) -> None:
        self.emitter, self.ops = host, host.ops

    def pairs(self, value: Value, heads: tuple[Idx, ...], s: Idx) -> fx.Node:
        """A value of pairs of tokens as (batch or 1, heads or 1, tokens, seq)."""
        ops, layout = self.ops, (BATCH, *heads, TOKEN, s)
        if any(axis in heads for axis in value.axes):
            missing = [axis for axis in heads if axis not in value.axes]
            node = ops.full(value, (*missing, *(a for a in layout if a not in missing)))
            shape = [self.emitter.size(axis) for axis in missing]
            if missing:
                node = ops.call("expand", node, *shape, *(-1 for _ in layout[len(missing) :]))
            value = Value(node, (*missing, *(a for a in layout if a not in missing)))
            value = ops.permute(value, layout)
            return ops.flatten(value.node, 1, len(heads))
        return ops.call("unsqueeze", ops.full(value, (BATCH, TOKEN, s)), 1)

    def context_features(
        self, features: Sequence[Feature], heads: tuple[Idx, ...], s: Idx, name: str
    ) -> fx.Node:
        """Context features side by side as (batch, heads, seq, width)."""
        ops, parts = self.ops, []
        for feature in features:
            value = ops.contract(list(map(self.emitter.lower, feature.factors)), frozenset())
            if EXACT in feature.axes:
                node = ops.call(kernels.exact_parts, value.node, self.emitter.input("x"))
                value = Value(node, (*value.axes, EXACT))
            parts.append((self.settled(value, feature.factors, "x"), feature.axes))
        return self.side_by_side(parts, heads, s, name)

    def settled(self, value: Value, factors: Sequence[Expr], like: str) -> Value:
        """A feature made of positions in the type of the other features, one row a sequence."""
        if value.is_number or not any(map(is_placed, factors)) or EXACT in value.axes:
            return value
        node = self.ops.call(kernels.settled, value.node, self.emitter.input(like))
        return Value(node, value.axes)

    def width(self, feature: Feature) -> int:
        return math.prod(map(self.emitter.size, feature.axes))

    def side_by_side(self, parts, heads: tuple[Idx, ...], position: Idx, name: str) -> fx.Node:
        """Features side by side as (batch, heads, position, width)."""
        ops = self.ops
        nodes = []
        for value, inner in parts:
            layout = (BATCH, position, *heads, *inner)
            value = self.expand(value, layout)
            by_columns = inner and value.axes[-1] != layout[-1]
            value = ops.permute(value, layout)
            if by_columns and len(parts) == 1:
                # Fused kernels read rows.
                value = Value(ops.call("contiguous", value.node), layout)
            nodes.append(ops.grouped(value, [[BATCH], [position], heads, inner]))
        # Heads move to the front last: concatenation then reads and writes whole rows.
        node = nodes[0] if len(nodes) == 1 else ops.call(torch.cat, nodes, -1, name=name)
        return ops.call("transpose", node, 1, 2)

    def expand(self, value: Value, axes: tuple[Idx, ...]) -> Value:
        """Repeat a feature along the axes it lacks."""
        ops, emitter = self.ops, self.emitter
        missing = [axis for axis in axes if axis not in value.axes]
        if not missing:
            return value
        lead = axes[:2]
        if not set(lead) <= set(value.axes):
            like = emitter.input("h" if TOKEN in lead else "x")
            ones = ops.call(torch.ones_like, ops.call("select", like, -1, 0), name="ones")
            value = ops.binary(operator.mul, Value(ones, lead), value)
            missing = [axis for axis in axes if axis not in value.axes]
        order = [axis for axis in axes if axis in value.axes]
        node = ops.permute(value, order).node
        for position, axis in enumerate(axes):
            if axis not in value.axes:
                node = ops.call("unsqueeze", node, position)
        shape = [emitter.size(axis) if axis in missing else -1 for axis in axes]
        return Value(ops.call("expand", node, *shape), axes)
