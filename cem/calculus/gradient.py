"""Reverse-mode differentiation of an energy for its state.

The adjoint of a sub-expression is an expression with the same free indices: what its value at those indices
contributes to the energy. A product hands each factor the product of the others, summed over the indices that
the factor lacks. Nothing is expanded, so products of matrices stay products of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from sympy import Add, Expr, Idx, Indexed, Integer, Mul, Pow, Rational, S, Sum, log

from ..language.canonical import canonical
from ..language.entmax import Entmax
from ..language.indices import LETTERS, free_indices, rename
from ..language.positions import Rope
from ..language.reductions import SmoothMaximum, Softmax
from ..language.symbols import (
    Frozen,
    NamedArray,
    Ravel,
    State,
    direction,
    index,
    is_word,
    spelling,
    split,
    total,
)
from ..language.tokens import Decay
from ..language.words import step, word_of


@lru_cache(maxsize=65536)
def depends_on(expression: Expr, kind: type[NamedArray]) -> bool:
    """Whether entries of one kind of array stand in an expression."""
    if isinstance(expression, Indexed):
        return isinstance(expression.base, kind)
    return any(depends_on(arg, kind) for arg in expression.args if isinstance(arg, Expr))


def depends_on_state(expression: Expr) -> bool:
    """Whether a sub-expression moves with the state (frozen values and the context do not)."""
    return depends_on(expression, State)


def output_index(width: Expr) -> Idx:
    """The free index of a gradient: d over the width of the state, or o where sizes bind the letter d."""
    letters = LETTERS.get(str(width), str(width)[:1])
    return index("o" if "d" in letters else "d", width)


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
    return canonical(
        Add(*(_scatter(leaf.indices[0], adjoint, free) for leaf, adjoint in sweep(energy)))
    )


@lru_cache(maxsize=512)  # the same for layers of all sizes
def where_frozen(gradient_: Expr, state: State) -> Expr:
    """The gradient at the place where ``frozen(h)`` was taken: every frozen entry is the state's, in canonical form.

    >>> from sympy import Sum
    >>> import cem
    >>> dim = cem.dims("dim")
    >>> h, i = cem.state(dim), dim.index("i")
    >>> where_frozen(gradient(canonical(Sum((h[i] - cem.frozen(h)[i])**2, i)), dim), h)
    0
    """
    leaves = (leaf for leaf in gradient_.atoms(Indexed) if isinstance(leaf.base, Frozen))
    return canonical(gradient_.xreplace({leaf: state[leaf.indices] for leaf in leaves}))


def hessian_product(gradient_: Expr, width: Expr) -> Expr:
    """sum_c d2E/dh_d dh_c v_c from dE/dh_c, in canonical form: the gradient of <dE/dh, v> with v constant.

    ``gradient_`` and the result have the one free index ``output_index(width)``.

    >>> from sympy import Sum
    >>> import cem
    >>> dim = cem.dims("dim")
    >>> h, i = cem.state(dim), dim.index("i")
    >>> hessian_product(gradient(canonical(Sum(h[i]**4, i)), dim), dim)
    12*direction[d]*h[d]**2
    """
    free = output_index(width)
    along = total(gradient_ * direction(width)[free], (free,))
    return gradient(canonical(along), width)


def sweep(
    root: Expr, seed: Expr = S.One, kind: type[NamedArray] = State
) -> Iterator[tuple[Indexed, Expr]]:
    """Reverse mode: every entry of the state, or of another kind of array, with its adjoint.

    ``seed`` is the adjoint of the root. Each pair of an array and its indices comes once.
    """
    adjoints: dict[Expr, Expr] = {root: seed}
    for node in reversed(_topological(root, kind)):
        adjoint = adjoints.pop(node)
        if isinstance(node, Indexed):
            yield node, adjoint
            continue
        for child, pushed, scope in _pull_back(node, adjoint):
            if depends_on(child, kind):
                missing = scope - free_indices(child)
                adjoints[child] = adjoints.get(child, Integer(0)) + total(
                    pushed, sorted(missing, key=spelling)
                )


def _topological(root: Expr, kind: type[NamedArray]) -> list[Expr]:
    """The sub-expressions in which entries of a kind stand, each after its own parts."""
    order: list[Expr] = []
    seen: set[Expr] = set()

    def visit(node: Expr) -> None:
        if node in seen or not depends_on(node, kind):
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


def _pull_back(node: Expr, adjoint: Expr) -> Iterator[tuple[Expr, Expr, frozenset[Idx]]]:
    """Triples of a part, what the adjoint of the node gives it, and the indices of the node as its parts see them.

    The part's adjoint is the sum over those of the indices that the part itself lacks.
    """
    scope = free_indices(node)
    match node:
        case Add():
            for term in node.args:
                yield term, adjoint, scope
        case Mul():
            for position, factor in enumerate(node.args):
                others = node.args[:position] + node.args[position + 1 :]
                yield factor, adjoint * Mul(*others), scope
        case Pow():
            base, exponent = node.args
            yield base, adjoint * exponent * Pow(base, exponent - 1), scope
            if not exponent.is_number:
                yield exponent, adjoint * node * log(base), scope
        case Sum():
            yield node.function, adjoint, scope.union(limit[0] for limit in node.limits)
        case SmoothMaximum():
            yield node.body, adjoint * node.weights, scope | {node.index}
        case Softmax():
            mean = total(node * adjoint, (node.index,))
            yield node.body, node * (adjoint - mean), scope
        case Ravel():
            body, slot, idx = node.args
            yield body, rename(adjoint, {idx: slot}), (scope - {idx}).union(split(slot))
        case Rope():
            yield node.body, node.of(adjoint, inverse=True), scope
        case Entmax():
            # diag(s) - s s^T / sum(s) with s = p^(2 - alpha) on the support.
            share = step(node) if node.args[2] == 2 else Pow(node, Rational(1, 2))
            over = (node.index,)
            mean = total(share * adjoint, over) / total(share, over)
            yield node.body, share * (adjoint - mean), scope
        case Decay():
            raise ValueError(
                f"a decay that reads the context has no derivative for it: got {node}; leave `joint=True` out"
            )
        case _ if is_word(node):
            yield node.args[0], adjoint * word_of(node.func).derivative(node.args[0]), scope
        case _:
            raise ValueError(f"`{type(node).__name__}` is not a word of the language: got {node}")
