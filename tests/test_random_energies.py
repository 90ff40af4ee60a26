"""Random energies of the language: the fused program, autograd and the definition agree.

A term is a reduction of smooth words over products of the state, its frozen value, the context and
parameters; an energy is a sum of terms. Words are bounded or grow slowly, so that float64 can tell.
"""

import pytest
import sympy
import torch
from helpers import assert_same, gradients
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sympy import Integer, Rational, Sum

import cem
from cem.language.symbols import SEQ
from cem.testing import reference_of

SIZES = {"dim": 4, "heads": 2, "rank": 3, "hidden": 5}
dim, heads, rank, hidden = cem.dims("dim heads rank hidden")
h, x = cem.state(dim), cem.context(dim)
c = cem.frozen(h)
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
U, G = cem.parameter("U", hidden, dim), cem.parameter("G", hidden, dim)
w, lam = cem.parameter("w", dim), cem.parameter("lam", heads)
W = cem.parameter("W", dim, dim)
beta = cem.scalar("beta", default=Rational(2, 3), positive=True)
gamma = cem.scalar("gamma", default=Rational(3, 4))
i, j, a, r, m, s, u = (
    size.index(name)
    for size, name in zip((dim, dim, heads, rank, hidden, SEQ, SEQ), "ijarmsu", strict=True)
)

SMOOTH = [
    sympy.tanh,
    sympy.sin,
    sympy.cos,
    cem.silu,
    cem.gelu,
    cem.gelu_tanh,
    cem.softplus,
    cem.sigmoid,
    cem.log_cosh,
    cem.normal_cdf,
    cem.normal_pdf,
    cem.softplus_antiderivative,
    cem.silu_antiderivative,
    cem.gelu_antiderivative,
    cem.relu_antiderivative,
]
words = st.sampled_from(SMOOTH)
numbers = st.sampled_from([Integer(1), Integer(-2), Rational(1, 3), Rational(-3, 4), gamma, beta])
vectors = st.sampled_from([h, h, h, c])


def times(vector, weight, *lead):
    return Sum(weight[(*lead, i)] * vector[i], i)


def key(weight, *lead):
    return Sum(weight[(*lead, j)] * x[s, j], j)


@st.composite
def functions(draw, argument):
    """A word, a small power or a quotient of an argument."""
    kind = draw(st.sampled_from(["word", "word", "nested", "power", "quotient", "same"]))
    if kind == "word":
        return draw(words)(argument)
    if kind == "nested":
        return draw(words)(draw(numbers) * draw(words)(argument))
    if kind == "power":
        return argument ** draw(st.sampled_from([2, 3]))
    if kind == "quotient":
        return argument / (1 + argument**2)
    return argument


@st.composite
def features(draw):
    """A feature of a token for every hidden unit m."""
    weight = draw(st.sampled_from([U, G]))
    return draw(functions(times(draw(vectors), weight, m)))


@st.composite
def hidden_terms(draw):
    """A sum or a log-sum-exp over hidden units of a product of features."""
    factors = draw(st.lists(features(), min_size=1, max_size=3))
    body = sympy.Mul(*factors)
    if draw(st.booleans()):
        return Sum(body, m)
    return cem.logsumexp(draw(numbers) * draw(words)(body), m)


@st.composite
def coordinate_terms(draw):
    """Something of the coordinates themselves."""
    body = draw(st.sampled_from([h[i], w[i] * h[i], h[i] * c[i], h[i] ** 2, w[i] * h[i] ** 3]))
    inner = Sum(body, i)
    square = Sum(W[i, j] * h[i] * draw(vectors)[j], i, j)
    return draw(functions(draw(st.sampled_from([inner, inner, square]))))


@st.composite
def scores(draw):
    """A score of a context token s for a head a: mostly a sum of bilinear terms."""
    token, context = times(draw(vectors), Q, a, r), key(K, a, r)
    if draw(st.booleans()):
        token = draw(words)(token)
    if draw(st.booleans()):
        context = draw(words)(context)
    found = Sum(token * context, r)
    extra = draw(st.sampled_from(["none", "none", "bias", "direct", "distance", "capped", "alone"]))
    if extra == "bias":
        found = found + lam[a] * Sum(w[j] * x[s, j], j)
    if extra == "direct":
        found = found + lam[a] * Sum(draw(vectors)[i] * x[s, i], i)
    if extra == "distance":
        found = -Sum((times(draw(vectors), Q, a, r) - key(K, a, r)) ** 2, r) / 2
    if extra == "capped":
        found = 2 * sympy.tanh(found / 2)
    if extra == "alone":
        found = found + lam[a] * Sum(w[i] * draw(vectors)[i], i)
    return found


