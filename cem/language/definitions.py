"""Names for the parts of an expression that a person would name: q = Q h, k = K x, weights p.

A named part becomes a tensor of its own: what moves with the state a ``State``, what depends on
the context alone a ``Context``, and so on, so that a rewritten expression is of the language too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sympy import Expr, Idx, Indexed, Mul, Pow, Sum, Symbol

from .canonical import canonical
from .indices import bound_name, free_indices, rename
from .notation import latex, text
from .reductions import SmoothMaximum, Weights
from .symbols import SEQ, Context, Frozen, NamedArray, Parameter, Ravel, State, size_of

STAGES: dict[str, type[NamedArray]] = {
    "parameters": Parameter,
    "state": State,
    "context": Context,
    "frozen": Frozen,
}


@dataclass(frozen=True)
class Definition:
    """A name for an expression: ``tensor[indices] = expression``.

    ``stage`` says what the value depends on besides parameters: ``"state"``, ``"context"``,
    ``"frozen"`` or nothing (``"parameters"``).
    """

    tensor: NamedArray
    indices: tuple[Idx, ...]
    expression: Expr
    stage: str

    @property
    def name(self) -> str:
        return str(self.tensor.label)

    @property
    def entry(self) -> Indexed:
        """The named quantity at its indices."""
        return Indexed(self.tensor, *self.indices)

    @property
    def is_weights(self) -> bool:
        """Whether these are the weights of a softmax."""
        return isinstance(self.expression, Weights)

    @property
    def symbol_latex(self) -> str:
        """LaTeX of the left-hand side."""
        return latex(self.entry)

    def __str__(self) -> str:
        return f"{text(self.entry)} = {text(self.expression)}"


def definitions(
    expressions: Expr | Iterable[Expr],
) -> tuple[list[Definition], Expr | list[Expr]]:
    """The parts of expressions that deserve a name, and the expressions in terms of them.

    Named are contractions of parameters with the state, the frozen state or the context, under the
    name of the parameter in lower case, and the weights of every softmax, p. A name that is taken
    gets a bar (frozen) or a prime. Given one expression, the second value is one expression.

    >>> import cem
    >>> from sympy import Sum
    >>> dim, hidden = cem.dims("dim hidden")
    >>> h, U = cem.state(dim), cem.parameter("U", hidden, dim)
    >>> i, m = dim.index("i"), hidden.index("m")
    >>> found, energy = definitions(-Sum(Sum(U[m, i] * h[i], i) ** 2, m) / 2)
    >>> print(*found, text(energy), sep="; ")
    u[m] = Σ_i U[m,i] h[i]; -(1/2) Σ_m u[m]²
    """
    roots = [expressions] if isinstance(expressions, Expr) else list(expressions)
    naming = Naming(roots)
    rewritten = [naming.rewrite(root) for root in roots]
    return naming.definitions, rewritten[0] if isinstance(expressions, Expr) else rewritten


class Naming:
    """Hands out names; one object rewrites several expressions in the same names."""

    def __init__(self, roots: Iterable[Expr] = ()) -> None:
        self.found: dict[Expr, Definition] = {}
        self.taken = {"E"}
        self.moving: set[str] = set()
        for root in roots:
            self.taken |= {leaf.name for leaf in root.atoms(Symbol)}
            # A frozen feature leaves the plain letter to one that moves.
            features = [node for node in root.atoms(Sum) if _feature(node) in ("state", "context")]
            self.moving |= set(map(_letter_of, features))

    @property
    def definitions(self) -> list[Definition]:
        """The names so far, features before the weights that are made of them."""
        stages = list(STAGES)
        return sorted(self.found.values(), key=lambda d: (d.is_weights, stages.index(d.stage)))

    def rewrite(self, expression: Expr) -> Expr:
        """The normal form of an expression in terms of named parts."""
        expression = canonical(expression)
        return canonical(self._visit(expression, free_indices(expression), {}))

    def _visit(self, node: Expr, outer: frozenset[Idx], memo: dict[Expr, Expr]) -> Expr:
        if not node.args or isinstance(node, Idx | Indexed | NamedArray | Symbol):
            return node
        if node not in memo:
            memo[node] = self._rebuild(node, outer, memo)
        return memo[node]

    def _rebuild(self, node: Expr, outer: frozenset[Idx], memo: dict[Expr, Expr]) -> Expr:
        match node:
            case Sum():
                found = Sum(self._visit(node.function, outer, memo), *node.limits)
                stage = _feature(found)
                # What has an index of the whole, such as a gradient's, is a result and not a part.
                if stage and free_indices(found) and not free_indices(found) & outer:
                    return self._name(found, stage, _letter_of(found))
                return found
            case Weights():
                found = node.func(self._visit(node.body, outer, memo), *node.args[1:])
                return self._name(found, _stage(found), "p")
            case SmoothMaximum() | Ravel():
                return node.func(self._visit(node.args[0], outer, memo), *node.args[1:])
        return node.func(*(self._visit(arg, outer, memo) for arg in node.args))

    def _name(self, node: Expr, stage: str, letter: str) -> Expr:
        order = _axes(node)
        form, indices = with_own_letters(node, order)
        if form not in self.found:
            kind = STAGES[stage]
            shape = tuple(map(size_of, indices))
            name = self._free_name(letter, stage)
            tensor = kind(Symbol(name, real=True), shape=shape)
            self.found[form] = Definition(tensor, indices, form, stage)
        return Indexed(self.found[form].tensor, *order)

    def _free_name(self, letter: str, stage: str) -> str:
        wanted = [letter]
        if stage == "frozen":
            wanted = [f"{letter}bar"] if letter in self.moving else [letter, f"{letter}bar"]
        while not (free := [name for name in wanted if name not in self.taken]):
            wanted = [f"{name}'" for name in wanted]
        self.taken.add(free[0])
        return free[0]


def with_own_letters(expression: Expr, indices: tuple[Idx, ...]) -> tuple[Expr, tuple[Idx, ...]]:
    """The normal form of an expression, its free indices in the usual letters of their sizes.

    A letter that the expression binds is left out, so that nothing is captured.
    """
    marks = [Idx(Symbol(f"_{n}", integer=True), size_of(idx)) for n, idx in enumerate(indices)]
    form = canonical(rename(expression, dict(zip(indices, marks, strict=True))))
    used = {idx.label for idx in form.atoms(Idx)}
    letters: list[Idx] = []
    for idx in indices:
        height = 0
        while bound_name(size_of(idx), height).label in used:
            height += 1
        letters.append(bound_name(size_of(idx), height))
        used.add(letters[-1].label)
    return form.xreplace(dict(zip(marks, letters, strict=True))), tuple(letters)


def _stage(node: Expr) -> str:
    """The stage of a part: the state before the context before the frozen state."""
    kinds = {type(entry.base) for entry in node.atoms(Indexed)}
    return next(
        (stage for stage in ("state", "context", "frozen") if STAGES[stage] in kinds), "parameters"
    )


def _feature(node: Sum) -> str | None:
    """The stage of a contraction of parameters with one thing, or None for any other sum."""
    factors = Mul.make_args(node.function)
    others = [f for f in factors if not (isinstance(f, Indexed) and isinstance(f.base, Parameter))]
    if len(others) == len(factors) or len(others) > 1 or len(factors) < 2:
        return None
    if any(size_of(limit[0]) == SEQ for limit in node.limits):
        return None
    kinds = {type(entry.base) for entry in node.atoms(Indexed)} - {Parameter}
    if len(kinds) > 1 or node.atoms(SmoothMaximum) or any(isinstance(f, Pow) for f in others):
        return None
    return _stage(node)


def _letter_of(node: Sum) -> str:
    """The lower-case name of a contraction's parameter; z for long names, w for parameters only."""
    factors = Mul.make_args(node.function)
    names = [str(f.base.label) for f in factors if isinstance(getattr(f, "base", None), Parameter)]
    if len(names) == len(factors):
        return "w"
    stem = names[0].split("_")[0].rstrip("0123456789'")
    return names[0].replace(stem, stem.lower(), 1) if len(stem) == 1 and stem.isupper() else "z"


def _axes(node: Expr) -> tuple[Idx, ...]:
    """The free indices in the order of the axes of parameters, with seq before the last: a, s, r.

    The index of a softmax comes last.
    """
    free = free_indices(node)
    entries = sorted(node.atoms(Indexed), key=lambda e: (not isinstance(e.base, Parameter), str(e)))
    order = list(
        dict.fromkeys(
            idx
            for entry in entries
            for slot in entry.indices
            for idx in slot.atoms(Idx)
            if idx in free
        )
    )
    order += sorted(free - set(order), key=str)
    last = node.index if isinstance(node, Weights) else None
    tokens = [idx for idx in order if size_of(idx) == SEQ and idx != last]
    axes = [idx for idx in order if idx not in tokens and idx != last]
    place = max(len(axes) - 1, 0) if last is None else len(axes)
    axes[place:place] = tokens
    return (*axes, last) if last is not None else tuple(axes)
