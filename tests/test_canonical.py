"""One normal form for every way of writing an expression, and nothing captured on the way there."""

import pytest
import torch
from sympy import Sum, exp, log

import cem
from cem.language.canonical import canonical
from cem.language.evaluation import Evaluator
from cem.language.indices import free_indices, rename
from cem.language.reductions import LogSumExp, Softmax
from cem.language.symbols import SEQ, Ravel, join, split
from cem.testing import assert_close

SIZES = {"dim": 5, "heads": 2, "rank": 3, "hidden": 4, "block": 3}
dim, heads, rank, hidden, block = cem.dims("dim heads rank hidden block")
h, x = cem.state(dim), cem.context(dim)
Q, U = cem.parameter("Q", heads, rank, dim), cem.parameter("U", hidden, dim)
W, w, lam = cem.parameter("W", dim, dim), cem.parameter("w", dim), cem.parameter("lam", heads)
beta = cem.scalar("beta", positive=True)
i, j, k = (dim.index(name) for name in "ijk")
a, a2, r = heads.index("a"), heads.index("f"), rank.index("r")
m, n = hidden.index("m"), hidden.index("n")
s, u = x.index("s"), x.index("u")
y, z = (dim.index(name) for name in ("apple", "i_1"))


def up(index=i, hidden_index=m):
    return Sum(U[hidden_index, index] * h[index], index)


EQUAL = {
    "names": (Sum(w[i] * h[i], i), Sum(w[y] * h[y], y)),
    "hidden names": (Sum(up() ** 2, m), Sum(up(z, n) ** 2, n)),
    "constants inside": (Sum(3 * w[i] * h[i], i), 3 * Sum(w[i] * h[i], i)),
    "factors inside": (
        Sum(lam[a] * Sum(Q[a, r, i] * h[i], i), a),
        Sum(lam[a] * Q[a, r, i] * h[i], i, a),
    ),
    "order of sums": (Sum(W[i, j] * h[i] * w[j], i, j), Sum(W[i, j] * h[i] * w[j], j, i)),
    "a sum over tokens": (
        Sum(w[i] * h[i] * Sum(W[i, j] * x[s, j], j), i, s),
        Sum(w[i] * h[i] * W[i, j] * Sum(x[s, j], s), i, j),
    ),
    "a matrix between": (
        Sum(h[i] * W[i, j] * x[s, j], i, j, s),
        Sum(h[z] * W[z, y] * x[s, y], y, z, s),
    ),
    "a quadratic form": (Sum(h[i] * W[i, j] * h[j], i, j), Sum(h[j] * W[j, i] * h[i], i, j)),
    "sums of sums": (Sum(w[i] + h[i], i), Sum(w[i], i) + Sum(h[j], j)),
    "a constant body": (Sum(beta, i), dim * beta),
    "log sum exp": (log(Sum(exp(up()), m)), cem.logsumexp(up(), m)),
    "halves": (0.5 * Sum(h[i] ** 2, i), Sum(h[i] ** 2, i) / 2),
    "a product of equal sums": (Sum(h[i], i) * Sum(h[j], j), Sum(h[k], k) ** 2),
    "brackets": (Sum((w[i] - h[i]) * 2, i), 2 * Sum(w[i], i) - 2 * Sum(h[i], i)),
}
free = pytest.mark.parametrize("name", EQUAL)


@free
def test_equal_meanings_become_equal(name):
    one, other = EQUAL[name]
    free = sorted(free_indices(one), key=str)
    assert free == sorted(free_indices(other), key=str)
    assert canonical(one) == canonical(other)


