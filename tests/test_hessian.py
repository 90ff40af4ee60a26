"""Hessian products: the calculus applied twice is the Hessian, in closed form and by autograd."""

import inspect
import math

import pytest
import torch
from helpers import ENERGIES, UNTRANSLATABLE, Case, D, T, assert_same, by_name
from sympy import Sum

import cem
from cem import energies
from cem.calculus.gradient import gradient, hessian_product, output_index
from cem.language.evaluation import Evaluator
from cem.testing import assert_close, reference_energy
from cem.testing.reference import values_of


def product(layer, h, v, **inputs):
    """d2E/dh2 v by the lowering."""
    function = layer.lowering.hessian_product
    _, first = layer.begin(h, dense=function.needs_mask, **inputs)
    return function(first.g, *first.around)(v)


def products(layer, h, v, **inputs):
    """d2E/dh2 v by the lowering, and by differentiating the definition of the energy twice."""
    found = product(layer, h, v, **inputs)
    context = {} if layer.energy_function.context is None else {"context": h}
    fixed = {"frozen": h, "causal": layer.causal, **context, **inputs, **values_of(layer)}

    def slope(z):
        energy = reference_energy(layer.energy_function, z, **fixed).sum()
        return torch.autograd.grad(energy, z, create_graph=True)[0]

    z = h.detach().clone().requires_grad_()
    along = (slope(z) * v).sum()
    if not along.requires_grad:
        return found, torch.zeros_like(h)
    expected = torch.autograd.grad(along, z, allow_unused=True)[0]
    return found, torch.zeros_like(h) if expected is None else expected


@pytest.mark.parametrize("case", ENERGIES, ids=by_name)
def test_it_is_the_second_derivative(case):
    inputs = case.inputs()
    v = torch.randn_like(inputs["h"])
    found, expected = products(case.derive(lowering="fused"), v=v, **inputs)
    slow = product(case.derive(lowering="autograd"), v=v, **inputs)
    # Where a Hessian is zero, what is left of one is rounding.
    assert_close(found, expected, 1e-11, atol=1e-12)
    assert_close(slow, expected, 1e-11, atol=1e-12)


@pytest.mark.parametrize("case", UNTRANSLATABLE, ids=by_name)
def test_without_a_symbolic_form(case):
    inputs = case.inputs()
    found, expected = products(case.derive(), v=torch.randn_like(inputs["h"]), **inputs)
    assert_close(found, expected, 1e-11)


@pytest.mark.parametrize("case", ENERGIES[::9], ids=by_name)
def test_symmetric(case):
    """<u, H v> = <H u, v> for every token."""
    layer, inputs = case.derive(), case.inputs()
    function = layer.lowering.hessian_product
    h, first = layer.begin(**inputs, dense=function.needs_mask)
    hessian = function(first.g, *first.around)
    u, v = torch.randn(2, *h.shape, dtype=torch.float64)
    left, right = (u * hessian(v)).sum(-1), (v * hessian(u)).sum(-1)
    assert_close(left, right, 1e-11, atol=1e-13)
    assert_close(hessian(2 * u - v), 2 * hessian(u) - hessian(v), 1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "case",
    [c for c in ENERGIES if c.name in ("interaction", "two_sided_gated_silu", "memory")],
    ids=by_name,
)
def test_taylor(case):
    """|dE/dh(h + eps v) - dE/dh(h) - eps H v| falls with slope 2."""
    layer, inputs = case.derive(), case.inputs()
    h = inputs["h"]
    v = torch.randn_like(h)
    function = layer.lowering.hessian_product
    _, first = layer.begin(h, dense=function.needs_mask)
    product = function(h, *first.around)(v)
    remainders = []
    with torch.no_grad():
        start = layer.lowering.scale * first.gradient(h)
        for n in range(5, 11):
            there = layer.lowering.scale * first.gradient(h + 2.0**-n * v)
            remainders.append(float((there - start - 2.0**-n * product).norm()))
    slopes = [math.log2(a / b) for a, b in zip(remainders, remainders[1:], strict=False)]
    assert all(1.9 < slope < 2.1 for slope in slopes)


