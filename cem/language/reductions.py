"""Reductions over one index: the smooth maxima of the language and the weights that are their derivatives."""

from __future__ import annotations

from sympy import Expr, Idx, Sum

from .conversion import as_expression


class Reduction(Expr):
    """An expression over one index: ``args = (body, index)``."""

    @property
    def body(self) -> Expr:
        return self.args[0]

    @property
    def index(self) -> Idx:
        return self.args[1]

    is_commutative = True
    is_extended_real = True
    is_real = True


class SmoothMaximum(Reduction):
    """A convex function of the body, whose slopes are ``weights``; 0 over an empty visible set."""

    @property
    def free_symbols(self):
        return self.body.free_symbols - {self.index}

    def _eval_derivative(self, symbol):
        return Sum(self.weights * self.body.diff(symbol), self.index)


class Weights(Reduction):
    """Numbers of the index, which stays free: not negative, and they sum to one."""

    is_nonnegative = True


class LogSumExp(SmoothMaximum):
    """log sum_s exp(body)."""

    @property
    def weights(self) -> Expr:
        return Softmax(*self.args)

    def _latex(self, printer) -> str:
        body, idx = map(printer.doprint, self.args)
        return rf"\log \sum_{{{idx}}} e^{{{body}}}"


class Softmax(Weights):
    """exp(body) / sum_s exp(body)."""

    def _latex(self, printer) -> str:
        body, idx = map(printer.doprint, self.args)
        return rf"\operatorname{{softmax}}_{{{idx}}}\left({body}\right)"


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
