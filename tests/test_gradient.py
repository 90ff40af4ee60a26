"""dE/dh: symbolic equals autograd, the Taylor slope is 2, and the checks find a wrong gradient."""

from functools import partial
from itertools import product

import pytest
import torch
from helpers import ENERGIES, UNTRANSLATABLE, Case, by_name
from sympy import Add, Idx, Indexed, Integer, Rational, Sum, diff, exp, log

import cem
from cem import energies
from cem.calculus.gradient import output_index
from cem.energy import Energy
from cem.language.canonical import canonical
from cem.language.indices import free_indices
from cem.language.positions import Rope
from cem.language.reductions import LogSumExp
from cem.language.symbols import SEQ, size_of
from cem.testing import assert_close, check_energy, checks, relative_error

every = pytest.mark.parametrize("case", ENERGIES, ids=by_name)


@pytest.mark.parametrize("case", [*ENERGIES, *UNTRANSLATABLE], ids=by_name)
def test_four_derivative_checks(case):
    report = check_energy(case.energy, seed=1, **case.arguments)
    translated = case.energy.expression is not None
    wanted = {"taylor", "reference"} | ({"gradient", "lowering"} if translated else set())
    assert report.checks.keys() == wanted
    assert report.kind == ("fused" if translated else "autograd")
    assert report.kernels == case.kernels


@every
def test_gradcheck_of_every_entry(case):
    """The slow mode of gradcheck, on a sequence of two tokens and the smallest sizes."""
    sizes = {name: 2 for name in case.arguments}
    if case.energy.expression.has(Rope):  # a part of it turns
        sizes["rank"] = case.arguments["rank"]
    layer = cem.derive(case.energy, dtype=torch.float64, **sizes)
    names = [name for name, _ in layer.named_parameters()]
    width = 2 if not case.has_context else layer.context_dim
    h = torch.randn(1, 2, layer.dim, dtype=torch.float64)
    x = torch.randn(1, 2, width, dtype=torch.float64) if case.has_context else None

    def update(h, x, *parameters):
        inputs = {"h": h} if x is None else {"h": h, "context": x}
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, values, kwargs=inputs)

    points = [h, x, *(p.detach() for p in layer.parameters())]
    points = [None if z is None else z.clone().requires_grad_() for z in points]
    assert torch.autograd.gradcheck(update, points)


@every
def test_a_gradient_has_one_free_index(case):
    found = case.energy.gradient
    assert free_indices(found) <= {output_index(case.energy.width)}
    assert found == canonical(found)


@every
def test_a_small_step_lowers_the_energy(case):
    """At the context and the gates that the step saw."""
    layer = case.derive(update=cem.GradientDescent(1e-4))
    inputs = case.inputs()
    h = inputs.pop("h")
    if case.has_context:
        inputs.setdefault("context", h)
    fixed = {"frozen": h, **inputs}
    with torch.no_grad():
        after = layer(h, **inputs)
        drop = layer.energy(h, **fixed) - layer.energy(after, **fixed)
    assert ((drop > 0) | (after == h).all(-1)).all() and (drop > 0).any(-1).all()


@pytest.mark.parametrize("step_size", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    "energy", [e.energy for e in ENERGIES if e.energy.curvature == "concave"], ids=lambda e: e.name
)
def test_a_concave_energy_falls_at_any_step_size(energy, step_size):
    """By at least step_size * |dE/dh|^2."""
    case = Case(energy, ())
    layer = case.derive(update=cem.GradientDescent(step_size))
    inputs = case.inputs()
    h = inputs.pop("h")
    if case.has_context:
        inputs.setdefault("context", h)
    fixed = {"frozen": h, **inputs}
    with torch.no_grad():
        after = layer(h, **inputs)
        drop = layer.energy(h, **fixed) - layer.energy(after, **fixed)
        promised = ((after - h) / step_size).square().sum(-1) * step_size
    assert (drop >= promised * (1 - 1e-9)).all()


def written_out(node, sizes, at):
    """An expression without reductions: every sum as its terms, every index as a number."""
    again = partial(written_out, sizes=sizes)
    match node:
        case Idx():
            return at[node]
        case Sum():
            names = [limit[0] for limit in node.limits]
            places = product(*(range(sizes[size_of(name)]) for name in names))
            terms = (dict(zip(names, map(Integer, place), strict=True)) for place in places)
            return Add(*(again(node.function, at=at | term) for term in terms))
        case LogSumExp():
            places = range(sizes[size_of(node.index)])
            terms = (again(node.body, at=at | {node.index: Integer(n)}) for n in places)
            return log(Add(*map(exp, terms)))
        case Indexed():
            return Indexed(node.base, *(again(slot, at=at) for slot in node.indices))
    return node.func(*(again(arg, at=at) for arg in node.args)) if node.args else node


