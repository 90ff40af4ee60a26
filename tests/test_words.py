"""The table of words: values in high precision, derivatives, antiderivatives, signs, shapes."""

import math

import pytest
import sympy
import torch
from mpmath import mp

import cem
from cem.language.words import WORDS, antiderivative, word_of
from cem.testing import assert_close

every = pytest.mark.parametrize("word", WORDS, ids=lambda word: word.name)
POINTS = torch.tensor(
    [-30.0, -8.0, -2.5, -1.0, -0.3, -1e-3, 1e-3, 0.2, 0.9, 1.7, 4.0, 9.0, 25.0], dtype=torch.float64
)
EXACT = {
    "exp": mp.exp,
    "Abs": abs,
    "sign": mp.sign,
    "floor": mp.floor,
    "only": lambda z: mp.mpf(0) if z > 0 else -mp.inf,
    "log": mp.log,
    "sin": mp.sin,
    "cos": mp.cos,
    "tanh": mp.tanh,
    "relu": lambda z: max(z, 0),
    "gelu": lambda z: z * mp.ncdf(z),
    "gelu_tanh": lambda z: (
        z / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3)))
    ),
    "silu": lambda z: z / (1 + mp.exp(-z)),
    "softplus": lambda z: mp.log1p(mp.exp(z)),
    "sigmoid": lambda z: 1 / (1 + mp.exp(-z)),
    "step": lambda z: mp.mpf(z > 0),
    "normal_cdf": mp.ncdf,
    "normal_pdf": mp.npdf,
    "log_cosh": lambda z: mp.log(mp.cosh(z)),
    "relu_antiderivative": lambda z: max(z, 0) ** 2 / 2,
    "gelu_antiderivative": lambda z: ((z**2 - 1) * mp.ncdf(z) + z * mp.npdf(z)) / 2,
    "softplus_antiderivative": lambda z: -mp.re(mp.polylog(2, -mp.exp(z))),
    "silu_antiderivative": lambda z: z * mp.log1p(mp.exp(z)) + mp.re(mp.polylog(2, -mp.exp(z))),
}


def points(word):
    return POINTS[POINTS > 0] if word.name in ("log", "only") else POINTS


@every
def test_values(word):
    """Relative to the value, or to 1 where the value passes through zero."""
    mp.dps = 40
    exact = [float(EXACT[word.name](mp.mpf(z.item()))) for z in points(word)]
    exact = torch.tensor(exact, dtype=torch.float64)
    found = word.torch(points(word))
    assert ((found - exact).abs() <= 2e-14 * exact.abs().clamp_min(1.0)).all()


@every
def test_derivatives_are_those_of_autograd(word):
    z = points(word).clone().requires_grad_()
    # step is not connected to its argument; 0 * z gives it the derivative that it has.
    (expected,) = torch.autograd.grad((word.torch(z) + 0 * z).sum(), z)
    symbol = sympy.Symbol("z", real=True)
    found = evaluate(word.derivative(symbol), {symbol: z.detach()})
    assert ((found - expected).abs() <= 1e-13 * expected.abs().clamp_min(1.0)).all()


def evaluate(expression, values):
    """An expression of words at a tensor of points."""
    if expression in values:
        return values[expression]
    if expression.is_number:
        return torch.full_like(next(iter(values.values())), float(expression))
    args = [evaluate(arg, values) for arg in expression.args]
    if expression.is_Add:
        return sum(args)
    if expression.is_Mul:
        return math.prod(args)
    if expression.is_Pow:
        return args[0] ** args[1]
    return word_of(expression.func).torch(args[0])


@every
def test_the_second_derivative_is_in_the_language(word):
    symbol = sympy.Symbol("z", real=True)
    first = word.derivative(symbol)
    for function in first.atoms(sympy.Function):
        assert word_of(function.func)


