"""Free and bound indices of an expression, and other names for them."""

from __future__ import annotations

from functools import cache, lru_cache

from sympy import Basic, Dummy, Expr, Idx, Indexed, Sum, Symbol

from .positions import Lookup, Rope
from .reductions import Reduction, SmoothMaximum, Weights
from .symbols import NamedArray, Ravel, size_of, split, total
from .tokens import Decay, TokenSum
from .words import Activation

Indices = frozenset[Idx]

LETTERS = {
    "dim": "ijkl",
    "seq": "su",
    "heads": "ac",
    "rank": "rq",
    "hidden": "mn",
    "block": "bp",
    "groups": "gf",
    "tokens": "no",
}
"""Names of bound indices by the name of their size; any other size uses its own first letter."""


@cache
def bound_name(size: Expr, height: int) -> Idx:
    """The index over ``size`` that a reduction binds at a given nesting height."""
    name = str(size) if isinstance(size, Symbol) else "dim"
    letters = LETTERS.get(name, next((c for c in name if c.isalpha()), "n"))
    label = letters[height] if height < len(letters) else f"{letters[0]}{height}"
    return Idx(Symbol(label, integer=True), size)


@lru_cache(maxsize=65536)
def free_indices(expression: Expr) -> Indices:
    """The indices that an expression depends on and does not bind."""
    match expression:
        case Idx():
            return frozenset((expression,))
        case Sum():
            return free_indices(expression.function) - {limit[0] for limit in expression.limits}
        case SmoothMaximum() | TokenSum():
            return free_indices(expression.body) - {expression.index}
        case Weights() | Decay():
            return free_indices(expression.body) | {expression.index}
        case Ravel():
            body, slot, idx = expression.args
            return (free_indices(body) - frozenset(split(slot))) | {idx}
        case Lookup():
            body, idx, number = expression.args
            return (free_indices(body) - {idx}) | free_indices(number)
        case Indexed():
            return frozenset().union(*map(free_indices, expression.indices))
        case NamedArray() | Symbol():
            return frozenset()
    if not expression.args:
        return frozenset()
    return frozenset().union(*map(free_indices, expression.args))


def rename(expression: Expr, names: dict[Idx, Expr]) -> Expr:
    """Replace free indices; bound ones of the same name stay."""
    names = {old: new for old, new in names.items() if old in free_indices(expression)}
    if not names:
        return expression
    return Renamer().visit(expression, names)


class Renamer:
    """Rebuilds an expression with other free indices; a binder that would capture one gets a fresh index."""

    def __init__(self) -> None:
        self.memo: dict[tuple[Expr, tuple], Expr] = {}

    def visit(self, expression: Expr, names: dict[Idx, Expr]) -> Expr:
        free = free_indices(expression)
        key = (expression, tuple((old, names[old]) for old in names if old in free))
        if key not in self.memo:
            self.memo[key] = self.build(expression, names)
        return self.memo[key]

    def bind(self, idx: Idx, names: dict[Idx, Expr]) -> tuple[Idx, dict[Idx, Expr]]:
        names = {old: new for old, new in names.items() if old != idx}
        if any(idx in free_indices(new) for new in names.values()):
            return self.fresh(idx, names)
        return idx, names

    @staticmethod
    def fresh(idx: Idx, names: dict[Idx, Expr]) -> tuple[Idx, dict[Idx, Expr]]:
        own = Idx(Dummy(idx.label.name, integer=True), size_of(idx))
        return own, {**names, idx: own}

    def build(self, expression: Expr, names: dict[Idx, Expr]) -> Expr:
        match expression:
            case Idx():
                return names.get(expression, expression)
            case Indexed():
                return Indexed(
                    expression.base, *(slot.xreplace(names) for slot in expression.indices)
                )
            case Sum():
                fresh = []
                for limit in reversed(expression.limits):
                    idx, names = self.bind(limit[0], names)
                    fresh.append(idx)
                return self.sum(self.visit(expression.function, names), tuple(reversed(fresh)))
            case SmoothMaximum() | TokenSum():
                idx, inner = self.bind(expression.index, names)
                return expression.func(
                    self.visit(expression.body, inner), idx, *expression.args[2:]
                )
            case Weights() | Decay():
                # The index stays free; it is renamed with its body.
                idx = names.get(expression.index, expression.index)
                return expression.func(
                    self.visit(expression.body, names), idx, *expression.args[2:]
                )
            case Ravel():
                body, slot, idx = expression.args
                inner = names
                for old in split(slot):
                    _, inner = self.bind(old, inner)
                return self.ravel(
                    self.visit(body, inner), slot.xreplace(inner), names.get(idx, idx)
                )
            case Lookup():
                body, idx, number = expression.args
                idx, inner = self.bind(idx, names)
                return Lookup(self.visit(body, inner), idx, self.visit(number, names))
            case Rope():
                args = (self.visit(arg, names) for arg in expression.args[1:])
                return self.rope(self.visit(expression.body, names), *args)
        if expression.is_Float:
            return self.number(expression)
        if not expression.args or not has_parts(expression):
            return expression
        return self.node(expression, [self.visit(arg, names) for arg in expression.args])

    def sum(self, body: Expr, indices: tuple[Idx, ...]) -> Expr:
        return total(body, indices)

    def ravel(self, body: Expr, slot: Expr, idx: Expr) -> Expr:
        return Ravel(body, slot, idx)

    def rope(self, body: Expr, *options: Expr) -> Expr:
        return Rope(body, *options)

    def number(self, expression: Expr) -> Expr:
        return expression

    def node(self, expression: Expr, args: list[Expr]) -> Expr:
        return expression.func(*args)


@lru_cache(maxsize=65536)
def has_parts(expression: Basic) -> bool:
    """Whether a walk has anything to change below this node."""
    if (
        isinstance(
            expression,
            Idx | Sum | Reduction | Ravel | Rope | Lookup | Activation,
        )
        or expression.is_Float
    ):
        return True
    return any(map(has_parts, expression.args))


def bound_indices(node: Basic) -> tuple[Idx, ...]:
    """The indices that this node itself binds."""
    match node:
        case Sum():
            return tuple(limit[0] for limit in node.limits)
        case SmoothMaximum() | TokenSum():
            return (node.index,)
        case Ravel():
            return split(node.args[1])
        case Lookup():
            return (node.args[1],)
    return ()
