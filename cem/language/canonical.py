"""One form for every way of writing an expression.

Two expressions that differ in the names of their bound indices, in where constant factors stand, or in how
log-sum-exp is spelled become equal, and equal sub-expressions can be shared by calculus and lowering.
"""

from __future__ import annotations

from sympy import Add, Basic, Expr, Float, Idx, Indexed, Mul, Rational, Sum, Symbol, exp, log

from .indices import (
    Renamer,
    bound_indices,
    bound_name,
    free_indices,
)
from .positions import Rope
from .reductions import LogSumExp, Weights
from .symbols import SEQ, Frozen, NamedArray, Ravel, State, size_of, split, total
from .words import only, relu, step


class _Normaliser(Renamer):
    """Puts every binder on an index of its own, pulls factors out of sums and recognises log-sum-exp."""

    bind = staticmethod(Renamer.fresh)

    def number(self, expression: Expr) -> Expr:
        return exact(float(expression))

    def ravel(self, body: Expr, slot: Expr, idx: Expr) -> Expr:
        bound = set(split(slot))
        inside, outside = [], []
        for factor in Mul.make_args(body):
            (inside if bound & free_indices(factor) else outside).append(factor)
        return Mul(*outside, Ravel(Mul(*inside), slot, idx))

    def rope(self, body: Expr, *options: Expr) -> Expr:
        # A rotation is linear.
        inside, outside = [], []
        for factor in Mul.make_args(body):
            (inside if options[0] in free_indices(factor) else outside).append(factor)
        return Mul(*outside, Rope(Mul(*inside), *options))

    def sum(self, body: Expr, indices: tuple[Idx, ...]) -> Expr:
        # The context first, so that what does not depend on it stays outside its averages; then the index that
        # the fewest factors share. What an index stands beside decides a tie, the state first, so that neither
        # its name nor the order in which the sums were written matters.
        left = list(indices)
        while left:
            factors = [free_indices(factor) for factor in Mul.make_args(body)]
            idx = min(
                left,
                key=lambda idx: (
                    size_of(idx) != SEQ,
                    sum(idx in f for f in factors),
                    str(size_of(idx)),
                    _places(body, idx),
                ),
            )
            left.remove(idx)
            body = self.sum_one(body, idx)
        return body

    def sum_one(self, body: Expr, idx: Idx) -> Expr:
        if body.is_Add:
            return Add(*(self.sum_one(term, idx) for term in body.args))
        if idx not in free_indices(body):
            return body * size_of(idx)
        outside, inside = [], []
        for factor in Mul.make_args(body):
            (inside if idx in free_indices(factor) else outside).append(factor)
        for n, factor in enumerate(inside):
            others = inside[:n] + inside[n + 1 :]
            weighted = (*others, *(part for term in factor.args for part in Mul.make_args(term)))
            if factor.is_Add and any(_weighs(part, idx) for part in weighted):
                # A weighted mean is taken term by term: each is a plain average of context features.
                parts = (self.sum_one(Mul(term, *others), idx) for term in factor.args)
                return Mul(*outside, Add(*parts))
            if isinstance(factor, Sum) and others and _weighs(factor, idx):
                # The weights stand below another sum: average first.
                body = self.sum_one(Mul(factor.function, *others), idx)
                return Mul(*outside, self.sum(body, tuple(limit[0] for limit in factor.limits)))
        pulled = self.own_feature(inside, idx)
        if pulled is not None:
            return Mul(*outside, pulled)
        if outside and len(inside) == 1 and inside[0].is_Add:
            return Mul(*outside, self.sum_one(inside[0], idx))
        if len(inside) == 1 and isinstance(inside[0], Sum) and size_of(idx) == SEQ:
            # What does not depend on the token comes out of the sum over tokens.
            limits = tuple(limit[0] for limit in inside[0].limits)
            if SEQ not in map(size_of, limits):
                return Mul(*outside, self.sum(self.sum_one(inside[0].function, idx), limits))
        return Mul(*outside, total(Mul(*inside), (idx,)))

    def own_feature(self, inside: list[Expr], idx: Idx) -> Expr | None:
        """A weighted mean of products with the token's own feature as the feature times the mean, or None."""
        weights = [f for f in inside if isinstance(f, Weights) and f.index == idx]
        sums = [
            f
            for f in inside
            if isinstance(f, Sum) and any(_moves(part, idx) for part in Mul.make_args(f.function))
        ]
        if len(weights) != 1 or len(sums) != 1:
            return None
        rest = Mul(*(f for f in inside if f is not sums[0]))
        if free_indices(rest) - free_indices(weights[0]):
            return None
        body = self.sum_one(rest * sums[0].function, idx)
        return self.sum(body, tuple(limit[0] for limit in sums[0].limits))

    def node(self, expression: Expr, args: list[Expr]) -> Expr:
        if isinstance(expression, Mul):
            return _without_steps(_with_conditions_apart(Mul(*args)))
        if isinstance(expression, log) and isinstance(args[0], Sum):
            reduced: Expr = args[0].function
            if isinstance(reduced, exp):
                reduced = reduced.args[0]
                for limit in args[0].limits:
                    reduced = LogSumExp(reduced, limit[0])
                return reduced
        return expression.func(*args)


