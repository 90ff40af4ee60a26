"""How the parameters of an energy start."""

from __future__ import annotations

from collections.abc import Mapping

from sympy import Expr, Indexed, Mul
from torch import Tensor, nn

from .energy import Energy
from .language.symbols import Context, Parameter, State


def initialise(tensors: Mapping[Parameter, Tensor], energy: Energy, dim: int) -> None:
    """Draw every parameter, in place.

    A tied matrix reads and writes, so its scale counts twice: a parameter with an axis as wide as the state starts
    normal with standard deviation 1/sqrt(dim), any other with 1/sqrt(its last size). A diagonal, which multiplies
    coordinates of the state by those of the context, starts at zero.
    """
    diagonal = diagonals(energy.expression)
    for parameter, tensor in tensors.items():
        if parameter in diagonal:
            nn.init.zeros_(tensor)
        else:
            wide = energy.width in parameter.shape
            nn.init.normal_(tensor, std=(dim if wide else tensor.shape[-1]) ** -0.5)


def diagonals(expression: Expr | None) -> set[Parameter]:
    """The parameters of an interaction that multiply one coordinate of the state by one of the context."""
    found: set[Parameter] = set()
    for product in () if expression is None else expression.atoms(Mul):
        leaves = [factor.base for factor in product.args if isinstance(factor, Indexed)]
        if any(isinstance(b, State) for b in leaves) and any(
            isinstance(b, Context) for b in leaves
        ):
            found.update(base for base in leaves if isinstance(base, Parameter))
    return found
