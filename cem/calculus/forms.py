"""Which known layer a gradient step is, as far as the shape of its formulas shows."""

from __future__ import annotations

from collections.abc import Iterator

from sympy import Expr, Idx, Indexed, Sum, preorder_traversal

from ..language.definitions import Definition
from ..language.document import Math, Part
from ..language.order import terms
from ..language.symbols import SEQ, Context, NamedArray, Parameter, State, is_word, size_of
from ..language.tokens import Decay


def known_forms(
    definitions: list[Definition], force: Expr, state: State, free: Idx
) -> Iterator[list[Part]]:
    """Sentences about the terms of -dE/dh at the index ``free``, in terms of ``definitions``."""
    parts = [_Term(term, definitions, free) for term in terms(force)]
    softmax = [part for part in parts if part.weights]
    for weights in dict.fromkeys(part.weights for part in softmax):
        own = sorted((p for p in softmax if p.weights is weights), key=lambda p: not p.readers)
        over_tokens = size_of(weights.indices[-1]) == SEQ
        yield _attention(own[0]) if over_tokens else _memory(own[0])
        for part in own[1:]:
            if tokens := [b for b in part.bases if isinstance(b, Context)]:
                yield _again(part, tokens[0])
    plain = [part for part in parts if part.readers and not part.weights]
    for part in plain:
        if part.over_tokens:
            yield _linear_attention(part)
    plain = [part for part in plain if not part.over_tokens]
    if plain:
        yield _elementwise(plain)
    if any(part.term == -Indexed(state, free) for part in parts):
        yield [
            "The term ", Math(rf"-{Math.of(state).latex}", f"-{Math.of(state).text}"),
            " pulls the state to the origin: with step size 1 it cancels the old state, and the new"
            " one is the rest of the force.",
        ]  # fmt: skip


class _Term:
    """One term of the force: its weights, the parameters that write and the features they read."""

    def __init__(self, term: Expr, definitions: list[Definition], free: Idx) -> None:
        leaves = sorted(term.atoms(Indexed), key=str)
        self.term = term
        self.bases = list(dict.fromkeys(leaf.base for leaf in leaves))
        self.named = [d for d in definitions if d.tensor in self.bases]
        self.weights = next((d for d in self.named if d.is_weights), None)
        self.writers = [
            leaf.base
            for leaf in leaves
            if isinstance(leaf.base, Parameter) and free in leaf.indices
        ]
        self.over_tokens = any(
            size_of(limit[0]) == SEQ for s in term.atoms(Sum) for limit in s.limits
        )
        self.readers = [
            d
            for d in definitions
            if d.stage == "state" and not d.is_weights and _bases(d.expression) & {*self.writers}
        ]
        self.scored = []
        if self.weights:
            inside = _bases(self.weights.expression)
            self.scored = [d for d in definitions if d.tensor in inside]


def _bases(expression: Expr) -> set[NamedArray]:
    return {leaf.base for leaf in expression.atoms(Indexed)}


def _attention(part: _Term) -> list[Part]:
    heads = "multi-head attention" if len(part.weights.indices) > 1 else "attention"
    told: list[Part] = [f"This is {heads}: the weights ", Math.of(part.weights.tensor)]
    told += [" say how much the token looks at each visible one."]
    queries = [d for d in part.scored if d.stage == "state"]
    keys = [d for d in part.scored if d.stage == "context"]
    values = [d for d in keys if d in part.named]
    if queries and keys:
        told += [" ", Math.of(queries[0].tensor), " is the query and "]
        told += [Math.of(keys[0].tensor), " the key"]
        told += [", which is also the value." if values else "."]
    tied = [d for d in queries if d in part.readers]
    if tied and values:
        made = Math.of(part.writers[0])
        told += [" ", made, " makes the query and its transpose is the output projection: "]
        told += ["two matrices where attention usually has four."]
    return told


def _again(part: _Term, tokens: NamedArray) -> list[Part]:
    scales = [Math.of(b) for b in part.bases if isinstance(b, Parameter)]
    told = ["The same weights also average ", Math.of(tokens)]
    told += [", scaled coordinate by coordinate by ", scales[0]] if scales else []
    return [*told, ": one call computes both, with keys and values side by side."]


def _linear_attention(part: _Term) -> list[Part]:
    told: list[Part] = ["This is linear attention: a visible token counts by its score itself"]
    told += [
        ", less what later tokens let decay." if part.term.has(Decay) else ", without a softmax."
    ]
    keys = [d for d in part.named if d.stage == "context"]
    if keys:
        query = part.readers[0]
        sizes = set(map(size_of, query.indices))
        key = max(keys, key=lambda d: len(sizes & set(map(size_of, d.indices))))
        told += [" ", Math.of(query.tensor), " is the query and ", Math.of(key.tensor), " the key"]
        told += [" and the value. The query does not depend on the token that is seen, so the sum"]
        told += [" over the past is a state of fixed size."]
    return told


def _memory(part: _Term) -> list[Part]:
    told: list[Part] = ["This is retrieval from an associative memory: the weights "]
    told += [Math.of(part.weights.tensor), " compare the state with the stored patterns"]
    told += [", the rows of ", Math.of(part.writers[0])] if part.writers else []
    return [
        *told,
        ", and the force is their weighted mean (a modern Hopfield network).",
    ]


def _elementwise(parts: list[_Term]) -> list[Part]:
    readers = list(dict.fromkeys(d.tensor for part in parts for d in part.readers))
    writers = list(dict.fromkeys(base for part in parts for base in part.writers))
    gates = [d for part in parts for d in part.named if d.stage == "frozen"]
    mutual = len(readers) > 1 and any(
        d.stage == "state" and d not in part.readers for part in parts for d in part.named
    )
    shown = Math.of(writers[0])
    if mutual:
        told = ["This is a gated MLP in which both sides move: ", *listed(map(Math.of, writers))]
        return [*told, " each read the state, gate each other and write back by their transposes."]
    if gates:
        told = ["This is a gated MLP: ", shown, " reads the state, the gate "]
        told += [Math.of(gates[0].tensor), " is fixed at the input, and the transpose of "]
        return [*told, shown, " writes."]
    words = {type(n).__name__ for p in parts for n in preorder_traversal(p.term) if is_word(n)}
    told = ["This is an MLP with tied weights: ", *listed(map(Math.of, writers)), " reads, "]
    told += [f"{words.pop()} acts, " if len(words) == 1 else "an activation acts, "]
    return [*told, "and the transpose writes."]


def listed(items) -> list[Part]:
    """Items with commas and a last `and`."""
    items = list(items)
    marks = [", "] * (len(items) - 2) + [" and "] * (len(items) > 1) + [""]
    return [part for pair in zip(items, marks, strict=True) for part in pair]