@pytest.mark.parametrize(
    "name", ["interaction", "memory", "gaussian", "soft_capped", "quadratic", "spread"]
)
def test_the_layer_is_the_derivative_that_sympy_takes(name):
    (energy,) = (case.energy for case in ENERGIES if case.name == name)
    layer = cem.derive(energy, dtype=torch.float64, **{str(size): 2 for size in energy.dims})
    inputs = {"h": torch.randn(1, 2, dtype=torch.float64)}
    if energy.context is not None:
        inputs["context"] = torch.randn(2, 2, dtype=torch.float64)
    force = (inputs["h"] - layer(**inputs))[0].tolist()
    values = {**layer.scalars, **layer.state_dict()} | {
        "h": inputs["h"][0],
        "x": inputs.get("context"),
    }
    plain = written_out(energy.expression, dict.fromkeys([*energy.dims, SEQ], 2), {})
    for d in range(2):
        slope = diff(plain, Indexed(energy.state, d))
        known = {scalar: values[scalar.name] for scalar in energy.scalars}
        for leaf in slope.atoms(Indexed):
            known[leaf] = float(values[str(leaf.base)][tuple(map(int, leaf.indices))])
        assert force[d] == pytest.approx(float(slope.xreplace(known)), rel=1e-10)


def broken(energy, factor):
    """An energy whose symbolic gradient is off by a factor."""
    wrong = Energy(energy.expression, name="broken")
    wrong.__dict__["gradient"] = factor * energy.gradient
    return wrong


@pytest.mark.parametrize("factor", [Integer(2), Rational(1001, 1000)])
def test_a_wrong_gradient_is_found(factor):
    with pytest.raises(AssertionError, match="energy `broken` fails the check `gradient`"):
        check_energy(broken(energies.memory, factor), dim=4, hidden=3)


@pytest.mark.parametrize("factor", [Integer(2), Rational(1001, 1000)])
@pytest.mark.parametrize("energy", [energies.memory, energies.interaction, energies.gated])
def test_the_taylor_slope_finds_a_gradient_that_is_off(monkeypatch, energy, factor):
    sizes = {str(size): n + 2 for n, size in enumerate(energy.dims)}
    wrong = broken(energy, factor)
    monkeypatch.setattr(checks, "_check_gradient", lambda *_: 0.0)
    with pytest.raises(AssertionError, match="energy `broken` fails the check `taylor`.*slope"):
        check_energy(wrong, **sizes)


def test_a_gradient_with_holes_is_found_by_the_reference():
    """A detached piece gives the right output and the wrong training gradient."""

    @cem.energy(h="dim", U="hidden dim")
    def holes(h, *, U):
        return -torch.cumsum((U.detach() @ h).square(), 0).sum() + 0 * U.sum()

    layer = cem.derive(holes, dim=4, hidden=3, dtype=torch.float64)
    assert layer.lowering.kind == "autograd"
    # `detach` means frozen: it holds a value fixed in dE/dh and is alive in training.
    assert check_energy(holes, dim=4, hidden=3).checks["reference"] < 1e-12


def test_the_past_that_sees_the_future_is_found():
    @cem.energy(h="dim", x="seq dim")
    def peeks(h, x, *, visible):
        total = torch.stack([torch.dot(h, token) for token in x]).square().sum()
        return -total + 0 * visible.sum()

    with pytest.raises(
        AssertionError, match="energy `peeks` fails the check `(reference|causality)`"
    ):
        check_energy(peeks, dim=3)


def test_a_report_reads_well():
    report = check_energy(energies.interaction, dim=4, heads=2, rank=3)
    first, *rest = str(report).splitlines()
    assert first == "energy `interaction`: fused (matmul, sdpa)"
    assert [line.split()[0] for line in rest] == ["gradient", "taylor", "reference", "lowering"]


def test_relative_errors():
    one = torch.ones(3)
    assert relative_error(one, one) == 0
    assert relative_error(0 * one, 0 * one) == 0
    assert relative_error(one, 0 * one) == float("inf")
    assert relative_error(one[:0], one[:0]) == 0
    assert not relative_error(one * float("nan"), one) <= 1
    with pytest.raises(AssertionError, match="force: the relative error is 0.1"):
        assert_close(1.1 * one, one, 1e-3, name="force")
    with pytest.raises(AssertionError, match="the shapes differ"):
        assert_close(one, one[:1], 1e-3)
    with pytest.raises(AssertionError, match="nan"):
        assert_close(one * float("nan"), one, 1e-3, atol=1.0)
    assert_close(one + 1e-9, one, 1e-12, atol=1e-6)
