"""Upper bounds of the Hessian: exact where they should be, and never below an eigenvalue."""

import math

import pytest
import sympy
import torch
from descents import NAMED, Energies, W, beta, c, gamma, h, i, j, m, s, up, v, w, x
from sympy import Sum
from torch.func import grad, vmap

import cem
from cem.calculus import smoothness as module
from cem.calculus.smoothness import smoothness
from cem.language.evaluation import Evaluator
from cem.language.words import WORDS

SHAPES = {"Q": (2, 3, 4), "K": (2, 3, 4), "U": (5, 4), "G": (5, 4), "W": (4, 4)}
SHAPES |= {"w": (4,), "v": (5,), "lam": (2,), "gamma": (), "beta": ()}


def drawn(seed, scale=1.0):
    """Parameters and scalars; beta is positive."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }
    return {**found, "beta": found["beta"].abs() + 0.1}


def bound(expression, values=None):
    energy = cem.Energy(expression)
    return smoothness(energy.expression, drawn(0) if values is None else values, NAMED).largest


def top(matrix):
    return float(torch.linalg.eigvalsh(matrix)[-1])


def spectral(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2)) ** 2


VALUES = drawn(0)
SQUARE = Sum(h[i] ** 2, i)
SCORE = Sum(h[i] * x[s, i], i)
OUTER = torch.einsum("mi,mj->mij", VALUES["U"], VALUES["U"])
DIAMETER = float(torch.pdist(VALUES["U"]).max())
SYMMETRIC = VALUES["W"] + VALUES["W"].mT
EXACT = {
    "half a square": (SQUARE / 2, 1.0),
    "minus half a square": (-SQUARE / 2, 0.0),
    "attention": (-cem.logsumexp(SCORE, s), 0.0),
    "square and attention": (SQUARE / 2 - cem.logsumexp(beta * SCORE, s) / beta, 1.0),
    "quadratic form": (Sum(h[i] * W[i, j] * h[j], i, j), top(SYMMETRIC)),
    "form less its bound": (
        Sum(h[i] * W[i, j] * h[j], i, j) - 9 * SQUARE,
        0.0,
    ),
    "squares": (Sum(up() ** 2, m) / 2, spectral(VALUES["U"])),
    "weighted squares": (
        Sum(v[m] * up() ** 2, m) / 2,
        top(torch.einsum("m,mij->ij", VALUES["v"], OUTER)),
    ),
    "softplus": (Sum(cem.softplus(up()), m), spectral(VALUES["U"]) / 4),
    "shifted by frozen values": (Sum(cem.softplus(up() + up(c)), m), spectral(VALUES["U"]) / 4),
    "minus silu": (-Sum(cem.silu(up()), m), 0.037 * spectral(VALUES["U"])),
    "gated squares": (-Sum(cem.silu(up(c)) * up() ** 2, m) / 2, 0.2785 * spectral(VALUES["U"])),
    "gated by tanh": (Sum(sympy.tanh(up(c)) * up() ** 2, m) / 2, spectral(VALUES["U"])),
    "log-sum-exp": (cem.logsumexp(up(), m), DIAMETER**2 / 4),
    "scaled log-sum-exp": (
        cem.logsumexp(beta * up(), m) / beta,
        float(VALUES["beta"]) * DIAMETER**2 / 4,
    ),
    "affine": (Sum(h[i] * x[s, i], i, s), 0.0),
    "gated by the context": (Sum(h[i] * W[i, j] * c[j], i, j), 0.0),
    "slope of the context": (Sum(cem.softplus(Sum(h[i] * x[s, i], i)), s), math.inf),
    "convex attention": (cem.logsumexp(SCORE, s), math.inf),
    "gates without a bound": (Sum(cem.silu(up(c)) * up() ** 2, m), math.inf),
    "sum over the visible": (Sum(cem.sigmoid(Sum(w[i] * x[s, i], i)) * SQUARE, s), math.inf),
    "two-sided": (Sum(cem.silu(up()) * up(), m), math.inf),
    "exp": (Sum(sympy.exp(up()), m), math.inf),
    "l1": (Sum(sympy.Abs(up()), m), math.inf),
    "fourth power": (Sum(up() ** 4, m), math.inf),
}


@pytest.mark.parametrize("name", EXACT)
def test_known_bounds(name):
    expression, expected = EXACT[name]
    assert bound(expression) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_a_parameter_is_that_of_its_value(sign):
    """Unknown to the rules of curvature, known for these parameters."""
    expression = gamma * cem.logsumexp(SCORE, s)
    values = {**VALUES, "gamma": torch.tensor(sign * 0.3, dtype=torch.float64)}
    assert cem.Energy(expression).curvature == "unknown"
    assert bound(expression, values) == (math.inf if sign > 0 else 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite(value):
    values = {**VALUES, "U": torch.full((5, 4), value)}
    assert bound(Sum(cem.softplus(up()), m), values) == math.inf


def test_the_terms_say_why():
    energy = cem.Energy(SQUARE / 2 - Sum(cem.silu(up()), m))
    found = smoothness(energy.expression, VALUES, NAMED)
    told = sorted(str(term).split(" has a ")[1] for term in found.terms)
    assert told[0].endswith("silu of affine, second derivative in [-0.037, 0.5]")
    assert told[1] == "Hessian of at most 1: square of affine"
    unknown = smoothness(cem.Energy(SQUARE**2).expression, VALUES, NAMED)
    assert str(unknown.terms[0]).endswith("has a Hessian of no known bound: convex curvature")


def test_blocks():
    """The rows of a state in blocks."""
    block = cem.dims("block")
    heads = cem.dims("heads")
    wide, B = cem.state(heads * block), cem.parameter("B", heads, block)
    b, o = block.index("b"), heads.index("a")
    expression = Sum(Sum(B[o, b] * wide[block * o + b], b) ** 2, o) / 2
    values = {"B": torch.randn(2, 3, dtype=torch.float64)}
    found = smoothness(cem.Energy(expression).expression, values, {heads: 2, block: 3})
    assert found.largest == pytest.approx(float(values["B"].square().sum(1).max()))


def test_the_bound_of_a_log_sum_exp_is_reached():
    """Halfway between two patterns the covariance is a quarter of their squared distance."""
    values = {**VALUES, "U": torch.zeros(5, 4, dtype=torch.float64)}
    values["U"][0], values["U"][1:] = 3.0, -3.0
    energy = cem.Energy(cem.logsumexp(up(), m))
    where = torch.full((4,), math.log(4) / 24, dtype=torch.float64)
    curved = torch.func.hessian(lambda z: energy(z, U=values["U"]))(where)
    assert bound(energy.expression, values) == pytest.approx(top(curved))


# -- the attack -----------------------------------------------------------------------------------


def excess(expression, values, seed, points=64):
    """The largest eigenvalue that two gradients show, over the bound; below 1 for a true one.

    (g(a) - g(b)).(a - b) <= L |a - b|^2 for all a, b says that no eigenvalue is above L.
    """
    largest = smoothness(expression, values, NAMED).largest
    if math.isinf(largest):
        return None
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    context, frozen = draw(3, 4), 2 * draw(4)

    def value(z):
        tensors = {"h": z, "hbar": frozen, "x": context, **values}
        return Evaluator(tensors, {**NAMED, cem.language.symbols.SEQ: 3})(expression)

    scale = torch.logspace(-1, 1, points, dtype=torch.float64)[:, None]
    first = scale * draw(points, 4)
    second = first + scale.flip(0) * draw(points, 4) * 0.3
    slopes = [vmap(grad(value))(z) for z in (first, second)]
    apart = first - second
    found = ((slopes[0] - slopes[1]) * apart).sum(-1)
    size = (slopes[0].abs() + slopes[1].abs() + 1).mul(apart.abs()).sum(-1)
    known = found.isfinite() & size.isfinite()
    room = largest * apart.square().sum(-1) + 1e-11 * size
    return float((found / room)[known].max()) if known.any() else None


def attack(seeds):
    """The excess of every energy that has a bound."""
    found = []
    for seed in seeds:
        energy = cem.Energy(Energies(seed).draw())
        for trial in range(3):
            scale = 10.0 ** ((seed + trial) % 3 - 1)
            found.append(excess(energy.expression, drawn(seed + trial, scale), trial))
    return [z for z in found if z is not None]


def test_no_bound_is_below_an_eigenvalue():
    found = attack(range(80))
    assert len(found) > 50
    assert max(found) <= 1


@pytest.mark.long
def test_no_bound_is_below_an_eigenvalue_in_many_energies():
    found = attack(range(1000, 3000))
    print(f"{len(found)} bounds, the tightest reached to {max(found):.4f}")
    assert max(found) <= 1


@pytest.mark.parametrize(
    ("expression", "name", "wrong"),
    [
        (Sum(cem.softplus(up()), m), "second", (0, 0.2)),
        (-Sum(cem.silu(up()), m), "second", (-0.02, 0.5)),
        (-Sum(cem.silu(up(c)) * up() ** 2, m), "bounds", (-0.1, math.inf)),
    ],
)
def test_the_attack_finds_a_wrong_table(expression, name, wrong, monkeypatch):
    expression = cem.Energy(expression).expression
    [function] = [node.func for node in expression.atoms(sympy.Function)]
    word = module._WORDS[function]
    monkeypatch.setitem(module._WORDS, function, word.__class__(**{**vars(word), name: wrong}))
    assert max(excess(expression, drawn(seed, 1.0), seed, 512) for seed in range(20)) > 1


# -- the table ------------------------------------------------------------------------------------

GRID = torch.cat([torch.linspace(-60, 60, 12001), torch.linspace(-6, 6, 12001)]).double().unique()


@pytest.mark.parametrize("word", [w for w in WORDS if w.second], ids=lambda word: word.name)
def test_second_derivatives_of_words(word):
    """They stay in their interval and come within 1 % of its ends, where these are not 0."""
    second = vmap(grad(grad(word.torch)))(GRID)
    lo, hi = word.second
    assert (second >= lo).all() and (second <= hi).all()
    assert float(second.min()) == pytest.approx(lo, rel=0.01, abs=1e-9)
    assert float(second.max()) == pytest.approx(hi, rel=0.01, abs=1e-9)
    slope = vmap(grad(word.torch))(GRID)
    assert (slope.diff().abs() <= max(-lo, hi) * GRID.diff() + 1e-12).all(), "the slope jumps"


@pytest.mark.parametrize("word", [w for w in WORDS if w.bounds], ids=lambda word: word.name)
def test_bounds_of_words(word):
    value = word.torch(GRID)
    lo, hi = word.bounds
    assert (value >= lo).all() and (value <= hi).all()
    assert float(value.min()) == pytest.approx(lo, rel=0.01, abs=1e-9)
    if hi < math.inf:
        assert float(value.max()) == pytest.approx(hi, rel=0.01)
