"""Proximal maps are the minimisers that define them; Proximal finds the minimiser of E + r."""

import copy
import pickle

import pytest
import torch
from quadratics import least_squares
from torch import nn

import cem
from cem import prox
from cem.testing import assert_close

MAPS = [prox.l1(0.7), prox.nonnegative_l1(0.7), prox.box(-0.5, 1.25)]
every = pytest.mark.parametrize("map_", MAPS, ids=repr)


def penalty(map_, z):
    """r, with infinity outside of its domain."""
    if isinstance(map_, prox.box):
        return torch.where((z >= map_.low) & (z <= map_.high), 0.0, torch.inf)
    inside = (
        torch.zeros_like(z) if isinstance(map_, prox.l1) else torch.where(z < 0, torch.inf, 0.0)
    )
    return map_.weight * z.abs() + inside


@every
@pytest.mark.parametrize("step_size", [0.3, torch.tensor(2.0, dtype=torch.float64)])
def test_it_minimises_what_defines_it(map_, step_size):
    """Against every point of a grid of 1/1000."""
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)

    def value(z, x):
        return (z - x).square() / 2 + step_size * penalty(map_, z)

    found = value(map_(x, step_size), x)
    assert (found <= value(grid[:, None], x).min(0).values + 1e-12).all()
    assert found.isfinite().all()


@every
def test_derivatives_and_dtype(map_):
    x = torch.linspace(-3, 3, 12, dtype=torch.float64).requires_grad_()
    step_size = torch.tensor(0.31, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(map_, (x, step_size))
    rule = cem.Proximal(0.5, map_, learn=True)
    h = x.detach().bfloat16()
    assert rule.update(h, h, None)[0].dtype == torch.bfloat16


def lasso(map_, steps=2000, orthogonal=False, **options):
    generator = torch.Generator().manual_seed(4)
    U = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    U = torch.linalg.qr(U).Q if orthogonal else U / 2
    y = 2 * torch.randn(9, generator=generator, dtype=torch.float64)
    step_size = 1.0 / float(torch.linalg.matrix_norm(U, 2)) ** 2
    layer = cem.derive(
        least_squares,
        dim=6,
        hidden=9,
        steps=steps,
        update=cem.Proximal(step_size, map_),
        dtype=torch.float64,
        **options,
    )
    with torch.no_grad():
        layer.U.copy_(U)
        layer.y.copy_(y)
    return layer, U, y


@every
def test_the_fixed_point_solves_the_regularised_problem(map_):
    """Where r is smooth its slope balances that of E; elsewhere the slope of E lies in what r can hold."""
    layer, U, y = lasso(map_)
    with torch.no_grad():
        h = layer(torch.randn(1, 2, 6, dtype=torch.float64))
    assert_close(h[0, 0], h[0, 1], 1e-12)
    h = h[0, 0]
    slope = U.T @ (U @ h - y)
    if isinstance(map_, prox.box):
        low, high = h == map_.low, h == map_.high
        assert (slope[low] > 0).all() and (slope[high] < 0).all() and (low | high).any()
        inside = ~(low | high)
        assert slope[inside].abs().max() < 1e-12 and inside.any()
        return
    off = h == 0
    assert off.any() and not off.all()
    assert_close(slope[~off], -map_.weight * h[~off].sign(), 1e-11)
    if isinstance(map_, prox.l1):
        assert (slope[off].abs() <= map_.weight).all()
    else:
        assert (slope[off] >= -map_.weight).all() and (h >= 0).all()


def test_an_orthogonal_dictionary_is_solved_by_soft_thresholding():
    """In one step, from anywhere."""
    layer, U, y = lasso(prox.l1(0.7), steps=1, orthogonal=True)
    h = layer(torch.randn(1, 2, 6, dtype=torch.float64))
    code = U.T @ y
    assert_close(h, (code.sign() * (code.abs() - 0.7).relu()).expand_as(h), 1e-12)
    assert (h == 0).any()


def test_every_step_lowers_the_regularised_energy():
    map_ = prox.l1(0.7)
    layer, *_ = lasso(map_, steps=30)
    (found,) = cem.trace(layer, torch.randn(1, 4, 6, dtype=torch.float64))
    total = torch.cat([found.before, found.after[-1:]]) + penalty(map_, found.states).sum(-1)
    assert (total.diff(dim=0) <= 1e-12).all()
    assert (found.drop < 0).any()  # the smooth energy alone may rise


def test_a_scaled_identity_scales_the_regulariser():
    """With P = p I the fixed point is that of r / p."""
    scaled, *_ = lasso(prox.l1(0.35), preconditioner=cem.ScaledIdentity)
    with torch.no_grad():
        scaled.preconditioner.d.fill_(torch.expm1(torch.tensor(0.5)).log())  # p = 1/2
        plain, *_ = lasso(prox.l1(0.7))
        h = torch.randn(1, 1, 6, dtype=torch.float64)
        assert_close(scaled(h), plain(h), 1e-6)


def test_a_prox_with_parameters():
    class Threshold(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.full((6,), 0.1))

        def forward(self, x, step_size):
            return x - torch.clamp(x, -step_size * self.at, step_size * self.at)

    layer, *_ = lasso(Threshold(), steps=3)
    layer(torch.randn(1, 4, 6, dtype=torch.float64)).sum().backward()
    assert layer.update.prox.at.grad.abs().max() > 0
    assert "update.prox.at" in layer.state_dict()


@every
def test_copies(map_):
    for copied in (copy.deepcopy, lambda z: pickle.loads(pickle.dumps(z))):
        assert repr(copied(cem.Proximal(0.5, map_))) == repr(cem.Proximal(0.5, map_))
    assert "prox=" + repr(map_) in repr(cem.Proximal(0.5, map_))


def test_errors():
    with pytest.raises(ValueError, match="`l1` needs a weight that is not negative: got -1"):
        prox.l1(-1)
    with pytest.raises(ValueError, match="`nonnegative_l1` needs a weight that is not negative"):
        prox.nonnegative_l1(float("nan"))
    with pytest.raises(ValueError, match="`box` needs low <= high: got 1 and 0"):
        prox.box(1, 0)
    with pytest.raises(TypeError, match=r"takes a callable \(x, step_size\) -> x: got 0.1"):
        cem.Proximal(0.5, 0.1)
    with pytest.raises(ValueError, match="`Proximal` needs a positive step size: got 0"):
        cem.Proximal(0, prox.l1(0.1))
