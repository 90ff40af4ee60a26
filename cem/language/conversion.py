"""From what a user types to an expression, without evaluating text."""

from __future__ import annotations

from sympy import Expr, SympifyError, sympify


def as_expression(value) -> Expr:
    """A number or a SymPy expression as an expression; text is refused, never evaluated.

    >>> as_expression(2) + 1
    3
    >>> as_expression("2 + 1")
    Traceback (most recent call last):
    TypeError: a number or a SymPy expression is needed: got '2 + 1' of type str; type it without quotes
    """
    try:
        return sympify(value, strict=True)
    except SympifyError:
        raise TypeError(
            f"a number or a SymPy expression is needed: got {value!r} of type {type(value).__name__};"
            " type it without quotes"
        ) from None
