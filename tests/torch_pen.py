"""Energies in the torch pen: names and shapes to write them with, and the number that an expression is."""

import math
from functools import partial
from itertools import product

import pytest
import sympy
import torch
from sympy import Sum

from cem.language.reductions import LogSumExp, Softmax
from cem.language.symbols import SEQ, Dim, context, dims, parameter, scalar, size_of, state
from cem.language.tracing import signature, translate

SIZES = {"dim": 5, "seq": 7, "heads": 2, "rank": 3, "hidden": 9, "block": 3, "one": 1}

dim, heads, rank, hidden, block = dims("dim heads rank hidden block")
h, x = state(dim), context(dim)
Q, K = parameter("Q", heads, rank, dim), parameter("K", heads, rank, dim)
U, V, W = parameter("U", hidden, dim), parameter("V", hidden, dim), parameter("W", dim, dim)
b, lam, A = parameter("b", hidden), parameter("lam", heads), parameter("A", heads, rank)
beta = scalar("beta", default=1.5, positive=True)
i, j, a, r, m, s = (
    size.index(name)
    for size, name in zip((dim, dim, heads, rank, hidden, SEQ), "ijarms", strict=True)
)
SHAPES = {
    "h": "dim",
    "x": "seq dim",
    "Q": "heads rank dim",
    "K": "heads rank dim",
    "U": "hidden dim",
    "V": "hidden dim",
    "W": "dim dim",
    "b": "hidden",
    "lam": "heads",
    "A": "heads rank",
}


ERF = math.erf
FUNCTIONS = {
    "exp": math.exp,
    "log": math.log,
    "Abs": abs,
    "sign": lambda z: (z > 0) - (z < 0),
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "relu": lambda z: max(z, 0.0),
    "step": lambda z: float(z > 0),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "softplus": lambda z: math.log1p(math.exp(z)),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "gelu": lambda z: z * (1 + ERF(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "normal_cdf": lambda z: (1 + ERF(z / math.sqrt(2))) / 2,
    "log_cosh": lambda z: math.log(math.cosh(z)),
    "relu_antiderivative": lambda z: max(z, 0.0) ** 2 / 2,
}


def size(expression):
    return int(expression.subs({Dim(name): value for name, value in SIZES.items()}))


def evaluate(node, values, at=None):
    """The number that an expression stands for, by loops over its indices."""
    at = at or {}
    again = partial(evaluate, values=values)
    match node:
        case sympy.Idx():
            return at[node]
        case sympy.Indexed():
            place = tuple(int(again(slot, at=at)) for slot in node.indices)
            return values[str(node.base)][place].item()
        case Sum():
            names = [limit[0] for limit in node.limits]
            ranges = product(*(range(size(size_of(name))) for name in names))
            return math.fsum(
                again(node.function, at=at | dict(zip(names, place, strict=True)))
                for place in ranges
            )
        case LogSumExp():
            terms = [
                again(node.body, at=at | {node.index: n}) for n in range(size(size_of(node.index)))
            ]
            return math.log(math.fsum(map(math.exp, terms)))
        case Softmax():
            terms = [
                again(node.body, at=at | {node.index: n}) for n in range(size(size_of(node.index)))
            ]
            return math.exp(again(node.body, at=at)) / math.fsum(map(math.exp, terms))
        case sympy.Add():
            return math.fsum(again(arg, at=at) for arg in node.args)
        case sympy.Mul():
            return math.prod(again(arg, at=at) for arg in node.args)
        case sympy.Pow():
            return again(node.base, at=at) ** again(node.exp, at=at)
        case Dim():
            return SIZES[node.name]
        case sympy.Symbol():
            return values[node.name]
    if node.is_number and not node.args:
        return float(node)
    (argument,) = node.args
    return FUNCTIONS[type(node).__name__](again(argument, at=at))


def declared(function, shapes=None):
    """The shapes that a callable needs, out of the table above."""
    names = function.__code__.co_varnames[
        : function.__code__.co_argcount + function.__code__.co_kwonlyargcount
    ]
    return {name: text for name, text in (SHAPES | (shapes or {})).items() if name in names}


def inputs(function, shapes, **scalars):
    """Random float64 tensors of the declared shapes and the default values of the scalars."""
    generator = torch.Generator().manual_seed(0)
    found = signature(function, shapes)
    bases = [found.state, *([found.context] if found.context else []), *found.parameters]
    tensors = {
        str(base): torch.randn(*map(size, base.shape), generator=generator, dtype=torch.float64)
        for base in bases
    }
    tensors |= {one.name: float(one.default.subs(SIZES)) for one in found.scalars}
    return found, tensors


def assert_same_number(function, shapes=None):
    shapes = declared(function, shapes)
    translation = translate(function, shapes)
    found, tensors = inputs(function, shapes)
    state_and_context = [
        tensors[str(base)] for base in (found.state, found.context) if base is not None
    ]
    named = {name: tensors[name] for name in map(str, (*found.parameters, *found.scalars))}
    if found.frozen:
        named["frozen"] = tensors["h"]
    got = evaluate(translation.expression, tensors | {"hbar": tensors["h"]})
    expected = float(function(*state_and_context, **named))
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)
    return translation


def word(function):
    """One word of the entries of U h, summed."""
    return Sum(function(Sum(U[m, i] * h[i], i)), m)


square = Sum(h[i] ** 2, i)
matrix = Sum(Sum(U[m, i] * h[i], i) ** 2, m)
scores = Sum(Sum(h[i] * x[s, i], i), s)
bilinear = Sum(Sum(W[i, j] * h[j], j) * h[i], i)


class Quadratic:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, h, *, U):
        return self.weight * (U @ h).square().sum()

    def method(self, h, *, U):
        return self(h, U=U)
