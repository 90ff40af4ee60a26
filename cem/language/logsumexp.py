"""The smooth maximum of the language as a function for users."""

from __future__ import annotations

from sympy import Expr, Idx

from .conversion import as_expression
from .symbols import LogSumExp


def logsumexp(expression: Expr, *indices: Idx) -> Expr:
    """log sum exp of an expression over one index or several; ``log(Sum(exp(e), s))`` means the same.

    Over an empty visible set its value and its gradient are 0.

    >>> import cem
    >>> dim = cem.dims("dim")
    >>> h, x = cem.state(dim), cem.context(dim)
    >>> i, s = dim.index("i"), x.index("s")
    >>> cem.logsumexp(h[i] * x[s, i], s).free_symbols >= {i}
    True
    """
    if not indices:
        raise ValueError(
            "`logsumexp` needs the index to sum over: got none; type `cem.logsumexp(score, s)`"
        )
    for idx in indices:
        if not isinstance(idx, Idx):
            raise TypeError(
                f"`logsumexp` sums over indices: got {idx!r} of type {type(idx).__name__};"
                ' make one with `dim.index("i")` or `x.index("s")`'
            )
        expression = LogSumExp(as_expression(expression), idx)
    return expression
