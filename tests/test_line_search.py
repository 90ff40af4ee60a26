"""LineSearch: no energy rises, the largest step size that does it, step sizes as constants."""

import pytest
import torch
from helpers import (
    ENERGIES,
    UNTRANSLATABLE,
    Case,
    D,
    T,
    assert_same,
    by_name,
    gradients,
)
from quadratics import quadratic_layer
from torch import nn

import cem
from cem import energies
from cem.testing import assert_close, reference_of


@pytest.mark.parametrize("case", [*ENERGIES, *UNTRANSLATABLE], ids=by_name)
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
def test_no_energy_rises(case, norm):
    """Even from a step size that is far too large, with energies of any curvature."""
    layer = case.derive(update=cem.LineSearch(start=64.0), steps=2, norm=norm).double()
    (found,) = cem.trace(layer, **case.inputs())
    assert (found.drop >= -1e-12 * found.before.abs()).all()
    assert found.drop.max() > 0


@pytest.mark.parametrize("start", [0.1, 1.0, 16.0])
def test_the_largest_size_of_the_sequence(start):
    """On w h^2 / 2 Armijo holds up to a = 2 (1 - slope) / w."""
    slope = 0.25
    layer, _, _ = quadratic_layer(1, 0.6, 0.6, update=cem.LineSearch(start, 0.5, slope))
    h = torch.randn(1, 6, 1, dtype=torch.float64)
    size = start
    while size > 2 * (1 - slope) / 0.6:
        size /= 2
    assert_close(layer(h), (1 - 0.6 * size) * h, 1e-12)


def test_tokens_have_step_sizes_of_their_own():
    @cem.energy(h="dim")
    def quartic(h):
        return (h**4).sum() / 4

    layer = cem.derive(quartic, dim=1, update=cem.LineSearch(8.0), dtype=torch.float64)
    h = torch.tensor([[0.4], [2.0], [7.0]], dtype=torch.float64)
    sizes = ((h - layer(h)) / h**3).flatten()
    assert sizes[0] > sizes[1] > sizes[2] > 0
    assert torch.equal(sizes.log2().round(), sizes.log2().round(decimals=6))


def test_a_token_that_finds_none_stays():
    layer, _, _ = quadratic_layer(2, 1.0, 1.0, update=cem.LineSearch(64.0, 0.5, tries=2))
    h = torch.randn(1, 3, 2, dtype=torch.float64)
    assert torch.equal(layer(h), h)


def test_an_uphill_direction_is_not_taken():
    """A signed preconditioner that turns the gradient around."""
    part = cem.Diagonal(3, signed=True)
    nn.init.constant_(part.d, -2.0)
    layer, _, _ = quadratic_layer(3, update=cem.LineSearch(), preconditioner=part)
    h = torch.randn(1, 4, 3, dtype=torch.float64)
    assert torch.equal(layer(h), h)


def test_the_slope_is_taken_through_the_norm_and_the_preconditioner():
    layer = Case(energies.interaction, ()).derive(
        norm=nn.RMSNorm, preconditioner=cem.Diagonal, update=cem.LineSearch()
    )
    layer = layer.double()
    h, v = torch.randn(2, 2, T, D, dtype=torch.float64)
    _, first = layer.begin(h)
    eps = 1e-6
    ahead = layer.energy(h + eps * v, context=h) - layer.energy(h - eps * v, context=h)
    assert_close(first.slope(h, v), ahead.detach() / (2 * eps), 1e-7)


def test_the_backward_pass_takes_the_sizes_as_constants():
    case = Case(energies.interaction, ())
    layer = case.derive(update=cem.LineSearch(0.25, slope=0.0))
    plain = case.derive(update=cem.GradientDescent(0.25))  # concave: the first size is taken
    inputs = case.inputs()
    assert_same(gradients(layer, layer, inputs), gradients(plain, plain, inputs), 1e-12)
    truth = gradients(lambda **inputs: reference_of(layer, **inputs), layer, inputs)
    assert_same(gradients(layer, layer, inputs), truth, 1e-12)


@pytest.mark.parametrize("wrong", [{"start": 0}, {"shrink": 1.0}, {"slope": 1.0}, {"tries": 0}])
def test_errors(wrong):
    with pytest.raises(ValueError, match="`LineSearch` needs start > 0, 0 < shrink < 1"):
        cem.LineSearch(**wrong)
