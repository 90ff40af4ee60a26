"""Sparse weights: exact, differentiable twice, masked; two implementations, one of them by sorting."""

import json
import math

import pytest
import torch
from helpers import SIZES, h, i, s, x
from sympy import Sum
from torch import nn

import cem
from cem import energies
from cem.language.entmax import Entmax, sparse_maximum, sparse_weights
from cem.lowering import kernels
from cem.testing import assert_close

ALPHAS = pytest.mark.parametrize("alpha", [1.5, 2])


def scores(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


@ALPHAS
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_sorting_finds_what_bisection_finds(alpha, dim, scale):
    z = scores(5, 7, 6, scale=scale) + 100
    p = kernels.entmax(z, dim, alpha)
    assert_close(p, sparse_weights(z, dim, alpha), 1e-11)  # 100 costs two digits
    assert_close(p.sum(dim), torch.ones_like(p.sum(dim)), 1e-12)
    assert (p >= 0).all() and (scale < 1 or (p == 0).any())
    assert_close(kernels.entmax_conjugate(z, dim, alpha), sparse_maximum(z, dim, alpha), 1e-12)


@ALPHAS
def test_no_weights_give_more(alpha):
    """The maximum is one: of many weights, sparse ones among them, none beats those that are found."""
    z = scores(6)
    powers = 4 ** scores(2000, 1, seed=1)
    others = scores(2000, 6, seed=2).abs().pow(powers)
    others = torch.cat(
        (others / others.sum(-1, keepdim=True), torch.eye(6), torch.full((1, 6), 1 / 6))
    )

    def value(p):
        return p @ z + (1 - p.pow(alpha).sum(-1)) / (alpha * (alpha - 1))

    best = kernels.entmax_conjugate(z, 0, alpha)
    assert_close(value(kernels.entmax(z, 0, alpha)), best, 1e-12)
    assert (value(others) <= best + 1e-12).all()
    room = (1 - 6 ** (1 - alpha)) / (alpha * (alpha - 1))
    assert z.max() <= best <= z.max() + room


@ALPHAS
def test_derivatives(alpha):
    z = scores(3, 5).requires_grad_()
    maximum, weights = (
        lambda z, f=f: f(z, 1, alpha) for f in (kernels.entmax_conjugate, kernels.entmax)
    )
    (slope,) = torch.autograd.grad(maximum(z).sum(), z)
    assert_close(slope, weights(z), 1e-12)
    for function in (maximum, weights):
        assert torch.autograd.gradcheck(function, z)
        assert torch.autograd.gradgradcheck(function, z)
    visible = scores(3, 5, seed=1) > 0
    visible[1] = False
    for function in (kernels.masked_entmax_conjugate, kernels.masked_entmax):
        assert torch.autograd.gradcheck(lambda z, f=function: f(z, visible, 1, alpha), z)
        assert torch.autograd.gradgradcheck(lambda z, f=function: f(z, visible, 1, alpha), z)


@ALPHAS
def test_what_is_not_visible_does_not_count(alpha):
    z, visible = scores(4, 9), scores(4, 9, seed=1) > 0
    visible[2] = False
    p = kernels.masked_entmax(z, visible, 1, alpha)
    found = kernels.masked_entmax_conjugate(z, visible, 1, alpha)
    for row, seen, weights, value in zip(z, visible, p, found, strict=True):
        assert (weights[~seen] == 0).all()
        if seen.any():
            assert_close(weights[seen], kernels.entmax(row[seen], 0, alpha), 1e-12)
            assert_close(value, kernels.entmax_conjugate(row[seen], 0, alpha), 1e-12)
        else:
            assert value == 0
    hidden = z.masked_fill(~visible, -math.inf)
    assert_close(sparse_weights(hidden, 1, alpha), p, 1e-12)
    assert_close(sparse_maximum(hidden, 1, alpha), found, 1e-12)
    poisoned = z.masked_fill(~visible, math.inf)
    assert torch.equal(kernels.masked_entmax_conjugate(poisoned, visible, 1, alpha), found)


@ALPHAS
def test_ties_one_score_and_a_wide_gap(alpha):
    even = kernels.entmax(torch.zeros(7).double(), 0, alpha)
    assert_close(even, torch.ones(7).double() / 7, 1e-12)
    assert kernels.entmax(scores(4, 1), 1, alpha).eq(1).all()
    # Alone from a gap of 1 / (alpha - 1) on.
    gap = 1 / (alpha - 1)
    assert kernels.entmax(torch.tensor([gap, 0.0]), 0, alpha).tolist() == [1, 0]
    assert (kernels.entmax(torch.tensor([0.9 * gap, 0.0]), 0, alpha) > 0).all()
    tie = kernels.entmax(torch.tensor([2.0, 2.0, -9.0, 2.0]).double(), 0, alpha)
    assert_close(tie, torch.tensor([1, 1, 0, 1]).double() / 3, 1e-12)


@ALPHAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_types_lose_no_more_than_a_rounding(alpha, dtype):
    z = scores(5, 300).to(dtype)
    found = kernels.entmax(z, 1, alpha)
    truth = kernels.entmax(z.double(), 1, alpha)
    assert found.dtype == kernels.entmax_conjugate(z, 1, alpha).dtype == dtype
    assert_close(found.double(), truth, 1e-5 if dtype == torch.float32 else 2**-8)


@ALPHAS
def test_a_pattern_that_is_ahead_is_retrieved_exactly(alpha):
    layer = cem.derive(
        energies.sparse_memory_by(alpha), dim=6, hidden=6, beta=8.0, dtype=torch.float64
    )
    with torch.no_grad():
        layer.U.copy_(torch.eye(6))
    noisy = torch.eye(6, dtype=torch.float64) + scores(6, 6, scale=0.1)
    assert_close(layer(noisy), torch.eye(6).double(), 1e-15)
    soft = cem.derive(energies.memory, dim=6, hidden=6, beta=8.0, dtype=torch.float64)
    soft.load_state_dict(layer.state_dict())
    assert (soft(noisy) - torch.eye(6)).abs().max() > 1e-4


@ALPHAS
def test_the_layer_of_a_sparse_memory(alpha):
    layer = cem.derive(energies.sparse_memory_by(alpha), dim=12, hidden=11, dtype=torch.float64)
    nn.init.normal_(layer.U, generator=torch.Generator().manual_seed(0))
    state = scores(7, 12)
    p = sparse_weights(layer.scalars["beta"] * state @ layer.U.mT, -1, alpha)
    assert_close(layer(state), p @ layer.U, 1e-12)
    assert layer.certificate.bound == pytest.approx(2)


def test_shape_and_sign():
    convex = cem.entmax_conjugate(h[i], i)
    state = Sum(h[i] ** 2, i)
    assert cem.Energy(convex + state).curvature == "convex"
    assert cem.Energy(-convex - state).curvature == "concave"
    assert cem.Energy(cem.entmax_conjugate(h[i] ** 2, i)).curvature == "convex"
    assert cem.Energy(cem.entmax_conjugate(-(h[i] ** 2), i)).curvature == "unknown"
    assert cem.Energy(cem.entmax_conjugate(h[i] ** 2, i) ** 2).curvature == "convex"  # not negative
    assert cem.Energy(convex).gradient.has(Entmax)


def test_how_it_is_written():
    energy = cem.Energy(cem.entmax_conjugate(Sum(h[i] * x[s, i], i), s, 1.5))
    assert cem.language.notation.text(energy.expression) == "Ψ_{s∈V}(Σ_i h[i] x[s,i]; 1.5)"
    assert cem.language.notation.latex(energy.expression).startswith(r"\Psi_{s \in V}\left(")
    assert "entmax_{s∈V}" in str(energy.derivation()) or "entmax_s" in str(energy.derivation())
    assert "The derivative of a smooth maximum is the weights" in str(energy.derivation())


def test_json():
    energy = energies.sparse_memory_by(1.5)
    tree = energy.to_json()
    assert cem.Energy.from_json(tree) == energy
    sizes = {str(size): SIZES[str(size)] for size in energy.dims}
    assert cem.derive(cem.Energy.from_json(tree), **sizes).lowering.kind == "fused"
    edited = json.loads(tree)
    node = next(node for node in nodes(edited) if node.get("word") == "EntmaxConjugate")
    node["args"][2] = 3
    with pytest.raises(ValueError, match=r"args\[2\] must be an alpha: got 3; allowed: 3/2, 2"):
        cem.Energy.from_json(json.dumps(edited))


def nodes(tree):
    """Every object in a JSON tree."""
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(part)


def test_what_is_refused():
    for alpha in (1, 1.7, 3):
        with pytest.raises(
            ValueError, match=f"exact for alpha 1.5 and 2: got {alpha}; type `alpha=2`"
        ):
            cem.entmax_conjugate(h[i], i, alpha)
        with pytest.raises(
            ValueError, match=f"exact for alpha 1.5 and 2: got {alpha}; type `alpha=2`"
        ):
            energies.sparse_memory_by(alpha)
    with pytest.raises(
        TypeError, match="`entmax_conjugate` reduces an index: got 0 of type int; make"
    ):
        cem.entmax_conjugate(h[i], 0)

    @cem.energy(h="dim", U="heads hidden dim")
    def flat(h, *, U):
        return cem.entmax_conjugate((U @ h).flatten(), 0)

    assert "`entmax_conjugate` reduces an axis of one named size" in flat.reason
