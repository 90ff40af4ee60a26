"""Curvature: the answers for known energies, their reasons, and no false claim under random attack."""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Abs, Indexed, Integer, Pow, Rational, Sum, exp, log, sqrt

from cem.calculus.curvature import curvature, explain
from cem.calculus.gradient import depends_on_state
from cem.language import words
from cem.language.canonical import canonical
from cem.language.evaluation import Evaluator
from cem.language.indices import free_indices
from cem.language.reductions import LogSumExp, Softmax, logsumexp
from cem.language.symbols import (
    SEQ,
    Parameter,
    State,
    context,
    dims,
    frozen,
    index,
    parameter,
    scalar,
    state,
    total,
)
from cem.language.words import WORDS

dim, heads, rank, hidden, block, points = dims("dim heads rank hidden block points")
SIZES = {dim: 3, heads: 2, rank: 2, hidden: 3, block: 2}

h, x = state(dim), context(dim)
Q, K = parameter("Q", heads, rank, dim), parameter("K", heads, rank, dim)
U, G = parameter("U", hidden, dim), parameter("G", hidden, dim)
A, lam, bias = parameter("A", dim, dim), parameter("lam", heads, dim), parameter("bias", hidden)
beta, gamma = scalar("beta", positive=True), scalar("gamma")
i, j, a, r, m, s = (
    size.index(name)
    for size, name in zip((dim, dim, heads, rank, hidden, SEQ), "ijarms", strict=True)
)

up = Sum(U[m, i] * h[i], i)
gate = Sum(G[m, i] * h[i], i)
query = Sum(Q[a, r, i] * h[i], i)
score = Sum(query * Sum(K[a, r, j] * x[s, j], j), r)
diagonal = Sum(lam[a, i] * h[i] * x[s, i], i)
square = Sum(h[i] ** 2, i)


def gated(g):
    return -Sum(g(frozen(gate)) * up**2, m) / 2


def plain(f):
    return -Sum(f(up), m)


