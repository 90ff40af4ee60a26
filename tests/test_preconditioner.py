"""Preconditioners: positive semi-definite, the identity at the start, their dense matrix."""

import pytest
import torch

import cem
from cem.testing import assert_close

PRECONDITIONERS = [cem.ScaledIdentity, cem.Diagonal]
every = pytest.mark.parametrize("kind", PRECONDITIONERS)


def drawn(kind, dim=7):
    part = kind(dim).double()
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    return part


@every
def test_the_identity_at_the_start(kind):
    assert_close(kind(7).dense(), torch.eye(7), 1e-6)


@every
def test_it_equals_its_dense_matrix(kind):
    part, gradient = drawn(kind), torch.randn(2, 5, 7, dtype=torch.float64)
    assert_close(part(gradient), gradient @ part.dense().T, 1e-12)


@every
def test_symmetric_and_positive_semi_definite(kind):
    dense = drawn(kind).dense()
    assert_close(dense, dense.T, 1e-12)
    assert torch.linalg.eigvalsh(dense).min() >= 0
    gradient = torch.randn(9, 7, dtype=torch.float64)
    assert ((gradient @ dense) * gradient).sum(-1).min() > 0


@every
def test_derivatives(kind):
    part, gradient = drawn(kind), torch.randn(3, 7, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in part.named_parameters()]

    def apply(gradient, *values):
        return torch.func.functional_call(part, dict(zip(names, values, strict=True)), (gradient,))

    points = [gradient, *(p.detach().clone().requires_grad_() for p in part.parameters())]
    assert torch.autograd.gradcheck(apply, points)


@every
def test_the_gradient_keeps_its_dtype(kind):
    assert kind(7)(torch.randn(3, 7).bfloat16()).dtype == torch.bfloat16


@every
def test_a_class_or_a_module(kind):
    sizes = {"dim": 4, "hidden": 3}
    for part in (kind, kind(4)):
        layer = cem.derive(cem.energies.gated, preconditioner=part, **sizes)
        assert isinstance(layer.preconditioner, kind)
        assert "preconditioner.d" in layer.state_dict()
        assert f"{kind.__name__}(dim=4)" in repr(layer)
    plain = cem.derive(cem.energies.gated, **sizes)
    plain.load_state_dict(layer.state_dict(), strict=False)
    h = torch.randn(2, 3, 4)
    assert_close(layer(h), plain(h), 1e-6)


@every
def test_a_preconditioned_step_lowers_the_energy(kind):
    layer = cem.derive(
        cem.energies.interaction,
        dim=7,
        heads=2,
        rank=3,
        preconditioner=drawn(kind),
        dtype=torch.float64,
    )
    h = torch.randn(2, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        drop = layer.energy(h) - layer.energy(layer(h), context=h, frozen=h)
    assert (drop > 0).all()
