"""What an expression must be to be an energy: words of the language, no free index, one shape a name."""

from __future__ import annotations

from sympy import Expr, Function, Idx, Indexed, S, Sum, Symbol

from .indices import free_indices
from .positions import Lookup, Rope
from .symbols import Context, NamedArray, State
from .tokens import Decay
from .words import only, word_of

UNREAL = tuple(
    type(number)
    for number in (S.ImaginaryUnit, S.Infinity, S.NegativeInfinity, S.NaN, S.ComplexInfinity)
)


def check_expression(expression: Expr, name: str) -> list[NamedArray]:
    """The arrays of an energy's expression, by name; ``ValueError`` for what is not an energy.

    >>> import cem
    >>> dim = cem.dims("dim")
    >>> check_expression(cem.state(dim)[dim.index("i")], "e")
    Traceback (most recent call last):
    ValueError: energy `e` must be one number per token: got the free index i; sum over it with `Sum(..., i)`
    """
    _check_nodes(expression, name)
    _check_free(expression, name)
    bases = sorted({leaf.base for leaf in expression.atoms(Indexed)}, key=str)
    _check_bases(bases, name)
    return bases


def _check_nodes(expression: Expr, name: str) -> None:
    """Refuse what is not a word of the language."""
    stack = [expression]
    while stack:
        node = stack.pop()
        if isinstance(node, Indexed):
            if not isinstance(node.base, NamedArray):
                raise ValueError(
                    f"energy `{name}`: the array `{node.base}` has no named sizes: got {node}; type"
                    f' `{node.base} = cem.parameter("{node.base}", ...)`'
                )
            continue
        if isinstance(node, Sum):
            stack.append(node.function)
            for limit in node.limits:
                if not isinstance(limit[0], Idx):
                    raise ValueError(
                        f"energy `{name}` sums over `{limit[0]}`, which is no index: got {limit}; make one with"
                        ' `dim.index("i")` or `x.index("s")`'
                    )
            continue
        if isinstance(node, Lookup | Rope | Decay) or (
            isinstance(node, Function) and node.func is only
        ):
            _check_fixed(node, name)
        stack += [arg for arg in node.args if isinstance(arg, Expr) and not isinstance(arg, Idx)]
        if isinstance(node, NamedArray):
            raise ValueError(
                f"energy `{name}`: the array `{node.name}` stands without indices: got {expression}; type"
                f' `{node.name}[i]` with `i = {node.shape[0]}.index("i")`'
            )
        if isinstance(node, UNREAL):
            raise ValueError(
                f"energy `{name}` must be a finite real number: got `{node}` in {expression}; leave it out"
            )
        if type(node) is Symbol:
            raise ValueError(
                f"energy `{name}`: the symbol `{node}` is no word of the language; type"
                f' `cem.scalar("{node}")` for a number or `cem.dims("{node}")` for a size'
            )
        if isinstance(node, Function):
            try:
                word_of(type(node))
            except ValueError as error:
                raise ValueError(f"energy `{name}`: {error}") from None


def _check_fixed(node: Expr, name: str) -> None:
    """Refuse a number to look up, a rotation or a condition that moves with the state."""
    what = {Lookup: "lookup", Rope: "rope", Decay: "decay"}.get(type(node), "only")
    parts = node.args if what != "rope" else (node.position,)
    if any(isinstance(leaf.base, State) for part in parts for leaf in part.atoms(Indexed)):
        raise ValueError(
            f"energy `{name}`: `{what}` takes what does not move with the state: got {node}; use positions,"
            " the context or `cem.frozen(h)`"
        )


def _check_free(expression: Expr, name: str) -> None:
    free = sorted(map(str, free_indices(expression)))
    if free:
        raise ValueError(
            f"energy `{name}` must be one number per token: got the free index"
            f"{'es' if len(free) > 1 else ''} {', '.join(free)}; sum over it with `Sum(..., {free[0]})`"
        )


def _check_bases(bases: list[NamedArray], name: str) -> None:
    seen: dict[str, NamedArray] = {}
    for base in bases:
        other = seen.setdefault(str(base.name), base)
        if other != base:
            raise ValueError(
                f"energy `{name}` uses `{base.name}` with two shapes: got {tuple(other.shape)} and"
                f" {tuple(base.shape)}; give one of them another name"
            )
    for kind in (State, Context):
        found = [base for base in bases if isinstance(base, kind)]
        if len(found) > 1:
            raise ValueError(
                f"energy `{name}` has more than one {kind.__name__.lower()}: got"
                f" {', '.join(str(b.name) for b in found)}; an energy has one"
            )
