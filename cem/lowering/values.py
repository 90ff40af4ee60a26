"""What an emitted node stands for: a torch.fx node together with the name of each of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sympy import Add, Expr, Idx, Indexed, Mul, Sum
from torch import fx

from ..language.indices import free_indices
from ..language.positions import ContextPosition, Rope, TokenPosition
from ..language.reductions import SmoothMaximum, Weights
from ..language.symbols import (
    SEQ,
    Context,
    Dim,
    Direction,
    Frozen,
    NamedArray,
    Parameter,
    State,
    index,
    size_of,
)
from ..language.tokens import Decay

BATCH = index("batch", Dim("batch"))
TOKEN = index("token", Dim("tokens"))

# Sizes that are unknown until a batch arrives, for choosing the order of a product.
TYPICAL = {BATCH: 8, TOKEN: 512}
TYPICAL_SEQ = 512


@dataclass(frozen=True)
class Value:
    """A node and its axes, slowest first. A Python number has no axes."""

    node: fx.Node | float | int
    axes: tuple[Idx, ...] = ()

    @property
    def is_number(self) -> bool:
        return not isinstance(self.node, fx.Node)


def is_seq(idx: Idx) -> bool:
    """Whether an index runs over the context tokens."""
    return size_of(idx) == SEQ


def rank_of_axis(idx: Idx) -> int:
    """Order of the leading axes in every layout: batch, token, context token, then the rest."""
    if idx == BATCH:
        return 0
    if idx == TOKEN:
        return 1
    return 2 if is_seq(idx) else 3


def sources(expression: Expr) -> frozenset[type[NamedArray] | str]:
    """What an expression is computed from: kinds of arrays, and "visible" where a reduction is masked."""
    found: set = set()
    stack = [expression]
    while stack:
        node = stack.pop()
        if isinstance(node, Indexed):
            if isinstance(node.base, State | Frozen | Direction | Context | ContextPosition):
                found.add(type(node.base))
            continue
        if isinstance(node, TokenPosition):
            found.add(TokenPosition)
        if node == SEQ or any(is_seq(idx) for idx in _reduced(node)):
            found.add("visible")
        stack.extend(arg for arg in node.args if isinstance(arg, Expr) and not isinstance(arg, Idx))
    return frozenset(found)


def _reduced(node: Expr) -> frozenset[Idx]:
    """Indices over which this node itself reduces."""
    match node:
        case Sum():
            return frozenset(limit[0] for limit in node.limits)
        case SmoothMaximum() | Weights() | Decay():
            return frozenset((node.index,))
    return frozenset()


def moves_with_token(expression: Expr) -> bool:
    """Whether the value differs from token to token (through the state, its position or the visible set)."""
    return bool(sources(expression) & {State, Frozen, Direction, TokenPosition, "visible"})


def is_placed(expression: Expr) -> bool:
    """Whether positions are computed with outside rotations, in float32 at least."""
    if isinstance(expression, Rope):
        return is_placed(expression.body)
    if isinstance(expression, SmoothMaximum | Weights) and is_seq(expression.index):
        return False
    if isinstance(expression, Indexed):
        return isinstance(expression.base, ContextPosition)
    if isinstance(expression, TokenPosition):
        return True
    return any(is_placed(arg) for arg in expression.args if isinstance(arg, Expr))


def joined(
    factors: Sequence[Expr], over: frozenset[Idx]
) -> tuple[tuple[Expr, ...], frozenset[Idx]]:
    """A product below a sum with one of its factors, a sum that writes, opened into it.

    Where a parameter writes what was computed for every index of the outer sum, and another factor weighs that
    index, the weight goes to the narrow side first: sum_a g_a sum_r Q_ard v_ar is sum_ar Q_ard (g_a v_ar), or
    sum_ar (g_a Q_ard) v_ar where g is a parameter.
    """
    for place, factor in enumerate(factors):
        others = (*factors[:place], *factors[place + 1 :])
        if not isinstance(factor, Sum) or not _writes(factor, over):
            continue
        bound = frozenset(limit[0] for limit in factor.limits)
        taken = over.union(*map(free_indices, others))
        weighed = any(free_indices(f) & over for f in others)
        if weighed and not bound & taken and not any(map(is_seq, bound)):
            return (*others, *Mul.make_args(factor.function)), over | bound
    return tuple(factors), over


def gathered(terms: Sequence[Expr]) -> list[Expr]:
    """Sums in which parameters weigh the same moving product, as one: sum_m f_m U_md + sum_m f_m D_md is
    sum_m f_m (U_md + D_md), one product of matrices for two."""
    found: dict[tuple, list[Expr]] = {}
    for term in terms:
        inside = [factor for factor in Mul.make_args(term) if isinstance(factor, Sum)]
        key, weight = (term,), term
        if len(inside) == 1 and not any(map(is_seq, _reduced(inside[0]))):
            parts = Mul.make_args(inside[0].function)
            moving = Mul(*(part for part in parts if moves_with_token(part)))
            outer = term / inside[0]
            if moving != 1 and moving != inside[0].function and not moves_with_token(outer):
                key, weight = (moving, inside[0].limits), outer * inside[0].function / moving
        found.setdefault(key, []).append(weight)
    return [
        weights[0] if len(key) == 1 else Sum(key[0] * Add(*weights), *key[1])
        for key, weights in found.items()
    ]


def _writes(factor: Sum, over: frozenset[Idx]) -> bool:
    """Whether a parameter with an index of its own contracts what moves and is no entry of an input."""
    parts = Mul.make_args(factor.function)
    weights = [p for p in parts if isinstance(p, Indexed) and isinstance(p.base, Parameter)]
    moving = [p for p in parts if moves_with_token(p)]
    own = frozenset().union(*map(free_indices, weights)) - frozenset().union(
        *map(free_indices, moving)
    )
    return bool(own - over) and not any(isinstance(p, Indexed) for p in moving)
