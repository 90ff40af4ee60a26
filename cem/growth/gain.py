"""A learned number for each row of a size, so that a new row can be there and do nothing.

    sum_m E_m   ->   sum_m gain_m E_m,      gain = 1 for old rows, 0 for new ones

At gain_m = 0 nothing of row m is in the energy, whatever the row is; the gradient of gain_m is that of E_m, so it
learns at once, and the row as soon as it has. So every size that the energy sums over can grow, at the price of one
number a row, and of what needs weights that are not negative: with gain_m < 0 a concave energy is not concave.
"""

from __future__ import annotations

from sympy import Expr, Idx, Indexed, Sum

from ..energy import Energy
from ..language.symbols import Dim, parameter, size_of, total


def gain_name(size: Dim) -> str:
    """The name of the parameter with a number a row."""
    return f"{size}_gain"


def with_gain(energy: Energy, size: Dim) -> Energy:
    """The energy with a learned number for each row of a size, wherever it is summed over.

    Raises:
        ValueError: the energy does not sum over the size, or its expression is not known.

    >>> import cem
    >>> from cem.energies import plain
    >>> with_gain(plain, cem.dims("hidden")).expression
    -Sum(relu_antiderivative(Sum(U[m, i]*h[i], (i, 0, dim - 1)))*hidden_gain[m], (m, 0, hidden - 1))
    """
    if energy.expression is None:
        raise ValueError(
            f"energy `{energy.name}` has no expression to put a gain into: {energy.reason}"
        )
    gain, found = parameter(gain_name(size), size), []

    def visit(part: Expr) -> Expr:
        if not part.args or isinstance(part, Indexed | Idx):
            return part
        if isinstance(part, Sum):
            body, indices = visit(part.function), tuple(limit[0] for limit in part.limits)
            for index in indices:
                if size_of(index) == size:
                    found.append(index)
                    body = gain[index] * body
            return total(body, indices)
        return part.func(*(visit(a) if isinstance(a, Expr) else a for a in part.args))

    expression = visit(energy.expression)
    if not found:
        raise ValueError(
            f"energy `{energy.name}` does not sum over `{size}`, so its rows cannot have a gain each: got"
            f" {energy.expression}; choose another size"
        )
    return Energy(expression, name=f"{energy.name}_with_{gain_name(size)}")
