"""Rotations and lookups: what a program makes of the positions of tokens."""

from __future__ import annotations

from typing import Protocol

from sympy import Expr, Idx
from torch import fx

from ..language.positions import Lookup, Rope
from . import kernels
from .ops import Ops
from .values import Value, moves_with_token, rank_of_axis


class Host(Protocol):
    """What rotations and lookups need of the emitter that they work for."""

    ops: Ops

    def lower(self, expression: Expr) -> Value:
        """The value of an expression; emitted once."""

    def size(self, idx: Idx) -> int:
        """The length of an axis."""

    def input(self, name: str) -> fx.Node:
        """An input of the program by name."""


class Places:
    """Emits rotations, with one table of angles for all that share it, and lookups."""

    def __init__(self, host: Host) -> None:
        self.host, self.ops = host, host.ops
        self.angles: dict[tuple, fx.Node] = {}

    def rotation(self, expression: Rope) -> Value:
        idx, inverse = expression.index, expression.position.could_extract_minus_sign()
        value = self.host.lower(expression.body)
        if idx not in value.axes:
            node = self.ops.call("unsqueeze", value.node, -1)
            node = self.ops.call("expand", node, *(-1 for _ in value.axes), self.host.size(idx))
            value = Value(node, (*value.axes, idx))
        where = self.host.lower(-expression.position if inverse else expression.position)
        rows = tuple(axis for axis in self.ops.union([value, where]) if axis != idx)
        node = self.ops.full(value, (*rows, idx))
        turns = self.turns(expression, where, rows)
        flags = (expression.interleaved, inverse)
        node = self.ops.call(kernels.rotate, node, turns, *flags, name="rotated")
        return Value(node, (*rows, idx))

    def turns(self, expression: Rope, where: Value, rows: tuple[Idx, ...]) -> fx.Node:
        """Cosines and sines of a rotation, once for all that share them, laid out for ``rows``."""
        rates, size = expression.rates(self.host.size(expression.index))
        missing = tuple(n for n, axis in enumerate(rows) if axis not in where.axes)
        lead = next((n for n in range(len(rows)) if n not in missing), len(rows))
        spread = tuple(position - lead for position in missing[lead:])
        key = (where.node, rates, size, expression.interleaved, spread)
        if key not in self.angles:
            like = self.host.input("h")
            self.angles[key] = self.ops.call(kernels.turns, *key, like, name="angles")
        return self.angles[key]

    def lookup(self, expression: Lookup) -> Value:
        body, idx, number = expression.args
        value, where = self.host.lower(body), self.host.lower(number)
        if set(value.axes) & set(where.axes) or any(map(moves_with_token, (body,))):
            raise ValueError(
                f"`lookup` reads an array of parameters at a number that shares no index with it: got {expression}"
            )
        rest = [axis for axis in value.axes if axis != idx]
        node = self.ops.permute(value, (*rest, idx)).node
        node = self.ops.call(kernels.lookup, node, where.node, name="looked_up")
        axes = (*rest, *where.axes)
        order = tuple(sorted(axes, key=rank_of_axis))
        return self.ops.permute(Value(node, axes), order)
