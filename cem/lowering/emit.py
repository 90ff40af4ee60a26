"""From a canonical expression to a torch.fx program with named intermediate values."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import torch
from sympy import Add, Expr, Idx, Indexed, Mul, Pow, Sum, Symbol
from torch import fx

from ..language.entmax import Entmax, EntmaxConjugate
from ..language.indices import free_indices, rename
from ..language.positions import POSITIONS, ContextPosition, Lookup, Rope, TokenPosition
from ..language.reductions import LogSumExp, Reduction, Softmax, Weights
from ..language.symbols import (
    SEQ,
    Context,
    Direction,
    Frozen,
    Parameter,
    Ravel,
    Scalar,
    State,
    index,
    is_word,
    size_of,
    spelling,
    split,
)
from ..language.tokens import Decay, TokenSum
from ..language.words import word_of
from . import kernels
from .attention import AttentionGroups
from .bilinear import EXACT, split_conditions
from .linear_attention import LinearAttention
from .ops import Ops
from .places import Places
from .values import BATCH, TOKEN, Value, gathered, is_placed, is_seq, joined, sources


class Emitter:
    """Lowers expressions into one graph, sharing equal sub-expressions.

    ``sizes`` gives every named size, ``scalars`` the value of each fixed scalar; the other scalars become
    inputs. ``batched`` programs work on (batch, tokens, dim); the others on one token, with the context
    (seq, dim) and a mask (seq,), which is what ``torch.func`` differentiates and maps. ``flex`` asks for
    ``flex_attention``.
    """

    def __init__(
        self,
        sizes: Mapping[Symbol, int],
        scalars: Mapping[Scalar, float],
        *,
        batched: bool = True,
        flex: bool = False,
    ) -> None:
        self.graph = fx.Graph()
        self.constants: dict[Symbol, float | int] = {**sizes, **scalars, size_of(EXACT): 3}
        self.numbers: dict[Expr, float | int | None] = {}
        self.batched, self.flex = batched, flex
        self.ops = Ops(self.graph, self.size)
        self.groups = AttentionGroups(self)
        self.linear = LinearAttention(self)
        self.inputs: dict[str, fx.Node] = {}
        self.mask: fx.Node | None = None
        self.memo: dict[Expr, Value] = {}
        self.places = Places(self)
        self.needs_mask = self.counts = False
        self.pairs = False
        self.reasons: dict[str, None] = {}
        self.lead = (BATCH, TOKEN) if batched else ()

    # -- inputs and constants -------------------------------------------------------------------------------

    def size(self, idx: Idx) -> int:
        return int(self.constant(size_of(idx)))

    def constant(self, expression: Expr) -> float | int | None:
        """The number an expression stands for once sizes and fixed scalars are known, else None."""
        if expression not in self.numbers:
            self.numbers[expression] = self.work_out(expression)
        return self.numbers[expression]

    def work_out(self, expression: Expr) -> float | int | None:
        if expression.is_Number or expression.is_NumberSymbol:
            return int(expression) if expression.is_Integer else float(expression)
        if isinstance(expression, Symbol):
            return self.constants.get(expression)
        if not isinstance(expression, Add | Mul | Pow) and not is_word(expression):
            return None
        numbers = [self.constant(arg) for arg in expression.args]
        if None in numbers:
            return None
        match expression:
            case Add():
                return sum(numbers)
            case Mul():
                return math.prod(numbers)
            case Pow():
                return numbers[0] ** numbers[1]
        return float(word_of(expression.func).torch(torch.tensor(numbers[0], dtype=torch.float64)))

    def input(self, name: str) -> fx.Node:
        if name not in self.inputs:
            self.inputs[name] = self.graph.create_node("placeholder", name, name=name)
        return self.inputs[name]

    def visible(self, idx: Idx) -> Value:
        """The mask as a value over (batch, token, idx), or (idx,) for one token."""
        self.needs_mask = self.pairs = True
        node = self.input("visible")
        if not self.batched:
            return Value(node, (idx,))
        if self.mask is None:
            self.mask = self.ops.call("squeeze", node, 1, name="mask")
        return Value(self.mask, (BATCH, TOKEN, idx))

    # -- expressions ----------------------------------------------------------------------------------------

    def lower(self, expression: Expr) -> Value:
        """The value of an expression; emitted once."""
        number = self.constant(expression)
        if number is not None:
            return Value(number)
        if not isinstance(expression, Sum):
            if expression not in self.memo:
                self.memo[expression] = self.build(expression)
            return self.memo[expression]
        # Sums that differ in the names of their free indices alone are one tensor.
        free = sorted(free_indices(expression), key=spelling)
        names = {idx: index(f"_{n}", size_of(idx)) for n, idx in enumerate(free)}
        key = rename(expression, names)
        if key not in self.memo:
            value = self.build(expression)
            self.memo[key] = Value(value.node, tuple(names.get(axis, axis) for axis in value.axes))
        value, own = self.memo[key], {name: idx for idx, name in names.items()}
        return Value(value.node, tuple(own.get(axis, axis) for axis in value.axes))

    def build(self, expression: Expr) -> Value:
        match expression:
            case Indexed():
                return self.leaf(expression)
            case Scalar():
                return Value(self.input(expression.name))
            case TokenPosition():
                return Value(self.input("position"), self.lead)
            case Symbol() if expression == SEQ:
                return self.count()
            case Add():
                return self.add(expression)
            case Mul():
                return self.product(expression.args, frozenset())
            case Pow():
                return self.power(*expression.args)
            case Sum():
                return self.sum(expression)
            case LogSumExp():
                return self.logsumexp(expression)
            case Softmax():
                return self.softmax(expression)
            case Decay():
                body, idx = expression.args
                value, mask = self.lower(body), self.visible(idx)
                return self.ops.reduce(kernels.decayed, value, idx, mask, keep=True)
            case EntmaxConjugate() | Entmax():
                return self.sparse(expression)
            case Ravel():
                return self.ravel(expression)
            case TokenSum():
                return self.received(*expression.args)
            case Rope():
                return self.places.rotation(expression)
            case Lookup():
                return self.places.lookup(expression)
        if is_word(expression):
            word = word_of(expression.func)
            value = self.lower(expression.args[0])
            if word.name in ("exp", "log") and not sources(expression) <= {*POSITIONS}:
                value = self.tame(value)
            return Value(self.ops.call(word.torch, value.node, name=word.name), value.axes)
        raise ValueError(f"`{type(expression).__name__}` has no torch meaning: got {expression}")

    def leaf(self, expression: Indexed) -> Value:
        base = expression.base
        match base:
            case State():
                node, axes = self.input("h"), list(self.lead)
            case Frozen():
                node, axes = self.input("frozen"), list(self.lead)
            case Direction():
                node, axes = self.input("direction"), list(self.lead)
            case Context():
                node, axes = self.input("x"), [BATCH] if self.batched else []
            case ContextPosition():
                node, axes = self.input("context_position"), [BATCH] if self.batched else []
            case Parameter():
                node, axes = self.input(base.name), []
            case _:
                raise ValueError(
                    f"`{base}` is not a tensor of the language: got {type(base).__name__}"
                )
        for slot in expression.indices:
            group = split(slot)
            node = self.ops.unflatten(node, len(axes), group)
            axes.extend(group)
        while len(set(axes)) < len(axes):
            first, second = next(
                (n, m)
                for n in range(len(axes))
                for m in range(n + 1, len(axes))
                if axes[n] == axes[m]
            )
            node = self.ops.call(torch.diagonal, node, 0, first, second)
            axes = [axis for n, axis in enumerate(axes) if n not in (first, second)] + [axes[first]]
        return Value(node, tuple(axes))

    def count(self) -> Value:
        """The number of visible context tokens."""
        if not self.batched:
            mask = self.visible(SEQ.index("s"))
            node = self.ops.call("sum", mask.node, -1)
            node = self.ops.call("type_as", node, self.input("h"), name="visible_count")
            return Value(node, mask.axes[:-1])
        self.counts = True
        inputs = map(self.input, ("visible", "causal", "h", "x"))
        return Value(self.ops.call(kernels.visible_count, *inputs, name="count"), (BATCH, TOKEN))

    def add(self, expression: Expr) -> Value:
        total = None
        terms = sorted(gathered(expression.args), key=lambda term: term.could_extract_minus_sign())
        for term in terms:
            if total is not None and term.could_extract_minus_sign():
                total = self.ops.binary(operator.sub, total, self.lower(-term))
            else:
                value = self.lower(term)
                total = value if total is None else self.ops.binary(operator.add, total, value)
        return total

    def power(self, base: Expr, exponent: Expr) -> Value:
        value = self.lower(base)
        number = self.constant(exponent)
        if not isinstance(number, int) or number < 0:
            value = self.tame(value)
        if base == SEQ and number is not None and number < 0:
            # It divides a sum over the visible tokens, which is 0 where there are none.
            value = Value(self.ops.call("clamp_min", value.node, 1), value.axes)
        if number is None:
            raised = self.lower(exponent)
            return self.ops.binary(torch.pow, value, raised)
        simple = {2: torch.square, -1: torch.reciprocal, 0.5: torch.sqrt, -0.5: torch.rsqrt}
        if number in simple:
            return Value(self.ops.call(simple[number], value.node), value.axes)
        return Value(self.ops.call(torch.pow, value.node, number), value.axes)

    def tame(self, value: Value) -> Value:
        """The argument of a function with a pole, 1 where a token does not see the context token.

        A factor of 0 for the pair would come too late: 0 * inf is NaN, there and in every derivative.
        """
        for idx in filter(is_seq, value.axes):
            if TOKEN in value.axes or not self.batched:
                value = self.ops.binary(kernels.one_unseen, value, self.visible(idx))
        return value

    def product(self, factors: Sequence[Expr], over: frozenset[Idx]) -> Value:
        """The product of factors, summed over indices, masked where one of them runs over the context."""
        constant, rest = 1, []
        for factor in factors:
            number = self.constant(factor)
            if number is None:
                rest.append(factor)
            else:
                constant *= number
        values = [self.lower(factor) for factor in rest]
        for idx in over:
            if is_seq(idx) and not any(isinstance(f, Weights) and f.index == idx for f in rest):
                values.append(self.mask_factor(idx, values))
        return self.ops.contract([Value(constant), *values], over, self.name_of(rest))

    def mask_factor(self, idx: Idx, values: Sequence[Value]) -> Value:
        mask = self.visible(idx)
        like = next(v.node for v in values if idx in v.axes)
        return Value(self.ops.call("type_as", mask.node, like), mask.axes)

    @staticmethod
    def name_of(factors: Sequence[Expr]) -> str | None:
        """The lower-case name of the parameter, for the contraction of one parameter with one input."""
        leaves = [f for f in factors if isinstance(f, Indexed)]
        parameters = [f for f in leaves if isinstance(f.base, Parameter)]
        if len(leaves) == len(factors) == 2 and len(parameters) == 1:
            return str(parameters[0].base.name).lower()
        return None

    def sum(self, expression: Sum) -> Value:
        over = frozenset(limit[0] for limit in expression.limits)
        factors = Mul.make_args(expression.function)
        for pattern in (self.groups.attended, self.linear.summed) if self.batched else ():
            found = pattern(factors, over)
            if found is not None:
                value, outside, left = found
                values = [value, *map(self.lower, outside)]
                return self.ops.contract(values, left)
        return self.product(*joined(factors, over))

    def seen(self, idx: Idx, conditions: Sequence[Expr]) -> Value:
        """The visible tokens for which every condition is positive, as a mask."""
        mask = self.visible(idx)
        for condition in conditions:
            value = self.lower(condition)
            if value.is_number:
                raise ValueError(f"`only` of a number hides nothing or everything: got {condition}")
            holds = Value(self.ops.call(torch.gt, value.node, 0), value.axes)
            mask = self.ops.binary(torch.logical_and, mask, holds)
        return mask

    def logsumexp(self, expression: LogSumExp) -> Value:
        if self.batched and is_seq(expression.index):
            value = self.groups.logsumexp(expression)
            if value is not None:
                return value
        if self.batched and is_seq(expression.index):
            self.ops.kernels.add("dense_logsumexp")
            self.reasons[
                "a log-sum-exp over the context has scores that are not bilinear, so it is written out over"
                " all pairs of tokens"
            ] = None
        return self.reduce(torch.logsumexp, kernels.masked_logsumexp, expression, keep=False)

    def softmax(self, expression: Softmax) -> Value:
        if self.batched and is_seq(expression.index):
            self.ops.kernels.add("dense_softmax")
            self.reasons[
                "a softmax over the context is not an average of context features under bilinear"
                " scores, so it is written out over all pairs of tokens"
            ] = None
        return self.reduce(torch.softmax, kernels.masked_softmax, expression, keep=True)

    def sparse(self, expression: EntmaxConjugate | Entmax) -> Value:
        """Sparse weights, or the maximum that they belong to, over all pairs of tokens if over the context."""
        keep = isinstance(expression, Entmax)
        if self.batched and is_seq(expression.index):
            self.ops.kernels.add("dense_entmax")
            self.reasons[
                "sparse weights over the context are found by sorting, so they are written out over all pairs of"
                " tokens"
            ] = None
        plain, masked = (
            (kernels.entmax, kernels.masked_entmax)
            if keep
            else (kernels.entmax_conjugate, kernels.masked_entmax_conjugate)
        )
        return self.reduce(plain, masked, expression, keep)

    def reduce(self, plain, masked, expression: Reduction, keep: bool) -> Value:
        body, idx, *options = expression.args
        options = tuple(map(float, options))
        if not is_seq(idx):
            return self.ops.reduce(plain, self.lower(body), idx, None, keep, *options)
        score, conditions = split_conditions(body)
        value = self.lower(score)
        if is_placed(score):
            value = Value(self.ops.call("type_as", value.node, self.input("h")), value.axes)
        return self.ops.reduce(masked, value, idx, self.seen(idx, conditions), keep, *options)

    def received(self, body: Expr, s: Idx) -> Value:
        """The sum over the tokens that see a token, which the index s stands for."""
        factors = Mul.make_args(body)
        if self.batched:
            value = self.groups.received(factors, s)
            if value is not None:
                return value
        self.reasons[
            "what a token receives as the context of others is summed over all pairs of tokens, since it is not a"
            " softmax of bilinear scores times features"
        ] = None
        values = [self.lower(f) for f in factors if f != 1]
        if not any(isinstance(f, Weights) and f.index == s for f in factors):
            mask = self.visible(s)
            node = self.ops.call("type_as", mask.node, self.input("h"))
            values.append(Value(node, mask.axes))
        value = self.ops.contract(values, frozenset((TOKEN,)))
        return Value(value.node, tuple(TOKEN if axis == s else axis for axis in value.axes))

    def ravel(self, expression: Ravel) -> Value:
        body, slot, idx = expression.args
        value = self.lower(body)
        group = split(slot)
        keep = [axis for axis in value.axes if axis not in group]
        node = self.ops.grouped(value, [*([axis] for axis in keep), group])
        return Value(node, (*keep, idx))
