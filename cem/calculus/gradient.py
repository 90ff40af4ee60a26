"""Reverse-mode differentiation of an energy for its state.

The adjoint of a sub-expression is an expression with the same free indices: what its value at those indices
contributes to the energy. A product hands each factor the product of the others, summed over the indices that
the factor lacks. Nothing is expanded, so products of matrices stay products of matrices.
"""

from __future__ import annotations

from functools import lru_cache

from sympy import Add, Expr, Idx, Indexed, Integer, Mul, Pow, Sum, log

from ..language.canonical import canonical, free_indices, rename
from ..language.symbols import LogSumExp, Ravel, Softmax, State, index, is_word, spelling, split, total
from ..language.words import word_of


@lru_cache(maxsize=65536)
def depends_on_state(expression: Expr) -> bool:
    """Whether a sub-expression moves with the state (frozen values and the context do not)."""
    if isinstance(expression, Indexed):
        return isinstance(expression.base, State)
    return any(depends_on_state(arg) for arg in expression.args if isinstance(arg, Expr))


def output_index(width: Expr) -> Idx:
    """The free index of a gradient: d, over the width of the state."""
    return index("d", width)


def gradient(energy: Expr, width: Expr) -> Expr:
    """dE/dh_d of a canonical energy, in canonical form.

    ``energy`` has no free index; the result has one, ``output_index(width)``. It points uphill.

    >>> from sympy import Sum
    >>> import cem
    >>> dim = cem.dims("dim")
    >>> h, i = cem.state(dim), dim.index("i")
    >>> gradient(canonical(Sum(h[i]**2, i) / 2), dim)
    h[d]
    """
    free = output_index(width)
    leaves: list[Expr] = []
    adjoints: dict[Expr, Expr] = {energy: Integer(1)}
    for node in reversed(_topological(energy)):
        adjoint = adjoints.pop(node)
        if isinstance(node, Indexed):
            leaves.append(_scatter(node.indices[0], adjoint, free))
            continue
        for child, pushed in _pull_back(node, adjoint):
            if depends_on_state(child):
                missing = free_indices(pushed) - free_indices(child)
                pushed = total(pushed, sorted(missing, key=spelling))
                adjoints[child] = adjoints.get(child, Integer(0)) + pushed
    return canonical(Add(*leaves))


def _topological(root: Expr) -> list[Expr]:
    """The sub-expressions that move with the state, each after its own parts."""
    order: list[Expr] = []
    seen: set[Expr] = set()

    def visit(node: Expr) -> None:
        if node in seen or not depends_on_state(node):
            return
        seen.add(node)
        if not isinstance(node, Indexed):
            for child in node.args:
                if isinstance(child, Expr):
                    visit(child)
        order.append(node)

    visit(root)
    return order


def _scatter(slot: Expr, adjoint: Expr, free: Idx) -> Expr:
    """The contribution of one leaf h[slot] to the gradient at the free index."""
    indices = split(slot)
    if len(indices) == 1:
        return rename(adjoint, {indices[0]: free})
    return Ravel(adjoint, slot, free)


def _pull_back(node: Expr, adjoint: Expr):
    """Pairs of (part, what the adjoint of the node gives it)."""
    match node:
        case Add():
            for term in node.args:
                yield term, adjoint
        case Mul():
            for position, factor in enumerate(node.args):
                if depends_on_state(factor):
                    others = node.args[:position] + node.args[position + 1 :]
                    yield factor, adjoint * Mul(*others)
        case Pow():
            base, exponent = node.args
            if depends_on_state(base):
                yield base, adjoint * exponent * Pow(base, exponent - 1)
            if depends_on_state(exponent):
                yield exponent, adjoint * node * log(base)
        case Sum():
            yield node.function, adjoint
        case LogSumExp():
            yield node.body, adjoint * Softmax(node.body, node.index)
        case Softmax():
            mean = total(node * adjoint, (node.index,))
            yield node.body, node * (adjoint - mean)
        case Ravel():
            body, slot, idx = node.args
            yield body, rename(adjoint, {idx: slot})
        case _ if is_word(node):
            yield node.args[0], adjoint * word_of(node.func).derivative(node.args[0])
        case _:
            raise ValueError(f"`{type(node).__name__}` is not a word of the language: got {node}")