@pytest.mark.parametrize("case", ENERGIES[:12], ids=by_name)
def test_fused_and_autograd_have_the_same_derivatives(case):
    layers = [case.derive(lowering=kind) for kind in ("fused", "autograd")]
    inputs = case.inputs()
    v = torch.randn_like(inputs["h"])
    found = []
    for layer in layers:
        points = {name: z.clone().requires_grad_() for name, z in {**inputs, "v": v}.items()}
        rest = {name: z for name, z in points.items() if name != "v"}
        function = layer.lowering.hessian_product
        _, first = layer.begin(**rest, dense=function.needs_mask)
        out = function(first.g, *first.around)(points["v"])
        sources = {**points, **dict(layer.named_parameters())}
        grads = torch.autograd.grad(out.sin().sum(), list(sources.values()), allow_unused=True)
        found.append(
            {"output": out.detach()}
            | {
                name: torch.zeros_like(z) if g is None else g
                for (name, z), g in zip(sources.items(), grads, strict=True)
            }
        )
    assert_same(*found, 1e-11, atol=1e-13)


def test_masks():
    layer = Case(energies.interaction, ()).derive(causal=False)
    h = torch.randn(2, T, D, dtype=torch.float64)
    visible = torch.rand(2, T, T) < 0.5
    visible[0, 2] = False  # a token that sees nothing
    found, expected = products(layer, h, torch.randn_like(h), visible=visible)
    assert_close(found, expected, 1e-12)
    assert (found[0, 2] == 0).all()


def test_what_the_direction_does_not_change_is_computed_once():
    function = Case(energies.interaction, ()).derive().lowering.hessian_product
    assert "kernels.masked_softmax(" in inspect.getsource(function.prepare)
    assert "kernels.masked_softmax(" not in inspect.getsource(function.apply)


def test_the_symbolic_form_of_attention():
    """H v = -beta sum_a Q_a^T Cov_p(k) Q_a v: the covariance of the keys under the attention weights."""
    energy = energies.interaction
    T_, rank, heads, width = 6, 3, 2, 5
    Q, K = torch.randn(2, heads, rank, width, dtype=torch.float64)
    h, v, x = (torch.randn(*n, width, dtype=torch.float64) for n in ((), (), (T_,)))
    beta = 0.7
    k = torch.einsum("ard,sd->asr", K, x)
    p = torch.softmax(beta * torch.einsum("ard,d,asr->as", Q, h, k), -1)
    mean = torch.einsum("as,asr->ar", p, k)
    covariance = torch.einsum("as,asr,asq->arq", p, k, k) - torch.einsum("ar,aq->arq", mean, mean)
    expected = -beta * torch.einsum("ard,arq,aqe,e->d", Q, covariance, Q, v)
    names = {
        "Q": Q,
        "K": K,
        "h": h,
        "x": x,
        "direction": v,
        "beta": torch.tensor(beta, dtype=torch.float64),
    }
    sizes = energy.infer_sizes(h, x, {"Q": Q, "K": K})
    form = hessian_product(energy.gradient, energy.width)
    found = Evaluator(names, sizes)(form, (output_index(energy.width),))
    assert_close(found, expected, 1e-12)


def test_a_direction_is_constant():
    """The gradient of the Hessian product of a quadratic is zero."""
    dim = cem.dims("dim")
    h, i = cem.state(dim), dim.index("i")
    product = hessian_product(cem.Energy(Sum(h[i] ** 2, i)).gradient, dim)
    assert gradient(product.xreplace({output_index(dim): i}), dim) == 0


def test_the_name_is_taken():
    with pytest.raises(
        ValueError, match="the parameter name `direction` is a name of the layer's own"
    ):

        @cem.energy(h="dim", direction="dim")
        def taken(h, *, direction):
            return (h * direction).sum()