DIFFERENT = {
    "a transposed matrix": (Sum(W[i, j] * h[i] * w[j], i, j), Sum(W[i, j] * h[j] * w[i], i, j)),
    "a square inside": (Sum(h[i] ** 2, i), Sum(h[i], i) ** 2),
    "a diagonal": (Sum(W[i, i] * h[i], i), Sum(W[i, j] * h[i], i, j)),
    "a frozen state": (Sum(h[i], i), Sum(cem.frozen(h)[i], i)),
    "log inside": (Sum(log(exp(h[i])), i), log(Sum(exp(h[i]), i))),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_meanings_stay_different(name):
    one, other = DIFFERENT[name]
    assert canonical(one) != canonical(other)


def values():
    generator = torch.Generator().manual_seed(0)
    shapes = {"h": (5,), "hbar": (5,), "x": (6, 5), "Q": (2, 3, 5), "U": (4, 5), "W": (5, 5)}
    shapes |= {"w": (5,), "lam": (2,), "beta": ()}
    return {
        name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
        for name, shape in shapes.items()
    }


def evaluate(expression, axes=()):
    sizes = {size: SIZES[str(size)] for size in (dim, heads, rank, hidden, block)}
    return Evaluator(values(), {**sizes, SEQ: 6})(expression, axes)


TOUGH = [
    *(one for pair in (*EQUAL.values(), *DIFFERENT.values()) for one in pair),
    log(Sum(exp(up() + h[j]), m, j)),
    Sum(W[i, j] * h[j] * w[i], i, j) * Sum(Sum(W[i, j] * h[i], i) * w[j], j),
    Sum(Softmax(up(), m) * Sum(U[m, j] * w[j], j), m),
    Sum(Softmax(Sum(x[s, i] * h[i], i), s) * (x[s, j] + w[j]) * h[j], s, j),
    LogSumExp(Sum(x[s, i] * h[i], i) + LogSumExp(Sum(x[u, i] * w[i], i), u), s),
    Sum(Sum(W[i, j] * Sum(W[j, k] * h[k], k), j) * h[i], i),
    Sum(Sum(h[i], i) * Sum(w[i] * h[i], i) * h[i], i),
    Sum((Sum(x[s, i] * h[i], i) + beta) ** 2, s) / SEQ,
    Sum(lam[a] * Sum(lam[a2] * lam[a], a2), a),
]


@pytest.mark.parametrize("expression", TOUGH, ids=str)
def test_the_value_stays(expression):
    found = canonical(expression)
    axes = tuple(sorted(free_indices(expression), key=str))
    assert free_indices(found) == free_indices(expression)
    assert_close(evaluate(found, axes), evaluate(expression, axes), 1e-13)
    assert canonical(found) == found


def test_renaming_captures_nothing():
    expression = Sum(W[i, j] * h[j], j)
    found = rename(expression, {i: j})
    assert free_indices(found) == {j}
    assert_close(evaluate(found, (j,)), evaluate(expression, (i,)), 1e-13)
    assert rename(expression, {j: k}) == expression
    assert rename(expression, {k: i}) == expression


def test_renaming_a_softmax_renames_its_index():
    weights = Softmax(Sum(x[s, i] * h[i], i), s)
    found = rename(weights, {s: u})
    assert free_indices(found) == {u}
    assert_close(evaluate(found, (u,)), evaluate(weights, (s,)), 1e-13)


def test_swapping_two_indices():
    expression = W[i, j] * h[j]
    found = rename(expression, {i: j, j: i})
    assert found == W[j, i] * h[i]


def test_an_average_is_taken_term_by_term():
    """So that each term is an average of features of the context alone."""
    weights = Softmax(Sum(x[s, i] * h[i], i), s)
    found = canonical(Sum(weights * (x[s, j] - h[j]), s))
    assert found.is_Add and len(found.args) == 2


def test_slots_of_products_of_sizes():
    b = block.index("b")
    assert split(join((a, b))) == (a, b)
    assert split(block * a + b) == (a, b)
    assert split(rank * block * a + block * r + b) == (a, r, b)
    for wrong in (2 * a + b, heads * a + b, a * b):
        with pytest.raises(ValueError, match="index `"):
            split(wrong)


def test_a_ravel_reads_a_product_of_sizes():
    wide = cem.parameter("wide", heads, block)
    b, d = block.index("b"), cem.index("d", heads * block)
    found = canonical(Ravel(wide[a, b] * lam[a], block * a + b, d))
    assert free_indices(found) == {d}
    sizes = {heads: 2, block: 3}
    table = torch.arange(6.0).reshape(2, 3)
    result = Evaluator({"wide": table, "lam": torch.tensor([1.0, 2.0])}, sizes)(found, (d,))
    assert result.tolist() == [0, 1, 2, 6, 8, 10]


def test_the_definition_of_empty_reductions():
    """Over no visible token a sum, a mean and a log-sum-exp are 0."""
    empty = {**values(), "x": torch.zeros(0, 5, dtype=torch.float64)}
    evaluator = Evaluator(empty, {dim: 5, SEQ: 0})
    score = Sum(x[s, i] * h[i], i)
    for expression in (Sum(score, s), Sum(score, s) / SEQ, cem.logsumexp(score, s)):
        assert evaluator(expression).item() == 0.0
