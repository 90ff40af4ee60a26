"""Attention patterns: weighted sums over the context whose weights are a softmax of bilinear scores.

``Sum_s softmax_s(score) * value`` becomes one call of scaled dot product attention when the score is a sum of
products of a feature of the token and a feature of the context token. Several score terms are concatenated
features; several sums that share a softmax are one call with concatenated values; where the values are among the
keys, one tensor serves as both. Terms of pairs of tokens that do not move with the state become a bias, ``only``
terms a mask, and heads that only the queries have share their keys.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from sympy import Expr, Idx, Indexed, Mul, Sum
from torch import fx
from torch.nn import functional as F

from ..language.indices import free_indices
from ..language.reductions import LogSumExp, Softmax
from ..language.symbols import spelling
from ..language.tokens import TokenSum
from . import kernels
from .bilinear import EXACT, Feature, Score, Term, bilinear, reach, window_of
from .features import Features, Host
from .values import BATCH, TOKEN, Value, is_placed, is_seq, moves_with_token

WHERE_FLEX = (
    "`flex_attention` runs under a mask or a bias, for whole sequences of at least 128 tokens: on CUDA, and on a CPU"
    " without gradients, in float32 or bfloat16; elsewhere it is `sdpa` with the mask"
)
ONLY_SDPA = "the log-sum-exp of attention is wanted too, which `sdpa` gives"


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


@dataclass
class Group:
    """Everything that one softmax over the context needs: its score, the values it averages, what tokens hand out."""

    body: Expr
    index: Idx
    score: Score
    heads: tuple[Idx, ...]
    values: dict[tuple[Expr, ...], Feature] = field(default_factory=dict)
    outputs: dict[tuple[Expr, ...], Value] = field(default_factory=dict)
    handed: dict[tuple[Expr, ...], Feature] = field(default_factory=dict)
    received: dict[tuple[Expr, ...], Value] = field(default_factory=dict)
    logsumexp: Value | None = None
    operands: Operands | None = None
    emitted: bool = False


@dataclass(frozen=True)
class Operands:
    """The tensors of a kernel call: queries, keys, a mask or a bias, and the layout of the heads.

    ``keys`` are the features that stand side by side in ``k``; ``own`` are the heads that share keys.
    """

    q: fx.Node
    k: fx.Node
    keys: tuple[Feature, ...]
    mask: fx.Node
    causal: fx.Node | bool
    bias: fx.Node | None
    scale: float
    heads: tuple[Idx, ...]
    own: tuple[Idx, ...]


class AttentionGroups:
    """Finds the softmaxes of a program over the context and emits one kernel call for each."""

    def __init__(self, emitter: Host) -> None:
        self.emitter, self.features = emitter, Features(emitter)
        self.groups: dict[tuple[Expr, Idx], Group | None] = {}
        self.wanted: set[tuple[Expr, Idx]] = set()
        self.reaches: list[int | None] = []

    def collect(self, expressions: Sequence[Expr]) -> None:
        """Register every weighted sum and every log-sum-exp before anything is emitted."""
        for expression in expressions:
            for node in _nodes(expression):
                if isinstance(node, LogSumExp) and is_seq(node.index):
                    if self.group(node.body, node.index) is not None:
                        self.wanted.add((node.body, node.index))
                if isinstance(node, TokenSum):
                    handed = self.handed_out(Mul.make_args(node.body), node.index)
                    if handed is not None:
                        handed[0].handed.setdefault(handed[1].key, handed[1])
                if not isinstance(node, Sum):
                    continue
                found = self.match(
                    Mul.make_args(node.function), frozenset(x[0] for x in node.limits)
                )
                if found is not None:
                    group, value, _, _ = found
                    group.values.setdefault(value.key, value)

    def group(self, body: Expr, s: Idx) -> Group | None:
        if (body, s) not in self.groups:
            found = bilinear(body, s) if moves_with_token(body) else None
            group = None
            if found is not None and any(moves_with_token(f) for t in found.terms for f in t.token):
                heads = tuple(sorted(free_indices(body) - {s}, key=spelling))
                if not any(map(is_seq, heads)):
                    group = Group(body, s, found, heads)
            self.groups[body, s] = group
        return self.groups[body, s]

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
        """The log-sum-exp of a score from the kernel, 0 where nothing is seen; None without a kernel."""
        group = self.group(expression.body, expression.index)
        if group is None:
            return None
        self.emit(group)
        return group.logsumexp

    def handed_out(self, factors: Sequence[Expr], s: Idx) -> tuple[Group, Feature] | None:
        """(group, what tokens hand out) where a softmax weighs features of the token, or None."""
        weights = [f for f in factors if isinstance(f, Softmax) and f.index == s]
        rest = [f for f in factors if f not in weights]
        if len(weights) != 1 or any(s in free_indices(f) for f in rest):
            return None
        group = self.group(weights[0].body, s)
        features = frozenset().union(*map(free_indices, rest))
        if group is None or any(map(is_seq, features)):
            return None
        return group, Feature.of(rest, features - set(group.heads))

    def received(self, factors: Sequence[Expr], s: Idx) -> Value | None:
        """What context tokens receive: the sum over tokens of a softmax times features of the token, or None."""
        found = self.handed_out(factors, s)
        if found is None:
            return None
        group, feature = found
        if not group.received:
            self.emit_received(group)
        out = group.received[feature.key]
        return Value(out.node, out.axes[: len(out.axes) - len(feature.axes)] + feature.axes)

    # -- emission -------------------------------------------------------------------------------------------

    def emit(self, group: Group) -> None:
        if group.emitted:
            return
        group.emitted = True
        ops = self.emitter.ops
        one = self.operands(group)
        q, k = one.q, one.k
        start, places = 0, {}
        for key in one.keys:
            places[key.key] = start
            start += self.features.width(key)
        width, values = start, list(group.values.values())
        if all(value.key in places for value in values):
            v = k
        else:
            places, start = {}, 0
            for value in values:
                places[value.key] = start
                start += self.features.width(value)
            v = self.features.context_features(values, one.heads, group.index, "value")
            # Fused kernels want keys and values of one width; zeros cost nothing but their own columns.
            if start < width:
                v = ops.call(F.pad, v, (0, width - start))
            elif start > width:
                q = ops.call(F.pad, q, (0, start - width))
                k = ops.call(F.pad, k, (0, start - width))
            width = max(width, start)
        ops.keep(k, "append")
        ops.keep(v, "append")
        self.reaches.append(reach(group.score.conditions))
        if (group.body, group.index) in self.wanted:
            ops.kernels.add("sdpa")
            if self.emitter.flex:
                self.emitter.reasons[ONLY_SDPA] = None
            both = ops.call(
                kernels.attention_with_logsumexp,
                *(q, k, v, one.mask, one.causal, one.scale, one.bias),
                name="attention",
            )
            out = ops.call(operator.getitem, both, 0, name="attended")
            lse = ops.call(operator.getitem, both, 1, name="logsumexp")
            lse = ops.unflatten(lse, 1, (*one.heads, *one.own))
            value = Value(lse, (BATCH, *one.heads, *one.own, TOKEN))
            group.logsumexp = self.raised(value, group, one)
        else:
            out = self.attend(q, k, v, one, group)
        heads = (*one.heads, *one.own)
        for value in values:
            group.outputs[value.key] = self.cut(
                out, value, heads, places[value.key], width, "attended"
            )

    def attend(self, q: fx.Node, k: fx.Node, v: fx.Node, one: Operands, group: Group) -> fx.Node:
        """The kernel call that needs no log-sum-exp."""
        ops, mask, causal = self.emitter.ops, one.mask, one.causal
        flex = self.emitter.flex
        ops.kernels.add("flex_attention" if flex else "sdpa")
        if flex:
            self.emitter.reasons[WHERE_FLEX] = None
        window = window_of(group.score.conditions)
        if window and not one.own and one.bias is None:
            names = ("visible", "causal", "ordered", "position", "context_position")
            arguments = (q, k, v, *map(self.emitter.input, names), *window, one.scale)
            arguments = (*arguments, True) if flex else arguments
            return ops.call(kernels.windowed_attention, *arguments, name="attended")
        if flex:
            arguments = (q, k, v, mask, causal, one.scale, one.bias)
            return ops.call(kernels.flex_attention, *arguments, name="attended")
        if one.own and one.bias is None:
            arguments = (q, k, v, mask, causal, one.scale)
            return ops.call(kernels.grouped_attention, *arguments, name="attended")
        if one.bias is not None:
            mask, causal = ops.call(kernels.bias, mask, causal, one.bias, name="bias"), False
        options = {"enable_gqa": True} if one.own else {}
        return ops.call(
            F.scaled_dot_product_attention,
            *(q, k, v),
            attn_mask=mask,
            is_causal=causal,
            scale=one.scale,
            **options,
            name="attended",
        )

    def emit_received(self, group: Group) -> None:
        ops, one = self.emitter.ops, self.operands(group)
        heads, start, parts = (*one.heads, *one.own), 0, []
        for feature in group.handed.values():
            value = ops.contract(list(map(self.emitter.lower, feature.factors)), frozenset())
            parts.append((self.features.settled(value, feature.factors, "h"), feature.axes))
        u = self.features.side_by_side(parts, heads, TOKEN, "handed_out")
        ops.kernels.add("transposed_sdpa")
        out = ops.call(
            kernels.transposed_attention,
            *(one.q, one.k, u, one.mask, one.causal, one.scale, one.bias),
            name="received",
        )
        width = sum(map(self.features.width, group.handed.values()))
        for feature in group.handed.values():
            group.received[feature.key] = self.cut(out, feature, heads, start, width, "received")
            start += self.features.width(feature)

    def cut(
        self,
        out: fx.Node,
        feature: Feature,
        heads: tuple[Idx, ...],
        start: int,
        width: int,
        name: str,
    ) -> Value:
        """The columns of one feature in the output (batch, heads, tokens, width) of a kernel."""
        ops, count = self.emitter.ops, self.features.width(feature)
        if count != width:
            out = ops.call(torch.narrow, out, -1, start, count, name=f"{name}_{feature.label}")
        out = ops.unflatten(ops.unflatten(out, 3, feature.axes), 1, heads)
        return Value(out, (BATCH, *heads, TOKEN, *feature.axes))

    def operands(self, group: Group) -> Operands:
        """Queries, keys and mask of a group, emitted once."""
        if group.operands is None:
            group.operands = self.make_operands(group)
        return group.operands

    def make_operands(self, group: Group) -> Operands:
        score, emitter = group.score, self.emitter
        scale, scales = self.common_scale(score.terms)
        keys, queries = [], []
        for term, relative in zip(score.terms, scales, strict=True):
            key = Feature.of(term.context, term.inner)
            exact = key.is_placed and not any(map(is_placed, term.token))
            if exact:
                key = Feature(key.factors, (*key.axes, EXACT))
            token = [emitter.lower(f) for f in term.token if emitter.constant(f) is None]
            query = emitter.ops.contract([Value(relative), *token], frozenset())
            queries.append((self.features.settled(query, term.token, "h"), key.axes))
            keys.append(key)
        features = [*keys, *group.values.values()]
        read = {idx for feature in features for f in feature.factors for idx in free_indices(f)}
        heads = tuple(idx for idx in group.heads if idx in read)
        own = tuple(idx for idx in group.heads if idx not in read)
        mask, causal, bias = self.mask(score, (*heads, *own), group.index)
        return Operands(
            self.features.side_by_side(queries, (*heads, *own), TOKEN, "query"),
            self.features.context_features(keys, heads, group.index, "key"),
            tuple(keys),
            mask,
            causal,
            bias,
            scale,
            heads,
            own,
        )

    def raised(self, value: Value, group: Group, one: Operands) -> Value:
        """A log-sum-exp with the terms that are the same for all context tokens, where anything is seen."""
        ops = self.emitter.ops
        for term in group.score.constant:
            value = ops.binary(operator.add, value, self.emitter.lower(term))
        if not group.score.constant:
            return value
        heads = (*one.heads, *one.own)
        node = ops.grouped(value, [[BATCH], heads, [TOKEN]])
        node = ops.call(kernels.zero_unseen, node, one.mask)
        return Value(ops.unflatten(node, 1, heads), (BATCH, *heads, TOKEN))

    def mask(
        self, score: Score, heads: tuple[Idx, ...], s: Idx
    ) -> tuple[fx.Node, fx.Node | bool, fx.Node | None]:
        """The mask of a kernel call, whether the kernel applies causality itself, and a bias of the scores."""
        emitter, ops = self.emitter, self.emitter.ops
        mask, causal = emitter.input("visible"), emitter.input("causal")
        for condition in score.conditions:
            holds = ops.call(torch.gt, self.features.pairs(emitter.lower(condition), heads, s), 0)
            mask, causal = ops.call(kernels.seen, mask, causal, holds, name="seen"), False
        if not score.bias:
            return mask, causal, None
        total = emitter.lower(score.bias[0])
        for term in score.bias[1:]:
            total = ops.binary(operator.add, total, emitter.lower(term))
        return (
            mask,
            causal,
            ops.call("type_as", self.features.pairs(total, heads, s), emitter.input("h")),
        )

    def common_scale(self, terms: Sequence[Term]) -> tuple[float, list[float]]:
        """A factor of all scores for the kernel's own scale, and what remains for each term."""
        numbers = []
        for term in terms:
            constants = map(self.emitter.constant, term.token)
            numbers.append(float(math.prod(c for c in constants if c is not None)))
        if all(number == numbers[0] for number in numbers) and numbers[0] > 0:
            return numbers[0], [1] * len(numbers)
        return 1.0, numbers