@st.composite
def attention_terms(draw):
    """Log-sum-exp over the visible context, with heads summed outside."""
    attended = cem.logsumexp(beta * draw(scores()), s)
    if draw(st.booleans()):
        attended = lam[a] * attended
    if draw(st.booleans()):
        attended = draw(words)(attended / 3)
    if draw(st.integers(0, 4)) == 0:
        return cem.logsumexp(attended, a)
    return Sum(attended, a)


@st.composite
def context_terms(draw):
    """A plain sum or mean over the visible context."""
    body = draw(functions(draw(scores())))
    if draw(st.booleans()):
        body = body * draw(words)(Sum(w[j] * x[s, j], j))
    inner = Sum(body, s)
    if draw(st.booleans()):
        inner = inner / SEQ
    return Sum(inner, a)


@st.composite
def weighted_terms(draw):
    """An average of context values under a softmax, as a difference of log-sum-exps gives it."""
    first, second = draw(scores()), draw(scores())
    return Sum(cem.logsumexp(first + second, s) - cem.logsumexp(first, s), a)


CONTEXTUAL = st.one_of(attention_terms(), attention_terms(), context_terms(), weighted_terms())
LOCAL = st.one_of(hidden_terms(), hidden_terms(), coordinate_terms())


@st.composite
def sums(draw, terms):
    """One term to three, multiplied by numbers; some of them products with another term."""
    found = Integer(0)
    for term in draw(st.lists(terms, min_size=1, max_size=3)):
        if draw(st.integers(0, 5)) == 0:
            term = term * sympy.tanh(draw(LOCAL) / 4)
        found = found + draw(numbers) * term
    return found


def check(expression, causal, masked):
    assume(expression.has(h))
    torch.manual_seed(0)
    energy = cem.Energy(expression, name="random")
    sizes = {str(size): SIZES[str(size)] for size in energy.dims}
    learn = [scalar.name for scalar in energy.scalars]
    options = {"causal": causal, "learn": learn, "dtype": torch.float64}
    layer = cem.derive(energy, **options, **sizes)
    slow = cem.derive(energy, lowering="autograd", **options, **sizes)
    for parameter in energy.parameters:
        torch.nn.init.normal_(getattr(layer, str(parameter.name)), std=0.6)
    slow.load_state_dict(layer.state_dict())
    inputs = {"h": torch.randn(1, 3, SIZES["dim"], dtype=torch.float64)}
    fixed = {}
    if energy.context is not None:
        inputs["context"] = torch.randn(1, 4, SIZES["dim"], dtype=torch.float64)
        if masked:
            fixed["visible"] = torch.tensor([[[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]]).bool()
    assert layer.lowering.kind == "fused"
    found = gradients(layer, layer, inputs, **fixed)
    assume(all(value.abs().max() < 1e4 for value in found.values()))
    # A gradient that is zero by cancellation is rounding noise of the others.
    atol = 1e-12 * max(float(value.abs().max()) for value in found.values())
    assert_same(found, gradients(slow, slow, inputs, **fixed), 1e-10, atol)
    truth = gradients(lambda **z: reference_of(layer, **z), layer, inputs, **fixed)
    assert_same(found, truth, 1e-10, atol)


def many(examples):
    quick = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=examples, suppress_health_check=quick)


@many(16)
@given(sums(LOCAL))
def test_energies_without_a_context(expression):
    check(expression, causal=True, masked=False)


@many(16)
@given(sums(CONTEXTUAL), st.booleans(), st.booleans())
def test_energies_of_a_context(expression, causal, masked):
    check(expression, causal, masked)


@pytest.mark.long
@many(800)
@given(sums(CONTEXTUAL), st.booleans(), st.booleans())
def test_many_energies_of_a_context(expression, causal, masked):
    check(expression, causal, masked)
