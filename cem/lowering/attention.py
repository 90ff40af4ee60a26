"""Attention patterns: weighted sums over the context whose weights are a softmax of bilinear scores.

``Sum_s softmax_s(score) * value`` becomes one call of scaled dot product attention when the score is a sum of
products of a feature of the token and a feature of the context token. Several score terms are concatenated
features; several sums that share a softmax are one call with concatenated values; where the values are the
keys, the same tensor serves as both.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Protocol

import torch
from sympy import Add, Expr, Idx, Indexed, Mul, Pow, Sum
from torch import fx

from ..language.canonical import free_indices, rename
from ..language.symbols import LogSumExp, Parameter, Softmax, index, size_of, spelling, total
from . import kernels
from .ops import Ops
from .values import BATCH, TOKEN, Value, is_seq, moves_with_token


class Host(Protocol):
    """What a pattern needs of the emitter that it works for."""

    ops: Ops
    kernel_logsumexp: bool

    def lower(self, expression: Expr) -> Value:
        """The value of an expression; emitted once."""

    def constant(self, expression: Expr) -> float | int | None:
        """The number an expression stands for, or None."""

    def size(self, idx: Idx) -> int:
        """The length of an axis."""

    def input(self, name: str) -> fx.Node:
        """An input of the program by name."""


@dataclass(frozen=True)
class Term:
    """One bilinear term of a score: sum over ``inner`` of token factors times context factors."""

    token: tuple[Expr, ...]
    context: tuple[Expr, ...]
    inner: tuple[Idx, ...]


def bilinear(score: Expr, s: Idx) -> tuple[list[Term], list[Expr]] | None:
    """Split a score into bilinear terms and terms that do not depend on s; None where that is impossible."""
    terms: list[Term] = []
    constant: list[Expr] = []
    pending: list[tuple[Expr, tuple[Expr, ...], tuple[Expr, ...], tuple[Idx, ...]]]
    pending = [(term, (), (), ()) for term in reversed(Add.make_args(score))]
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
            parts, indices = _apart(*inside, {*inner, *free_indices(score)})
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


def _token_factors(terms: Sequence[Term]) -> list[Expr]:
    return [factor for term in terms for factor in term.token]


def _nodes(expression: Expr) -> Iterator[Expr]:
    """Every sub-expression once, in a fixed order."""
    seen: set[Expr] = set()
    stack = [expression]
    while stack:
        node = stack.pop()
        if node not in seen and not isinstance(node, Indexed):
            seen.add(node)
            yield node
            stack.extend(arg for arg in reversed(node.args) if isinstance(arg, Expr))


def _leaves(expression: Expr) -> list[Indexed]:
    if isinstance(expression, Indexed):
        return [expression]
    return [leaf for arg in expression.args if isinstance(arg, Expr) for leaf in _leaves(arg)]


@dataclass(frozen=True)
class Feature:
    """A product of context factors with feature axes: a key or a value of the kernel."""

    factors: tuple[Expr, ...]
    axes: tuple[Idx, ...]

    @staticmethod
    def of(factors: Sequence[Expr], axes: Iterable[Idx]) -> Feature:
        return Feature(tuple(factors), tuple(sorted(axes, key=spelling)))

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


@dataclass
class Group:
    """Everything that one softmax over the context needs: its score and the values it averages."""

    score: Expr
    index: Idx
    terms: list[Term]
    constant: list[Expr]
    heads: tuple[Idx, ...]
    values: dict[tuple[Expr, ...], Feature] = field(default_factory=dict)
    outputs: dict[tuple[Expr, ...], Value] = field(default_factory=dict)
    logsumexp: Value | None = None
    emitted: bool = False


class AttentionGroups:
    """Finds the softmaxes of a program over the context and emits one kernel call for each."""

    def __init__(self, emitter: Host) -> None:
        self.emitter = emitter
        self.groups: dict[tuple[Expr, Idx], Group | None] = {}
        self.wanted: set[tuple[Expr, Idx]] = set()

    def collect(self, expressions: Sequence[Expr]) -> None:
        """Register every weighted sum and every log-sum-exp before anything is emitted."""
        for expression in expressions:
            for node in _nodes(expression):
                if (
                    self.emitter.kernel_logsumexp
                    and isinstance(node, LogSumExp)
                    and is_seq(node.index)
                ):
                    if self.group(node.body, node.index) is not None:
                        self.wanted.add((node.body, node.index))
                if not isinstance(node, Sum):
                    continue
                found = self.match(
                    Mul.make_args(node.function), frozenset(x[0] for x in node.limits)
                )
                if found is not None:
                    group, value, _, _ = found
                    group.values.setdefault(value.key, value)

    def group(self, score: Expr, s: Idx) -> Group | None:
        if (score, s) not in self.groups:
            found = bilinear(score, s) if moves_with_token(score) else None
            group = None
            if found is not None and any(map(moves_with_token, _token_factors(found[0]))):
                heads = tuple(sorted(free_indices(score) - {s}, key=spelling))
                if not any(map(is_seq, heads)):
                    group = Group(score, s, *found, heads)
            self.groups[score, s] = group
        return self.groups[score, s]

    def match(self, factors: Sequence[Expr], over: frozenset[Idx]):
        """(group, value, outer factors, indices left to sum) of a weighted sum, or None."""
        weights = [
            f for f in factors if isinstance(f, Softmax) and f.index in over and is_seq(f.index)
        ]
        if len(weights) != 1:
            return None
        s = weights[0].index
        group = self.group(weights[0].body, s)
        rest = [f for f in factors if f is not weights[0]]
        value = tuple(f for f in rest if s in free_indices(f))
        if group is None or any(map(moves_with_token, value)):
            return None
        features = frozenset().union(*map(free_indices, value)) - {s} - set(group.heads)
        if any(map(is_seq, features)):
            return None
        outside = [f for f in rest if s not in free_indices(f)]
        return group, Feature.of(value, features), outside, over - {s}

    def attended(self, factors: Sequence[Expr], over: frozenset[Idx]):
        """The weighted sum as a value, with the factors and indices that remain outside it, or None."""
        found = self.match(factors, over)
        if found is None:
            return None
        group, value, outside, left = found
        self.emit(group)
        out = group.outputs[value.key]
        axes = out.axes[: len(out.axes) - len(value.axes)] + value.axes
        return Value(out.node, axes), outside, left

    def logsumexp(self, expression: LogSumExp) -> Value | None:
        """The log-sum-exp of a score from the kernel, or None where the score is not bilinear."""
        group = self.group(expression.body, expression.index)
        if group is None:
            return None
        self.emit(group)
        value = group.logsumexp
        for term in group.constant:
            value = self.emitter.ops.binary(operator.add, value, self.emitter.lower(term))
        return value

    # -- emission -------------------------------------------------------------------------------------------

    def emit(self, group: Group) -> None:
        if group.emitted:
            return
        group.emitted = True
        emitter, ops = self.emitter, self.emitter.ops
        scale, scales = self.common_scale(group)
        keys = [Feature.of(term.context, term.inner) for term in group.terms]
        queries = []
        for term, key, relative in zip(group.terms, keys, scales, strict=True):
            token = [emitter.lower(f) for f in term.token if emitter.constant(f) is None]
            queries.append((ops.contract([Value(relative), *token], frozenset()), key.axes))
        q = self.concatenate(queries, group.heads, TOKEN, "query")
        k = self.features(keys, group, "key")
        width = sum(self.width(key.axes) for key in keys)

        order = {key.key: n for n, key in enumerate(keys)}
        values = sorted(group.values.values(), key=lambda v: order.get(v.key, len(order)))
        value_width = sum(self.width(value.axes) for value in values)
        if not values or [v.key for v in values] == [key.key for key in keys]:
            v, value_width = k, width
        else:
            v = self.features(values, group, "value")
            # Fused kernels want keys and values of one width; zeros cost nothing but their own columns.
            if value_width < width:
                v = ops.call(torch.nn.functional.pad, v, (0, width - value_width))
            elif value_width > width:
                q = ops.call(torch.nn.functional.pad, q, (0, value_width - width))
                k = ops.call(torch.nn.functional.pad, k, (0, value_width - width))

        visible, causal = emitter.input("visible"), emitter.input("causal")
        ops.kernels.add("sdpa")
        if (group.score, group.index) in self.wanted:
            both = ops.call(
                kernels.attention_with_logsumexp, q, k, v, visible, causal, scale, name="attention"
            )
            out = ops.call(operator.getitem, both, 0, name="attended")
            lse = ops.call(operator.getitem, both, 1, name="logsumexp")
            lse = ops.unflatten(lse, 1, group.heads)
            group.logsumexp = Value(lse, (BATCH, *group.heads, TOKEN))
        else:
            out = ops.call(
                torch.nn.functional.scaled_dot_product_attention,
                q,
                k,
                v,
                attn_mask=visible,
                is_causal=causal,
                scale=scale,
                name="attended",
            )
        self.cut(group, out, values, max(width, value_width))

    def cut(self, group: Group, out: fx.Node, values: Sequence[Feature], width: int) -> None:
        """Give every value its own slice of the kernel's output."""
        ops, start = self.emitter.ops, 0
        for value in values:
            count = self.width(value.axes)
            node = out
            if count != width:
                node = ops.call(torch.narrow, out, -1, start, count, name=f"attended_{value.label}")
            start += count
            node = ops.unflatten(node, 3, value.axes)
            node = ops.unflatten(node, 1, group.heads)
            group.outputs[value.key] = Value(node, (BATCH, *group.heads, TOKEN, *value.axes))

    def features(self, features: Sequence[Feature], group: Group, name: str) -> fx.Node:
        """Context features side by side as (batch, heads, seq, width)."""
        lowered = [
            (
                self.emitter.ops.contract(list(map(self.emitter.lower, f.factors)), frozenset()),
                f.axes,
            )
            for f in features
        ]
        return self.concatenate(lowered, group.heads, group.index, name)

    def width(self, indices: Sequence[Idx]) -> int:
        return math.prod(map(self.emitter.size, indices))

    def common_scale(self, group: Group) -> tuple[float, list[float]]:
        """A factor of all scores for the kernel's own scale, and what remains for each term."""
        numbers = []
        for term in group.terms:
            constants = map(self.emitter.constant, term.token)
            numbers.append(float(math.prod(c for c in constants if c is not None)))
        if all(number == numbers[0] for number in numbers) and numbers[0] > 0:
            return numbers[0], [1] * len(numbers)
        return 1.0, numbers

    def concatenate(self, parts, heads: tuple[Idx, ...], position: Idx, name: str) -> fx.Node:
        """Features side by side as (batch, heads, position, width)."""
        ops = self.emitter.ops
        nodes = []
        for value, inner in parts:
            value = self.expand(value, (BATCH, position, *heads, *inner))
            value = ops.permute(value, (BATCH, position, *heads, *inner))
            nodes.append(ops.grouped(value, [[BATCH], [position], heads, inner]))
        # Heads move to the front last: concatenation then reads and writes whole rows.
        node = nodes[0] if len(nodes) == 1 else ops.call(torch.cat, nodes, -1, name=name)
        return ops.call("transpose", node, 1, 2)

    def expand(self, value: Value, axes: tuple[Idx, ...]) -> Value:
        """Repeat a feature along the head axes it lacks."""
        ops, emitter = self.emitter.ops, self.emitter
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
