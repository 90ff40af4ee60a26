"""Reading the torch pen: which callables, which arguments, which numbers."""

from functools import partial

import pytest
import sympy
import torch
from sympy import Integer, Rational, Sum
from torch import nn
from torch_pen import Quadratic, U, block, dim, h, heads, i, j, m, matrix, rank, word

from cem.language import words
from cem.language.canonical import canonical
from cem.language.symbols import Frozen, context, frozen, parameter, scalar, state
from cem.language.tracing import signature, translate


def test_frozen_reaches_every_part_of_the_state():
    def energy(h, *, U):
        gate = torch.sigmoid(U @ h).sum()
        return gate.detach() * h.sum()

    expression = translate(energy, {"h": "dim", "U": "hidden dim"}).expression
    (moving,) = [leaf for leaf in expression.atoms(sympy.Indexed) if leaf.base == h]
    assert {leaf.base for leaf in expression.atoms(sympy.Indexed)} == {h, U, frozen(h)}
    assert isinstance(frozen(h), Frozen)
    assert expression == canonical(
        Sum(h[i], i) * Sum(words.sigmoid(Sum(U[m, j] * frozen(h)[j], j)), m)
    ), moving


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = nn.Tanh()

    def forward(self, h, *, U):
        return self.activation(U @ h).sum()


@pytest.mark.parametrize(
    "function",
    [
        Quadratic(0.5),
        Quadratic(torch.tensor(0.5)),
        Quadratic(0.5).method,
        partial(lambda weight, h, *, U: weight * (U @ h).square().sum(), 0.5),
    ],
)
def test_any_callable_will_do(function):
    expression = translate(function, {"h": "dim", "U": "hidden dim"}).expression
    assert expression == canonical(matrix / 2)


def test_modules_are_looked_into():
    expression = translate(Module().forward, {"h": "dim", "U": "hidden dim"}).expression
    assert expression == canonical(word(sympy.tanh))


def test_numbers_stay_exact():
    def energy(h, *, tenth=0.1):
        return 0.5 * h.sum() + 0.1 * h.square().sum() + 3 * tenth

    numbers = translate(energy, {"h": "dim"}).expression.atoms(sympy.Number)
    assert {Rational(1, 2), Integer(3), sympy.Float(0.1)} <= numbers


MINUS_HALF = Rational(-1, 2)


def test_scalars_have_defaults_and_signs():
    def energy(h, *, a, b=1, c=MINUS_HALF, d=None, e=rank**-1):
        return (a + b + c + d + e) * h.sum()

    scalars = translate(energy, {"h": "dim"}).scalars
    assert [str(one.default) for one in scalars] == ["None", "1", "-1/2", "None", "1/rank"]
    assert [one.is_positive for one in scalars] == [None, True, None, None, True]


def test_signature_tells_the_arguments_apart():
    def energy(h, x, visible, *, W, frozen, beta=1.0):
        return (x @ h).masked_fill(~visible, 0).max()

    found = signature(energy, {"h": "(heads block)", "x": "seq dim", "W": "(heads rank) dim"})
    assert found.state == state(heads * block)
    assert found.context == context(dim)
    assert found.parameters == (parameter("W", heads * rank, dim),)
    assert found.scalars == (scalar("beta", default=1.0, positive=True),)
    assert found.frozen and found.visible
    assert found.arguments(1, 2, W=3, beta=4, frozen=5, visible=6) == (
        (1, 2),
        {"W": 3, "beta": 4, "frozen": 5, "visible": 6},
    )


def test_unused_visible_is_translated():
    assert translate(lambda h, x, *, visible: (x @ h).sum(), {"h": "dim", "x": "seq dim"})
