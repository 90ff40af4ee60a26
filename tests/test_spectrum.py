"""The extreme eigenvalues of each token's Hessian, against the dense Hessian of the definition."""

import math

import pytest
import torch
from helpers import ENERGIES, D, by_name, looped
from sympy import Sum

import cem
from cem import energies
from cem.testing.reference import reference_energy, values_of


def dense(layer, h, **inputs):
    """The eigenvalues of d2E_t/dh_t2 by the definition, token by token, shape (B, T, D)."""

    def total(z, gates, context):
        given = {"causal": layer.causal, "frozen": gates, **inputs, **values_of(layer)}
        if layer.energy_function.context is not None:
            given["context"] = context
        return reference_energy(layer.energy_function, z, norm=layer.norm, **given)

    def of_one(b, t):
        def energy(z):
            states = h[b].clone()
            states[t] = z
            return total(states[None], h[b][None], inputs_of(b))[0, t]

        return torch.autograd.functional.hessian(energy, h[b, t])

    context = inputs.pop("context", None)

    def inputs_of(b):
        return h[b][None] if context is None else context[b][None]

    matrices = torch.stack(
        [torch.stack([of_one(b, t) for t in range(h.shape[1])]) for b in range(len(h))]
    )
    return torch.linalg.eigvalsh(matrices)


def assert_extremes(found, eigenvalues):
    size = eigenvalues.abs().max().clamp_min(1e-5)
    torch.testing.assert_close(found.smallest / size, eigenvalues[..., 0] / size, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.largest / size, eigenvalues[..., -1] / size, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ENERGIES, ids=by_name)
def test_dim_iterations_are_exact(case):
    layer = case.derive()
    inputs = {name: z[:, :8] for name, z in case.inputs().items()}
    h = inputs.pop("h")[:1, :3]
    inputs = {name: z[:1] for name, z in inputs.items()}
    found = layer.curvature(h, **inputs)
    assert found.smallest.shape == found.largest.shape == (1, 3)
    assert_extremes(found, dense(layer, h, **inputs))


def test_a_context_and_a_norm():
    layer = cem.derive(
        energies.interaction, dim=6, heads=2, rank=3, norm=torch.nn.RMSNorm, dtype=torch.float64
    )
    h, x = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    found = layer.curvature(h, context=x)
    assert_extremes(found, dense(layer, h, context=x))
    assert found.safe_step.isnan().all()


def test_few_iterations_stay_inside():
    layer = cem.derive(energies.gated, dim=64, hidden=96, dtype=torch.float64)
    h = torch.randn(1, 4, 64, dtype=torch.float64)
    exact, rough = layer.curvature(h, iterations=64), layer.curvature(h, iterations=12)
    assert (rough.largest <= exact.largest + 1e-12).all()
    assert (rough.smallest >= exact.smallest - 1e-12).all()
    torch.testing.assert_close(rough.smallest, exact.smallest, rtol=0.02, atol=0)
    assert (exact.largest <= layer.certificate.bound**-1 * 2).all()


dim = cem.dims("dim")
h, i = cem.state(dim), dim.index("i")
w = cem.parameter("w", dim)


def test_repeated_eigenvalues():
    """The Krylov space of the identity is a line; the search must not invent a zero."""
    layer = cem.derive(cem.Energy(3 * Sum(h[i] ** 2, i) / 2), dim=5, dtype=torch.float64)
    found = layer.curvature(torch.randn(2, 5, dtype=torch.float64))
    for value in (found.smallest, found.largest):
        torch.testing.assert_close(value, torch.full_like(value, 3.0))
    torch.testing.assert_close(found.safe_step, torch.full_like(found.safe_step, 2 / 3))


def test_an_affine_energy():
    layer = cem.derive(cem.Energy(Sum(w[i] * h[i], i)), dim=5, dtype=torch.float64)
    found = layer.curvature(torch.randn(2, 5, dtype=torch.float64))
    assert (found.largest == 0).all() and (found.smallest == 0).all()
    assert (found.safe_step == math.inf).all()


def test_the_safe_step_is_where_a_quadratic_energy_stops_to_fall():
    layer = cem.derive(
        cem.Energy(Sum(w[i] * h[i] ** 2, i)),
        dim=4,
        preconditioner=cem.Diagonal,
        update=cem.GradientDescent(learn=True),
        dtype=torch.float64,
    )
    with torch.no_grad():
        layer.w.copy_(torch.tensor([0.1, 0.2, 0.3, 5.0]))
        layer.preconditioner.d.fill_(2.0)
    state = torch.eye(4, dtype=torch.float64)[3:]
    [safe] = layer.curvature(state).safe_step.tolist()
    for factor, falls in ((0.999, True), (1.001, False)):
        layer.update.step_size.data.fill_(factor * safe)
        assert bool(layer.energy(layer(state)) < layer.energy(state)) == falls


def test_autograd_and_no_grad():
    layer = cem.derive(looped, dim=6, heads=2, rank=3, dtype=torch.float64)
    state = torch.randn(1, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        found = layer.curvature(state)
    assert not found.largest.requires_grad
    fused = cem.derive(energies.interaction, dim=6, heads=2, rank=3, dtype=torch.float64)
    fused.load_state_dict(layer.state_dict())
    torch.testing.assert_close(found.smallest, fused.curvature(state).smallest)


def test_a_signed_preconditioner():
    layer = cem.derive(energies.plain, dim=D, hidden=5, preconditioner=cem.Diagonal(D, signed=True))
    assert layer.curvature(torch.randn(3, D)).safe_step.isnan().all()


def test_no_iterations():
    layer = cem.derive(energies.plain, dim=D, hidden=5)
    with pytest.raises(ValueError, match="at least one iteration: got 0; type `iterations=32`"):
        layer.curvature(torch.randn(3, D), iterations=0)
