"""The derivative of an energy for its named features, by the same reverse mode as the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sympy import Expr, Indexed, Integer

from ..language.definitions import Definition, with_own_letters
from ..language.indices import rename
from ..language.symbols import NamedArray
from .gradient import sweep


def adjoints(energy: Expr, features: Iterable[Definition]) -> Iterator[tuple[Indexed, Expr]]:
    """Pairs of a feature that moves with the state, at its indices, and dE/d(feature).

    ``energy`` is written in terms of the features, as ``definitions`` returns it.

    >>> import cem
    >>> from sympy import Sum
    >>> from cem.language.definitions import definitions
    >>> dim, hidden = cem.dims("dim hidden")
    >>> h, U = cem.state(dim), cem.parameter("U", hidden, dim)
    >>> i, m = dim.index("i"), hidden.index("m")
    >>> found, energy = definitions(Sum(Sum(U[m, i] * h[i], i) ** 2, m) / 2)
    >>> list(adjoints(energy, found))
    [(u[m], u[m])]
    """
    moving = {d.tensor: d for d in features if d.stage == "state" and not d.is_weights}
    found: dict[NamedArray, Expr] = {}

    def pull(root: Expr, seed: Expr) -> None:
        for leaf, adjoint in sweep(root, seed):
            if leaf.base in moving:
                names = dict(zip(leaf.indices, moving[leaf.base].indices, strict=True))
                found[leaf.base] = found.get(leaf.base, Integer(0)) + rename(adjoint, names)

    pull(energy, Integer(1))
    # A feature of features comes after its parts, so its force is complete when it is handed down.
    for tensor, definition in reversed(moving.items()):
        if tensor in found:
            pull(definition.expression, found[tensor])
    for tensor, definition in moving.items():
        if tensor in found:
            form, indices = with_own_letters(found[tensor], definition.indices)
            yield Indexed(tensor, *indices), form