def _places(expression: Expr, idx: Idx) -> list[tuple[bool, str, list[int]]]:
    """Where an index stands: in which tensors, and at which of their axes; those of the state come first."""
    return sorted(
        (
            not isinstance(leaf.base, State | Frozen),
            str(leaf.base.name),
            [axis for axis, slot in enumerate(leaf.indices) if slot.has(idx)],
        )
        for leaf in expression.atoms(Indexed)
        if leaf.has(idx)
    )


def exact(number: float) -> Expr:
    """A number as a fraction where its denominator is a small power of two: 0.5 is 1/2 in both pens."""
    numerator, denominator = number.as_integer_ratio()
    return Rational(numerator, denominator) if denominator <= 2**20 else Float(number)


def _with_conditions_apart(product: Expr) -> Expr:
    """A positive multiple of a score with ``only`` terms as the multiple of the score and the terms."""
    factors = Mul.make_args(product)
    for place, factor in enumerate(factors):
        others = Mul(*factors[:place], *factors[place + 1 :])
        if isinstance(factor, only) and others.is_positive:
            return factor
        if factor.is_Add and any(isinstance(term, only) for term in factor.args):
            return Add(*(_with_conditions_apart(Mul(others, term)) for term in factor.args))
    return product


def _without_steps(product: Expr) -> Expr:
    """Drop step(z) beside relu(z), which is already zero where z <= 0."""
    factors = [factor.as_base_exp() for factor in Mul.make_args(product)]
    closed = {
        base.args[0] for base, power in factors if isinstance(base, relu) and power.is_positive
    }
    if not any(isinstance(base, step) for base, _ in factors):
        return product
    kept = []
    for base, power in factors:
        if not (isinstance(base, step) and base.args[0] in closed):
            kept.append(base if isinstance(base, step) and power.is_positive else base**power)
    return Mul(*kept)


def _weighs(factor: Expr, idx: Idx) -> bool:
    """Whether a factor is a softmax over the index, or a sum of products with one."""
    if isinstance(factor, Sum):
        return any(_weighs(part, idx) for part in Mul.make_args(factor.function))
    return isinstance(factor, Weights) and factor.index == idx


def _moves(factor: Expr, idx: Idx) -> bool:
    """Whether a factor is of the token that looks and not of the one at the index."""
    kinds = {type(leaf.base) for leaf in factor.atoms(Indexed)}
    return idx not in free_indices(factor) and bool(kinds & {State, Frozen})


def canonical(expression: Expr) -> Expr:
    """The normal form of an expression: canonical bound names, factors out of sums, log-sum-exp as one word."""
    return _name(_Normaliser().visit(expression, {}))


def _name(expression: Expr) -> Expr:
    """Name every bound index; free indices keep their names.

    An index gets the first letter of its size that no reduction inside its scope, and mentioning it, has taken.
    The names in a sub-expression so depend on that sub-expression alone.
    """
    names: dict[Idx, Idx] = {}
    heights: dict[Idx, int] = {}
    done: set[Basic] = set()

    def visit(node: Basic) -> None:
        if node in done or isinstance(node, Idx | Indexed | NamedArray | Symbol):
            return
        done.add(node)
        for arg in node.args:
            visit(arg)
        bound = bound_indices(node)
        for position, idx in enumerate(bound):
            size = size_of(idx)
            taken = {heights[other] for other in bound[:position] if size_of(other) == size}
            taken |= {heights[other] for other in _binders_around(node.args[0], idx, size)}
            heights[idx] = max(taken, default=-1) + 1
            names[idx] = bound_name(size, heights[idx])

    visit(expression)
    return _rebuilt(expression, names, heights, {})


def _binders_around(node: Basic, idx: Idx, size: Expr) -> set[Idx]:
    """Indices over ``size`` bound below ``node`` by reductions in which ``idx`` is free."""
    if isinstance(node, Idx | Indexed | NamedArray | Symbol) or idx not in free_indices(node):
        return set()
    found = {other for other in bound_indices(node) if size_of(other) == size}
    return found.union(
        *(_binders_around(arg, idx, size) for arg in node.args if isinstance(arg, Expr))
    )


def _rebuilt(
    node: Basic, names: dict[Idx, Idx], heights: dict[Idx, int], memo: dict[Basic, Basic]
) -> Basic:
    """Replace indices, bound ones too, and order the limits of every sum by the names of their sizes."""
    if node in memo:
        return memo[node]
    if isinstance(node, Idx):
        found = names.get(node, node)
    elif isinstance(node, NamedArray | Symbol) or not node.args:
        found = node
    elif isinstance(node, Sum):
        bound = sorted(bound_indices(node), key=lambda idx: (str(size_of(idx)), heights[idx]))
        body = _rebuilt(node.function, names, heights, memo)
        found = total(body, [names[idx] for idx in bound])
    else:
        args = [_rebuilt(arg, names, heights, memo) for arg in node.args]
        found = node if args == list(node.args) else node.func(*args)
    memo[node] = found
    return found
