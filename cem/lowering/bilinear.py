"""Scores over the context as sums of products of a token feature and a context feature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

from sympy import Add, Expr, Idx, Indexed, Mul, Pow, Sum

from ..language.indices import free_indices, rename
from ..language.positions import TOKEN_POSITION, ContextPosition
from ..language.symbols import Dim, Frozen, Parameter, State, index, size_of, spelling, total
from ..language.words import only, step
from .values import is_placed, is_seq, moves_with_token, sources

EXACT = index("part", Dim("parts"))
"""The axis of the columns into which a number is cut that must survive a short floating-point type."""


def split_conditions(score: Expr) -> tuple[Expr, tuple[Expr, ...]]:
    """A score without its ``only`` terms, and what must be positive for a token to be seen."""
    terms = Add.make_args(score)
    conditions = tuple(term.args[0] for term in terms if isinstance(term, only))
    return Add(*(term for term in terms if not isinstance(term, only))), conditions


def reach(conditions: Iterable[Expr]) -> int | None:
    """How many tokens back a token may see, itself among them, by conditions on their distance; None for all."""
    found = [_reach(factor) for one in conditions for factor in Mul.make_args(one)]
    return min((n for n in found if n is not None), default=None)


def window_of(conditions: Sequence[Expr]) -> tuple[int, int] | None:
    """(window, sinks) where tokens see those at a distance below the window, and the first few, and no others."""
    if len(conditions) != 1:
        return None
    if (window := _reach(conditions[0])) is not None:
        return window, 0
    parts = [1 - factor for factor in Mul.make_args(1 - conditions[0])]
    windows = [n for n in map(_reach, parts) if n is not None]
    sinks = [n for n in map(_first, parts) if n is not None]
    return (windows[0], sinks[0]) if len(parts) == 2 and windows and sinks else None


def _first(factor: Expr) -> int | None:
    """n where a factor is positive only for the first n tokens."""
    leaves = factor.atoms(Indexed)
    if not isinstance(factor, step) or len(leaves) != 1 or factor.has(TOKEN_POSITION):
        return None
    (leaf,) = leaves
    bound = factor.args[0] + leaf
    return int(bound) if isinstance(leaf.base, ContextPosition) and bound.is_Integer else None


def _reach(factor: Expr) -> int | None:
    """n where a factor is positive only if the distance of the positions is below n, which is a whole number."""
    if isinstance(factor, step):
        positive = factor.args[0]
    elif isinstance(1 - factor, step):
        positive = 1 - (1 - factor).args[0]
    else:
        return None
    others = [leaf for leaf in positive.atoms(Indexed) if isinstance(leaf.base, ContextPosition)]
    bound = positive + TOKEN_POSITION - Add(*others)
    return max(int(bound), 1) if len(others) == 1 and bound.is_Integer else None


@dataclass
class Score:
    """The parts of a score over the context.

    Attributes:
        terms: products of token features and context features.
        constant: terms that are the same for all context tokens.
        bias: terms that belong to a pair of tokens and do not move with the state.
        conditions: what must be positive for a token to be seen.
    """

    terms: list[Term] = field(default_factory=list)
    constant: list[Expr] = field(default_factory=list)
    bias: list[Expr] = field(default_factory=list)
    conditions: tuple[Expr, ...] = ()


@dataclass(frozen=True)
class Term:
    """One bilinear term of a score: sum over ``inner`` of token factors times context factors."""

    token: tuple[Expr, ...]
    context: tuple[Expr, ...]
    inner: tuple[Idx, ...]


def bilinear(body: Expr, s: Idx) -> Score | None:
    """Split a score into its parts; None where a term of the state is not bilinear."""
    score, conditions = split_conditions(body)
    found = Score(conditions=conditions)
    for term in Add.make_args(score):
        parts = _products(term, s, free_indices(score))
        if parts is not None:
            found.terms += parts[0]
            found.constant += parts[1]
        elif sources(term) & {State, Frozen}:
            return None
        else:
            found.bias.append(term)
    return found


def _products(term: Expr, s: Idx, taken: frozenset[Idx]) -> tuple[list[Term], list[Expr]] | None:
    """One term of a score as bilinear terms and terms that do not depend on s."""
    terms: list[Term] = []
    constant: list[Expr] = []
    pending: list[tuple[Expr, tuple[Expr, ...], tuple[Expr, ...], tuple[Idx, ...]]]
    pending = [(term, (), (), ())]
    while pending:
        expression, token, context, inner = pending.pop()
        mixed: list[Expr] = []
        for factor in Mul.make_args(expression):
            if s not in free_indices(factor):
                token = (*token, factor)
            elif not moves_with_token(factor):
                context = (*context, factor)
            else:
                mixed.append(factor)
        if not mixed and context:
            terms.append(_term(token, context, inner))
        elif not mixed:
            constant.append(total(Mul(*token), inner))
        else:
            inside = _opened(mixed[0]) if len(mixed) == 1 else None
            if inside is None:
                return None
            parts, indices = _apart(*inside, {*inner, *taken})
            pending += [(part, token, context, (*inner, *indices)) for part in reversed(parts)]
    return terms, constant


def _term(token: tuple[Expr, ...], context: tuple[Expr, ...], inner: tuple[Idx, ...]) -> Term:
    """A bilinear term; an index that only one side has is summed on that side."""
    sides = [frozenset().union(*map(free_indices, side)) for side in (token, context)]
    alone = [tuple(i for i in inner if i not in sides[1 - n]) for n in range(2)]
    if alone[0]:
        token = (total(Mul(*token), alone[0]),)
    if alone[1]:
        context = (total(Mul(*context), alone[1]),)
    return Term(token, context, tuple(i for i in inner if i in sides[0] & sides[1]))


def _opened(factor: Expr) -> tuple[tuple[Expr, ...], tuple[Idx, ...]] | None:
    """The terms below a sum over features, a bracket or the square of a bracket; None for anything else."""
    indices: tuple[Idx, ...] = ()
    if isinstance(factor, Sum):
        indices = tuple(limit[0] for limit in factor.limits)
        if any(map(is_seq, indices)):
            return None
        factor = factor.function
    if isinstance(factor, Pow) and factor.exp == 2 and isinstance(factor.base, Add):
        factor = factor.expand()
    if not indices and not factor.is_Add:
        return None
    return Add.make_args(factor), indices


def _apart(
    parts: tuple[Expr, ...], indices: tuple[Idx, ...], taken: set[Idx]
) -> tuple[tuple[Expr, ...], tuple[Idx, ...]]:
    """The parts below a sum with fresh names for those of its indices that stand outside it too.

    A canonical sum that does not mention an outer index may bind the same letter.
    """
    names = {}
    for idx in indices:
        if idx in taken:
            candidates = (index(f"{idx.label.name}_{n}", size_of(idx)) for n in count(1))
            names[idx] = next(fresh for fresh in candidates if fresh not in taken)
    return tuple(rename(part, names) for part in parts), tuple(names.get(i, i) for i in indices)


@dataclass(frozen=True)
class Feature:
    """A product of context factors with feature axes: a key or a value of the kernel."""

    factors: tuple[Expr, ...]
    axes: tuple[Idx, ...]

    @staticmethod
    def of(factors: Sequence[Expr], axes: Iterable[Idx]) -> Feature:
        return Feature(tuple(factors), tuple(sorted(axes, key=spelling)))

    @property
    def is_placed(self) -> bool:
        """Whether it is a number made of positions, whose digits must survive a short type."""
        return any(map(is_placed, self.factors))

    @property
    def label(self) -> str:
        """What the feature is called in a program: the parameter that makes it, or the context itself."""
        bases = [leaf.base for factor in self.factors for leaf in _leaves(factor)]
        named = [base for base in bases if isinstance(base, Parameter)] or bases
        return str(named[0].name).lower() if named else "weight"

    @cached_property
    def key(self) -> tuple[Expr, ...]:
        """The factors without the names of the feature axes: equal for equal tensors."""
        names = {idx: index(f"_{n}", size_of(idx)) for n, idx in enumerate(self.axes)}
        return tuple(rename(factor, names) for factor in self.factors)


def _leaves(expression: Expr) -> list[Indexed]:
    if isinstance(expression, Indexed):
        return [expression]
    return [leaf for arg in expression.args if isinstance(arg, Expr) for leaf in _leaves(arg)]