@pytest.mark.parametrize(
    "word", [word for word in WORDS if word.antiderivative], ids=lambda word: word.name
)
def test_an_antiderivative_has_the_word_as_its_derivative(word):
    z = points(word).clone().requires_grad_()
    whole = word_of(antiderivative(word.function))
    (slope,) = torch.autograd.grad(whole.torch(z).sum(), z)
    expected = word.torch(points(word))
    assert ((slope - expected).abs() <= 1e-13 * expected.abs().clamp_min(1.0)).all()
    symbol = sympy.Symbol("z", real=True)
    found = evaluate(whole.derivative(symbol), {symbol: points(word)})
    assert_close(found, expected, 1e-12)


@every
def test_signs_and_shapes(word):
    """What the rules of curvature take from the table holds on a fine grid."""
    grid = torch.linspace(1e-3 if word.name == "log" else -6, 6, 2001, dtype=torch.float64)
    value = word.torch(grid)
    slopes = value.diff() / grid.diff()
    if word.sign == 1:
        assert (value >= 0).all()
    if word.monotone:
        assert (word.monotone * slopes >= -1e-12).all()
    if word.curvature:
        bend = slopes.diff() * (1 if word.curvature == "convex" else -1)
        assert (bend >= -1e-9).all()


@every
def test_second_derivatives_by_finite_differences(word):
    z = torch.tensor([-2.1, -0.7, 0.4, 1.9], dtype=torch.float64).abs().requires_grad_()
    assert torch.autograd.gradcheck(word.torch, z)
    if word.name not in ("sign", "step", "floor", "only"):
        assert torch.autograd.gradgradcheck(word.torch, z)


@every
def test_low_precision_keeps_its_dtype(word):
    for dtype in (torch.float32, torch.bfloat16):
        z = points(word).to(dtype)
        assert word.torch(z).dtype == dtype
        assert word.torch(z)[1:].isfinite().all()


def test_a_word_computes_on_tensors():
    z = torch.randn(5)
    assert_close(cem.silu(z), torch.nn.functional.silu(z), 1e-7)
    assert_close(cem.log_cosh(z), torch.log(torch.cosh(z)), 1e-5)
    assert cem.silu(sympy.Symbol("z")).func is cem.silu


def test_only_hides_where_its_argument_is_not_positive():
    assert cem.only(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [-math.inf, -math.inf, 0.0]
    assert cem.only(torch.tensor([True, False])).tolist() == [0.0, -math.inf]


def test_conditions():
    """The indicator of every condition, against Python's own comparison."""
    t, s = sympy.symbols("t s", real=True)
    cases = {
        t < s: lambda t, s: t < s,
        t <= s: lambda t, s: t <= s,
        t > s: lambda t, s: t > s,
        t >= s: lambda t, s: t >= s,
        sympy.Eq(t, s): lambda t, s: t == s,
        sympy.Ne(t, s): lambda t, s: t != s,
        (t < s) & (s < 3): lambda t, s: t < s < 3,
        (t < s) | (s < 1): lambda t, s: t < s or s < 1,
        ~((t < s) & (s < 3)): lambda t, s: not t < s < 3,
    }
    grid = [(a, b) for a in range(-1, 4) for b in range(-1, 4)]
    values = {t: torch.tensor([a for a, _ in grid]), s: torch.tensor([b for _, b in grid])}
    values = {symbol: value.double() for symbol, value in values.items()}
    for condition, holds in cases.items():
        found = evaluate(cem.indicator(condition), values)
        assert found.tolist() == [float(holds(a, b)) for a, b in grid], condition
    with pytest.raises(
        TypeError, match="a condition compares numbers: got 3 of type int; type for"
    ):
        cem.indicator(3)


def test_what_is_no_word():
    with pytest.raises(ValueError, match="`erf` is not a word of the language: type one of Abs"):
        word_of(sympy.erf)
    with pytest.raises(ValueError, match="`gelu_tanh` has no antiderivative among the words: type"):
        antiderivative(cem.gelu_tanh)
