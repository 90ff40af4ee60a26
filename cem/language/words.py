"""The table of element-wise words: one row a word, with its derivative, torch meaning, curvature and LaTeX.

A word is a SymPy function of one argument. Called on a torch tensor, or inside the torch pen, it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from sympy import Expr, Function, Integer, Mul, Rational
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanAtom
from torch import Tensor
from torch.nn import functional as F


class Activation(Function):
    """Base of the words that SymPy does not have; called on a tensor it computes."""

    nargs = 1

    def __new__(cls, z, **options):
        if isinstance(z, torch.fx.Proxy):
            return z.tracer.create_proxy("call_function", cls, (z,), {})
        if isinstance(z, Tensor):
            return word_of(cls).torch(z)
        return super().__new__(cls, z, **options)

    def _eval_is_real(self):
        return self.args[0].is_real

    def fdiff(self, argindex: int = 1) -> Expr:
        return word_of(type(self)).derivative(self.args[0])


class relu(Activation):
    """max(z, 0)."""


class gelu(Activation):
    """z Phi(z), with Phi the normal distribution function (arXiv:1606.08415)."""


class gelu_tanh(Activation):
    """The tanh approximation of gelu: z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))."""


class silu(Activation):
    """z sigmoid(z)."""


class softplus(Activation):
    """log(1 + exp(z)), the antiderivative of the sigmoid."""


class sigmoid(Activation):
    """1 / (1 + exp(-z))."""


class step(Activation):
    """1 where z > 0, else 0: the derivative of relu (0 at the kink, as in torch)."""


class floor(Activation):
    """The largest whole number that is not above z; its derivative is 0."""


class only(Activation):
    """0 where z > 0, else minus infinity: added to a score it hides the tokens where z <= 0.

    A condition of SymPy is read as its :func:`indicator`.

    >>> import cem
    >>> dim = cem.dims("dim")
    >>> t, s = cem.position(cem.state(dim)), cem.position(cem.context(dim).index("s"))
    >>> cem.only(t - s < 4)
    only(step(-position + context_position[s] + 4))
    """

    def __new__(cls, z, **options):
        # A symbol of SymPy is a Boolean too.
        is_condition = isinstance(z, Boolean) and not isinstance(z, Expr)
        return super().__new__(
            cls, indicator(z) if isinstance(z, bool) or is_condition else z, **options
        )


def indicator(condition) -> Expr:
    """1 where a condition of SymPy holds and 0 elsewhere, as an expression.

    ``<``, ``<=``, ``>``, ``>=``, ``Eq``, ``Ne``, ``&``, ``|`` and ``~`` are understood; they compare numbers that do
    not move with the state, such as positions.

    Raises:
        TypeError: what is not a condition.

    >>> import cem
    >>> h = cem.state(cem.dims("dim"))
    >>> cem.indicator(cem.position(h) >= 4)
    1 - step(4 - position)
    """
    if isinstance(condition, bool | BooleanAtom):
        return Integer(bool(condition))
    match condition:
        case sympy.And():
            return Mul(*map(indicator, condition.args))
        case sympy.Or():
            return 1 - Mul(*(1 - indicator(one) for one in condition.args))
        case sympy.Not():
            return 1 - indicator(condition.args[0])
        case Relational():
            gap = condition.lhs - condition.rhs
            above, below = step(gap), step(-gap)
            table = {"<": below, ">": above, "<=": 1 - above, ">=": 1 - below}
            table |= {"==": (1 - above) * (1 - below), "!=": above + below}
            return table[condition.rel_op]
    raise TypeError(
        f"a condition compares numbers: got {condition!r} of type {type(condition).__name__}; type for"
        " instance `cem.position(h) - cem.position(s) < 128`"
    )


class normal_cdf(Activation):
    """Phi(z), the distribution function of the standard normal."""


class normal_pdf(Activation):
    """phi(z) = exp(-z^2/2) / sqrt(2 pi)."""


class log_cosh(Activation):
    """log cosh(z), the antiderivative of tanh."""


class relu_antiderivative(Activation):
    """relu(z)^2 / 2."""


class gelu_antiderivative(Activation):
    """((z^2 - 1) Phi(z) + z phi(z)) / 2."""


class softplus_antiderivative(Activation):
    """-Li2(-exp(z)), with Li2 the dilogarithm."""


class silu_antiderivative(Activation):
    """z softplus(z) + Li2(-exp(z)), with Li2 the dilogarithm."""


@dataclass(frozen=True)
class Word:
    """One row of the table.

    ``curvature`` is the shape of the function on its domain (``convex``, ``concave`` or ``None``),
    ``monotone`` is +1, -1 or 0, ``sign`` is +1 where it is never negative, else 0: what the rules of
    disciplined convex programming need. ``bounds`` holds every value, where more than the sign is known;
    ``second`` every second derivative, None where it has no bound. Both are rounded outward.
    """

    function: type[Function]
    derivative: Callable[[Expr], Expr]
    torch: Callable[[Tensor], Tensor]
    latex: str
    curvature: str | None = None
    monotone: int = 0
    sign: int = 0
    antiderivative: type[Function] | None = None
    bounds: tuple[float, float] | None = None
    second: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        return self.function.__name__


def _softplus(z: Tensor) -> Tensor:
    # torch switches to the identity at 20 by default, which costs 2e-9; at 40 the switch is below float64.
    return F.softplus(z, threshold=40.0)


def _normal_cdf(z: Tensor) -> Tensor:
    # torch.special.ndtr loses the left tail: it is 0 below -9 in float64.
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))


def _normal_pdf(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) * (1.0 / math.sqrt(2.0 * math.pi))


def _log_cosh(z: Tensor) -> Tensor:
    return _softplus(2.0 * z) - z - math.log(2.0)


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _step(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _only(z: Tensor) -> Tensor:
    dtype = torch.get_default_dtype() if z.dtype == torch.bool else z.dtype
    return torch.zeros_like(z, dtype=dtype).masked_fill(~(z > 0), -math.inf)


def _relu_antiderivative(z: Tensor) -> Tensor:
    return 0.5 * torch.relu(z).square()


def _gelu_antiderivative(z: Tensor) -> Tensor:
    return 0.5 * ((z * z - 1.0) * _normal_cdf(z) + z * _normal_pdf(z))


def _silu_antiderivative(z: Tensor) -> Tensor:
    return z * _softplus(z) - _softplus_antiderivative(z)


def _softplus_antiderivative(z: Tensor) -> Tensor:
    """-Li2(-e^z): a Bernoulli series in log(1 + e^-|z|) <= log 2, and the inversion formula for z > 0.

    With y = log(1 + e^-|z|), -Li2(-e^-|z|) = y + y^2/4 + sum_k B_2k y^(2k+1)/(2k+1)!, nine terms of which
    reach float64 (Lewin, Polylogarithms and Associated Functions, 1981, sections 1.2 and 1.5).
    """
    y = _softplus(-z.abs())
    square = y * y
    series = torch.zeros_like(y)
    for coefficient in reversed(_BERNOULLI):
        series = series * square + coefficient
    tail = y + 0.25 * square + y * square * series
    return torch.where(z > 0, 0.5 * z * z + math.pi**2 / 6.0 - tail, tail)


_BERNOULLI = tuple(float(sympy.bernoulli(2 * k) / sympy.factorial(2 * k + 1)) for k in range(1, 10))


def _gelu_tanh_derivative(z: Expr) -> Expr:
    c = sympy.sqrt(2 / sympy.pi)
    t = sympy.tanh(c * (z + Rational(44715, 1000000) * z**3))
    return (1 + t) / 2 + z * (1 - t**2) * c * (1 + Rational(134145, 1000000) * z**2) / 2


_WAVE = ((-1, 1), (-1, 1))

WORDS: tuple[Word, ...] = (
    Word(sympy.exp, sympy.exp, torch.exp, r"\exp", "convex", +1, +1, sympy.exp),
    Word(sympy.log, lambda z: 1 / z, torch.log, r"\log", "concave", +1),
    Word(sympy.Abs, sympy.sign, torch.abs, r"\left|{}\right|", "convex", 0, +1),
    Word(sympy.sign, lambda z: Integer(0), torch.sign, r"\operatorname{sign}", None, +1),
    Word(sympy.sin, sympy.cos, torch.sin, r"\sin", None, 0, 0, None, *_WAVE),
    Word(sympy.cos, lambda z: -sympy.sin(z), torch.cos, r"\cos", None, 0, 0, sympy.sin, *_WAVE),
    Word(
        sympy.tanh,
        lambda z: 1 - sympy.tanh(z) ** 2,
        torch.tanh,
        r"\tanh",
        None,
        +1,
        0,
        log_cosh,
        (-1, 1),
        (-0.77, 0.77),
    ),
    Word(relu, step, torch.relu, r"\operatorname{relu}", "convex", +1, +1, relu_antiderivative),
    Word(
        gelu,
        lambda z: normal_cdf(z) + z * normal_pdf(z),
        F.gelu,
        r"\operatorname{gelu}",
        antiderivative=gelu_antiderivative,
        bounds=(-0.17, math.inf),
        second=(-0.108, 0.798),
    ),
    Word(
        gelu_tanh,
        _gelu_tanh_derivative,
        _gelu_tanh,
        r"\operatorname{gelu}_{\tanh}",
        bounds=(-0.1701, math.inf),
        second=(-0.108, 0.798),
    ),
    Word(
        silu,
        lambda z: sigmoid(z) * (1 + z * (1 - sigmoid(z))),
        F.silu,
        r"\operatorname{silu}",
        antiderivative=silu_antiderivative,
        bounds=(-0.2785, math.inf),
        second=(-0.037, 0.5),
    ),
    Word(
        softplus,
        sigmoid,
        _softplus,
        r"\operatorname{softplus}",
        "convex",
        +1,
        +1,
        softplus_antiderivative,
        second=(0, 0.25),
    ),
    Word(
        sigmoid,
        lambda z: sigmoid(z) * (1 - sigmoid(z)),
        torch.sigmoid,
        r"\sigma",
        None,
        +1,
        +1,
        softplus,
        (0, 1),
        (-0.0963, 0.0963),
    ),
    Word(step, lambda z: Integer(0), _step, r"\mathbf{1}_{>0}", None, +1, +1, relu, (0, 1)),
    Word(normal_cdf, normal_pdf, _normal_cdf, r"\Phi", None, +1, +1, None, (0, 1), (-0.242, 0.242)),
    Word(
        normal_pdf,
        lambda z: -z * normal_pdf(z),
        _normal_pdf,
        r"\varphi",
        None,
        0,
        +1,
        normal_cdf,
        (0, 0.399),
        (-0.399, 0.1781),
    ),
    Word(floor, lambda z: Integer(0), torch.floor, r"\left\lfloor{}\right\rfloor", None, +1),
    Word(only, lambda z: Integer(0), _only, r"\operatorname{only}"),
    Word(log_cosh, sympy.tanh, _log_cosh, r"\log\cosh", "convex", 0, +1, second=(0, 1)),
    Word(
        relu_antiderivative,
        relu,
        _relu_antiderivative,
        r"\operatorname{relu}^{(-1)}",
        "convex",
        +1,
        +1,
        second=(0, 1),
    ),
    Word(
        gelu_antiderivative,
        gelu,
        _gelu_antiderivative,
        r"\operatorname{gelu}^{(-1)}",
        second=(-0.129, 1.129),
    ),
    Word(
        softplus_antiderivative,
        softplus,
        _softplus_antiderivative,
        r"\operatorname{softplus}^{(-1)}",
        "convex",
        +1,
        +1,
        second=(0, 1),
    ),
    Word(
        silu_antiderivative,
        silu,
        _silu_antiderivative,
        r"\operatorname{silu}^{(-1)}",
        second=(-0.0999, 1.0999),
    ),
)

_ROWS = {word.function: word for word in WORDS}


def word_of(function: type[Function]) -> Word:
    """The row of a function; ``ValueError`` for one that is not a word of the language."""
    try:
        return _ROWS[function]
    except KeyError:
        raise ValueError(
            f"`{function.__name__}` is not a word of the language: type one of"
            f" {', '.join(sorted(row.name for row in WORDS))}"
        ) from None


def antiderivative(function: type[Function]) -> type[Function]:
    """The word whose derivative is the given word, up to a constant.

    >>> import cem
    >>> cem.antiderivative(cem.gelu)
    gelu_antiderivative
    """
    found = word_of(function).antiderivative
    if found is None:
        raise ValueError(
            f"`{function.__name__}` has no antiderivative among the words: type one of"
            f" {', '.join(sorted(row.name for row in WORDS if row.antiderivative))}"
        )
    return found