KNOWN = {
    "interaction": (-Sum(logsumexp(beta * score, s), a) / beta, "concave"),
    "interaction, as log of sum": (-Sum(log(Sum(exp(beta * score), s)), a) / beta, "concave"),
    "interaction, any temperature": (-Sum(logsumexp(gamma * score, s), a) / gamma, "unknown"),
    "repulsion": (Sum(logsumexp(beta * score, s), a) / beta, "convex"),
    "diagonal plus low rank": (-Sum(logsumexp(beta * (diagonal + score), s), a) / beta, "concave"),
    "with an empty slot": (-Sum(log(1 + Sum(exp(beta * score), s)), a) / beta, "concave"),
    "linear attention": (-Sum(score, s, a), "affine"),
    "quadratic attention": (-Sum(score**2, s, a), "concave"),
    "memory": (square / 2 - logsumexp(beta * up, m) / beta, "unknown"),
    "gated silu": (gated(words.silu), "unknown"),
    "gated gelu": (gated(words.gelu), "unknown"),
    "gated gelu_tanh": (gated(words.gelu_tanh), "unknown"),
    "gated tanh": (gated(sympy.tanh), "unknown"),
    "gated sigmoid": (gated(words.sigmoid), "concave"),
    "gated relu": (gated(words.relu), "concave"),
    "gated softplus": (gated(words.softplus), "concave"),
    "gated exp": (gated(exp), "concave"),
    "gated silu of relu": (gated(lambda z: words.silu(words.relu(z))), "concave"),
    "two-sided gated": (-Sum(words.relu_antiderivative(gate) * up, m), "unknown"),
    "two-sided gated, linear": (-Sum(gate * up, m), "unknown"),
    "plain relu": (plain(words.relu_antiderivative), "concave"),
    "plain softplus": (plain(words.softplus_antiderivative), "concave"),
    "plain sigmoid": (plain(words.softplus), "concave"),
    "plain tanh": (plain(words.log_cosh), "concave"),
    "plain exp": (plain(exp), "concave"),
    "plain gelu": (plain(words.gelu_antiderivative), "unknown"),
    "plain silu": (plain(words.silu_antiderivative), "unknown"),
    "plain gelu, up and down": (plain(words.gelu), "unknown"),
    "square": (square / 2, "convex"),
    "square against the square": (square - h[i] ** 2, "unknown"),
    "form of unknown sign": (Sum(h[i] * A[i, j] * h[j], i, j), "unknown"),
    "form of a square": (Sum(Sum(A[i, j] * h[j], j) ** 2, i), "convex"),
    "log-sum-exp": (logsumexp(h[i], i), "convex"),
    "log-sum-exp of squares": (logsumexp(h[i] ** 2, i), "convex"),
    "log-sum-exp of minus squares": (logsumexp(-(h[i] ** 2), i), "unknown"),
    "affine": (Sum(bias[m] * up, m) + gamma, "affine"),
    "constant": (Sum(words.silu(frozen(gate)), m), "affine"),
    "norm": (sqrt(square), "convex"),
    "smoothed norm": (sqrt(square + Sum(frozen(h)[i] ** 2, i)), "convex"),
    "norm, shifted by an unknown": (sqrt(square + gamma), "unknown"),
    "inverse norm": (1 / sqrt(1 + square), "unknown"),
    "root of the norm": (square ** Rational(1, 4), "unknown"),
    "root of 1 + norm^(3/2)": (sqrt(1 + square ** Rational(3, 4)), "unknown"),
    "root of 1 + l1": (sqrt(1 + Sum(Abs(up), m)), "unknown"),
    "root of 1 + |u|^(3/2)": (sqrt(1 + Sum(Abs(up) ** Rational(3, 2), m)), "unknown"),
    "square of a convex function": ((square - 1) ** 2, "unknown"),
    "undefined": (Sum((-1 - words.softplus(up)) ** Rational(3, 2), m), "unknown"),
    "cube of a nonpositive function": (Sum((-1 - words.softplus(up)) ** 3, m), "concave"),
    "square of a nonpositive function": (Sum((-1 - words.softplus(up)) ** 2, m), "convex"),
    "power of a half, of a square": (Rational(1, 2) ** square, "unknown"),
    "log of sigmoid of a square": (log(words.sigmoid(square)), "unknown"),
    "bump": (exp(-square), "unknown"),
    "logistic": (Sum(1 / (1 + exp(up)), m), "unknown"),
    "l1": (Sum(Abs(h[i]), i), "convex"),
    "l1 less the tokens": (Sum(Abs(h[i] - x[s, i]), i, s), "convex"),
    "cube": (Sum(h[i] ** 3, i), "unknown"),
    "cube of relu": (Sum(words.relu(up) ** 3, m), "convex"),
    "fourth power": (-Sum(up**4, m), "concave"),
    "cosh": (Sum(exp(up) + exp(-up), m), "convex"),
    "log of cosh": (Sum(log(exp(up) + exp(-up)), m), "convex"),
    "log of sigmoid": (-Sum(log(words.sigmoid(up)), m), "convex"),
    "barrier": (-Sum(log(h[i]), i), "unknown"),
    "entropy": (Sum(words.softplus(h[i]) * log(words.softplus(h[i])), i), "unknown"),
    "softmax": (Sum(Softmax(h[i], i) * words.sigmoid(frozen(h)[i]), i), "unknown"),
    "power of two": (Sum(Integer(2) ** up, m), "convex"),
    "wave": (Sum(sympy.cos(up), m), "unknown"),
    "softplus of squares": (Sum(words.softplus(up**2), m), "convex"),
    "softplus of minus squares": (Sum(words.softplus(-(up**2)), m), "unknown"),
    "minus softplus of minus affine": (-Sum(words.softplus(-up), m), "concave"),
    "Abs of a convex function": (Abs(square - 1), "unknown"),
    "Abs of minus a square": (Abs(-square - 1), "convex"),
    "foreign word": (Sum(sympy.Function("foreign")(up), m), "unknown"),
}


