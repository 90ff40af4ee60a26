"""What the table of words says of each word's curvature, trend and sign, on a grid."""

import pytest
import torch
from sympy import log

from cem.calculus import curvature as rules
from cem.language import words
from cem.language.words import WORDS

GRID = torch.cat([torch.linspace(-40, 40, 1601), torch.linspace(-2, 2, 801)]).double().unique()


def assert_shape(values, trend, tolerance=1e-12):
    """Neighbouring slopes of values on the grid grow (+1) or fall (-1)."""
    slopes = values.diff() / GRID.diff()
    size = 1 + torch.maximum(values[1:].abs(), values[:-1].abs()) / GRID.diff()
    assert (trend * slopes.diff() >= -tolerance * (size[1:] + size[:-1])).all()


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word.name)
def test_the_table_of_words(word):
    values = word.torch(GRID)
    if word.function is log:
        assert word.curvature == "concave", "on its domain, which the rules ask for"
        return
    if word.curvature:
        assert_shape(values, {"convex": 1, "concave": -1}[word.curvature])
    if word.monotone:
        assert (word.monotone * values.diff() >= -1e-14 * values[1:].abs()).all()
    if word.sign:
        assert (word.sign * values >= 0).all()


@pytest.mark.parametrize("function", sorted(rules.EVEN, key=str))
def test_even_words(function):
    values = words.word_of(function).torch(GRID)
    assert_shape(values, 1)
    torch.testing.assert_close(values, words.word_of(function).torch(-GRID), rtol=0, atol=1e-14)


@pytest.mark.parametrize("function", sorted(rules.SIGN_KEEPING, key=str))
def test_words_that_keep_the_sign(function):
    assert (words.word_of(function).torch(GRID) * GRID >= 0).all()


@pytest.mark.parametrize("function", sorted(rules.LOG_CONCAVE, key=str))
def test_log_concave_words(function):
    values = words.word_of(function).torch(GRID)
    assert words.word_of(function).monotone == 1
    assert_shape(values.log(), -1)
