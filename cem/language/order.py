"""In which order the terms of a sum and the factors of a product are shown."""

from __future__ import annotations

from sympy import Add, Expr, Indexed, Integer, Mul, Pow, Sum, Symbol

from . import symbols
from .reductions import SmoothMaximum
from .symbols import Ravel


def terms(expression: Expr) -> list[Expr]:
    """The terms of a sum in the order in which they are shown: short ones first, a minus last."""

    def key(term: Expr):
        reductions = len(term.atoms(Sum, SmoothMaximum, Ravel))
        whole = (is_negative(term), term.has(Ravel), reductions, not term.is_number)
        return (*whole, term.count_ops(), str(term))

    return sorted(Add.make_args(expression), key=key)


def is_negative(term: Expr) -> bool:
    return parts(term)[0] < 0


def negated(term: Expr) -> Expr:
    return Ravel(-term.args[0], *term.args[1:]) if isinstance(term, Ravel) else -term


def place(factor: Expr) -> tuple[int, str]:
    """Where a factor stands in a product: scalars, parameters, words, state, context, sums."""
    base = factor.base if isinstance(factor, Pow) else factor
    match base:
        case Symbol():
            rank = 0 if isinstance(base, symbols.Scalar) else 1
        case Indexed():
            kinds = {symbols.Parameter: 2, symbols.Frozen: 5, symbols.State: 6, symbols.Context: 7}
            rank = kinds.get(type(base.base), 6)
        case Add():
            rank = 4
        case Sum():
            of_context = any(
                isinstance(entry.base, symbols.Context) for entry in base.atoms(Indexed)
            )
            rank = 10 if of_context else 9
        case SmoothMaximum():
            rank = 8
        case _:
            rank = 1 if base.is_number else 3
    return rank, str(factor)


def parts(product: Expr) -> tuple[int, Expr, list[Expr], list[Expr]]:
    """The sign, the positive number, the factors above and those below the line of a product."""
    number, sign = Integer(1), 1
    above: list[Expr] = []
    below: list[Expr] = []
    for factor in Mul.make_args(product):
        if factor.is_Rational or factor.is_Float:
            number = number * factor
        elif isinstance(factor, Ravel) and is_negative(factor.args[0]):
            number = -number
            above.append(negated(factor))
        elif isinstance(factor, Pow) and is_negative(factor.exp):
            below.append(Pow(factor.base, -factor.exp))
        else:
            above.append(factor)
    if number.is_negative:
        sign, number = -1, -number
    return sign, number, sorted(above, key=place), sorted(below, key=place)
