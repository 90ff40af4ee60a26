"""Linear attention patterns: sums over the context whose weights are bilinear, with or without decay.

``Sum_s decay_s * score * value``, with a score that is a sum of products of a feature of the token and a feature of the
context token, needs no tensor of all pairs of tokens: the products of context features are summed into a state that
grows with neither. A plain sum of context features is the case of a score that is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from sympy import Expr, Idx, Integer

from ..language.indices import free_indices
from ..language.reductions import Softmax
from ..language.symbols import spelling
from ..language.tokens import Decay
from . import kernels
from .bilinear import Feature, Term, bilinear
from .features import Features, Host
from .values import BATCH, TOKEN, Value, is_seq, moves_with_token


class LinearAttention:
    """Finds the sums of a program that linear attention computes, and emits them."""

    def __init__(self, emitter: Host) -> None:
        self.emitter, self.features = emitter, Features(emitter)
        self.found: dict[tuple, tuple[Value, tuple[Idx, ...]]] = {}
        self.memories = 0

    def summed(self, factors: Sequence[Expr], over: frozenset[Idx]):
        """The sum as a value, with the factors and indices that remain outside it, or None."""
        tokens = [idx for idx in over if is_seq(idx)]
        if len(tokens) != 1:
            return None
        s = tokens[0]
        inside = [f for f in factors if s in free_indices(f)]
        outside = [f for f in factors if s not in free_indices(f)]
        decay = [f for f in inside if isinstance(f, Decay) and f.index == s]
        mixed = [f for f in inside if moves_with_token(f) and f not in decay]
        value = [f for f in inside if f not in decay and f not in mixed]
        if len(decay) > 1 or len(mixed) > 1 or any(isinstance(f, Softmax) for f in mixed):
            return None
        score = bilinear(mixed[0], s) if mixed else bilinear(Integer(1), s)
        if score is None or score.bias or score.conditions:
            return None
        if any(is_seq(idx) for f in (*inside, *outside) for idx in free_indices(f) - {s}):
            return None
        return self.emit(score, decay, value, s), outside, over - {s}

    def emit(self, score, decay: Sequence[Expr], value: Sequence[Expr], s: Idx) -> Value:
        emitter, features = self.emitter, self.features
        free = frozenset().union(*map(free_indices, (*decay, *_factors(score)))) - {s}
        inner = frozenset(idx for term in score.terms for idx in term.inner)
        heads = tuple(sorted(free - inner, key=spelling))
        feature = Feature.of(value, frozenset().union(*map(free_indices, value)) - {s} - {*heads})
        terms = [*score.terms, *(Term((constant,), (), ()) for constant in score.constant)]
        keys, queries = [], []
        for term in terms:
            key = Feature.of(term.context, term.inner)
            token = emitter.ops.contract(list(map(emitter.lower, term.token)), frozenset())
            queries.append((features.settled(token, term.token, "h"), key.axes))
            keys.append(key)
        known = (tuple(queries), tuple(key.key for key in keys), feature.key, tuple(decay), heads)
        if known not in self.found:
            q = features.side_by_side(queries, heads, TOKEN, "query")
            k = features.context_features(keys, heads, s, "key")
            v = k
            if [feature.key] != [key.key for key in keys]:
                v = features.context_features([feature], heads, s, "value")
            self.found[known] = self.call(q, k, v, decay, heads, s, feature)
        out = self.found[known]
        return Value(out.node, (*out.axes[: len(out.axes) - len(feature.axes)], *feature.axes))

    def call(self, q, k, v, decay: Sequence[Expr], heads, s: Idx, feature: Feature) -> Value:
        emitter, ops = self.emitter, self.emitter.ops
        gate = None
        if decay:
            gate = emitter.lower(decay[0].body)
            gate = self.features.side_by_side([(gate, ())], heads, s, "gate")
            gate = ops.call("squeeze", gate, -1)
            ops.keep(gate, "new")
        ops.keep(k, "new")
        ops.keep(v, "new")
        visible, causal = emitter.input("visible"), emitter.input("causal")
        states = emitter.input("states")
        ops.kernels.add("linear_attention")
        around = (visible, causal, states)
        memory = ops.call(kernels.linear_context, k, v, gate, *around, self.memories, name="memory")
        ops.keep(memory, "state")
        self.memories += 1
        out = ops.call(kernels.linear_recalled, q, k, v, gate, *around, memory, name="recalled")
        out = ops.unflatten(ops.unflatten(out, 3, feature.axes), 1, heads)
        return Value(out, (BATCH, *heads, TOKEN, *feature.axes))


def _factors(score) -> list[Expr]:
    return [f for term in score.terms for f in (*term.token, *term.context)] + score.constant