class Attack:
    """Looks for two states and their midpoint that contradict a claim, all else drawn once."""

    def __init__(self, seed, seq=3, number=48):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.sizes = {**SIZES, SEQ: seq, points: 3 * number}
        shapes = {"hbar": (3,), "x": (seq, 3), "Q": (2, 2, 3), "K": (2, 2, 3), "lam": (2, 3)}
        shapes |= {"U": (3, 3), "G": (3, 3), "A": (3, 3), "bias": (3,), "gamma": ()}
        self.tensors = {name: draw(*shape) for name, shape in shapes.items()}
        self.tensors["beta"] = draw().exp()
        scale = torch.logspace(-1, 1, number, dtype=torch.float64)[:, None]
        left, right = scale * draw(number, 3), scale.flip(0) * draw(number, 3)
        # Short segments at every distance from the origin find what long ones average away.
        right[::2] = left[::2] + 0.3 * draw(number, 3)[::2]
        self.tensors["batch"] = torch.cat([left, right, (left + right) / 2])
        self.batch = Parameter(sympy.Symbol("batch", real=True), shape=(points, dim))
        self.point = index("point", points)

    def values(self, expression):
        """The value at every state, and what rounding may have added to it; inf where unknown."""
        leaves = {e for e in expression.atoms(Indexed) if isinstance(e.base, State)}
        batched = {e: Indexed(self.batch, self.point, *e.indices) for e in leaves}
        evaluator = Evaluator(self.tensors, self.sizes)
        value = evaluator(expression.xreplace(batched), (self.point,))
        size = torch.ones_like(value)
        for tensor, axes in evaluator.memo.values():
            if self.point in axes and tensor.numel():
                tensor = tensor.movedim(axes.index(self.point), 0).abs().flatten()
                tensor = tensor.unflatten(0, (len(value), -1))
                size = torch.maximum(size, tensor.nan_to_num(nan=1.0, posinf=math.inf).amax(1))
            elif not tensor.isfinite().all():
                return value, torch.full_like(value, math.inf)
        # Products and exponentials lose some hundred units in the last place of their largest part.
        return value, 1e-12 * size

    def refutes(self, expression, claim, sign=0):
        value, error = self.values(expression)
        assert not (value.isnan() & error.isfinite()).any(), f"undefined somewhere: {expression}"
        if (sign * value < -error).any():
            return True
        left, right, middle = value.chunk(3)
        gap = (left + right) / 2 - middle
        error = torch.stack(error.chunk(3)).amax(0)
        hollow, bulging = bool((gap > error).any()), bool((gap < -error).any())
        return {"convex": bulging, "concave": hollow, "affine": hollow or bulging}[claim]


def assert_not_refuted(expression, attack):
    last = explain(expression)[-1]
    if last.result != "unknown":
        refuted = attack.refutes(expression, last.result, last.sign)
        assert not refuted, f"not {last.result} with sign {last.sign}: {expression}"


def scalar_of(expression):
    """The sum over whatever indices are free: an energy."""
    return canonical(total(expression, sorted(free_indices(expression), key=str)))


@pytest.mark.parametrize("name", KNOWN)
def test_known_energies(name):
    expression, expected = KNOWN[name]
    expression = scalar_of(expression)
    assert curvature(expression) == expected
    if expected != "unknown":
        for seed in range(8):
            assert_not_refuted(expression, Attack(seed, seq=0 if seed == 7 else 3))


@pytest.mark.parametrize("name", KNOWN)
def test_minus_an_energy_mirrors_the_claim(name):
    mirror = {"convex": "concave", "concave": "convex"}
    expression, expected = KNOWN[name]
    assert curvature(scalar_of(-expression)) == mirror.get(expected, expected)


def test_the_product_of_log_convex_factors():
    expression = scalar_of((1 + exp(up)) * (2 + exp(-gate)))
    assert curvature(expression) == "convex"
    assert_not_refuted(expression, Attack(0))


def test_a_state_in_blocks():
    wide = state(heads * block)
    W, b = parameter("W", heads, block), block.index("b")
    expression = canonical(-Sum(Sum(W[a, b] * wide[block * a + b], b) ** 2, a))
    assert curvature(expression) == "concave"


# -- the attack -----------------------------------------------------------------------------------

WRONG = [
    (plain(words.gelu_antiderivative), "concave"),
    (plain(words.silu_antiderivative), "concave"),
    (gated(words.silu), "concave"),
    (square / 2 - logsumexp(beta * up, m) / beta, "convex"),
    (square / 2 - logsumexp(beta * up, m) / beta, "concave"),
    (Sum(words.softplus(up), m), "affine"),
    (Sum(h[i] * A[i, j] * h[j], i, j), "convex"),
    (Sum(words.sigmoid(up), m), "convex"),
    (Sum(words.step(up), m), "concave"),
    (1 / sqrt(1 + square), "concave"),
    (sqrt(1 + Sum(Abs(up), m)), "convex"),
    (log(1 + square), "concave"),
]


@pytest.mark.parametrize(("expression", "claim"), WRONG, ids=str)
def test_the_attack_refutes_a_false_claim(expression, claim):
    expression = scalar_of(expression)
    assert any(Attack(seed).refutes(expression, claim) for seed in range(8))


LEAVES = [up, gate, score, h[i], frozen(gate), bias[m], x[s, i], beta, gamma, square]
LEAVES += [Integer(1), Integer(-2), Rational(1, 3), hidden, words.sigmoid(frozen(gate))]
EXPONENTS = [2, 2, 2, 3, 4, Rational(1, 2), Rational(3, 4), Rational(3, 2), -1, -2, 2.0, 2.5]
UNARY = [word.function for word in WORDS if word.name != "only"]
UNARY += [lambda e: -e, lambda e: e / beta, lambda e: 1 - e, lambda e: log(1 + e)]
UNARY += [lambda e: Integer(2) ** e, lambda e: Pow(Rational(1, 2), e), lambda e: sqrt(1 + e)]
UNARY += [lambda e, p=p: Pow(e, p) for p in EXPONENTS]
BINARY = [sympy.Add, sympy.Add, sympy.Mul, lambda e, f: e - f]
REDUCTIONS = [LogSumExp, LogSumExp, Softmax, lambda e, idx: total(e, (idx,))]


@st.composite
def expressions(draw):
    """The results of a random program over the leaves, whose steps use earlier results."""
    pool = [*LEAVES]
    made = []

    def operand():
        # Mostly the latest results, so that programs compose.
        recent = made[-3:] if made and draw(st.integers(0, 3)) else pool
        return draw(st.sampled_from(recent))

    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.integers(0, 4))
        if kind <= 1:
            new = draw(st.sampled_from(UNARY))(operand())
        elif kind <= 3:
            new = draw(st.sampled_from(BINARY))(operand(), operand())
        else:
            body = operand()
            free = sorted(free_indices(body), key=str)
            if not free:
                continue
            new = draw(st.sampled_from(REDUCTIONS))(body, draw(st.sampled_from(free)))
        # Numbers fold to what is outside the language, such as 1/0 or the square root of -2.
        if new.is_number or new.has(sympy.I, sympy.zoo, sympy.nan, sympy.oo, sympy.re, sympy.im):
            continue
        made.append(new)
        pool.append(new)
    return made


@given(expressions(), st.integers(0, 10**6), st.sampled_from([3, 3, 3, 1]))
@settings(max_examples=200)
def test_random_expressions_are_never_misjudged(made, seed, seq):
    attack = Attack(seed, seq)
    for expression in made:
        if depends_on_state(expression):
            assert_not_refuted(scalar_of(expression), attack)


# -- the chain of reasons -------------------------------------------------------------------------


def test_the_chain_goes_from_parts_to_the_whole():
    expression = scalar_of(gated(words.sigmoid))
    chain = explain(expression)
    assert chain[-1].expression == expression
    places = {reason.expression: n for n, reason in enumerate(chain)}
    assert len(places) == len(chain)
    for reason in chain:
        here = places[reason.expression]
        assert all(places.get(part, -1) < here for part in reason.expression.args)
    assert [reason.result for reason in chain if depends_on_state(reason.expression)] == [
        *("affine", "affine", "affine", "convex", "convex", "convex", "concave")
    ]


@pytest.mark.parametrize(
    ("g", "rule"),
    [(words.sigmoid, "nonnegative constant"), (words.silu, "constant of unknown sign")],
)
def test_the_chain_names_the_sign_of_a_gate(g, rule):
    chain = explain(scalar_of(gated(g)))
    [reason] = [reason for reason in chain if isinstance(reason.expression, g)]
    assert reason.rule == rule


def test_a_constant_has_a_reason():
    [reason] = explain(canonical(Sum(words.sigmoid(frozen(h)[i]), i)))
    assert (reason.result, reason.sign) == ("affine", 1)


def test_the_cost_is_linear_in_shared_expressions():
    expression = h[i]
    for _ in range(40):  # 2**40 paths from the root to the leaf
        expression = words.softplus(expression) + words.relu(expression)
    assert curvature(expression) == "convex"
    assert len(explain(expression)) == 1 + 3 * 40


def test_signs_of_constants():
    values = {
        Abs(gamma): 1,
        gamma**2: 1,
        gamma**-2: 1,
        gamma**3: 0,
        -beta: -1,
        (-beta) ** 3: -1,
        beta**gamma: 1,
        -beta - sqrt(dim): -1,
        beta - dim: 0,
        log(Integer(2)): 1,
        log(Rational(1, 2)): -1,
        log(beta): 0,
        LogSumExp(bias[m] ** 2, m): 1,
        LogSumExp(-(bias[m] ** 2), m): 0,
        Softmax(bias[m], m): 1,
        sympy.tanh(-beta): -1,
        sympy.pi - math.pi * beta: 0,
    }
    assert {e: explain(e)[-1].sign for e in values} == values
