"""Newton: dense solves, one step on a quadratic, descent on concave energies; the solvers of linear systems."""

import pytest
import torch
from helpers import ENERGIES, Case, D, T, by_name
from quadratics import quadratic_layer

import cem
from cem import energies
from cem.krylov import conjugate_gradients, conjugate_residuals
from cem.testing import assert_close

CERTIFIED = [case for case in ENERGIES if case.energy.curvature != "unknown"]


def dense_hessians(layer, h):
    function = layer.lowering.hessian_product
    _, first = layer.begin(h, dense=function.needs_mask)
    product = function(first.g, *first.around)
    basis = torch.eye(h.shape[-1], dtype=h.dtype)
    return torch.stack([product(e.expand_as(h)) for e in basis], -1)


@pytest.mark.parametrize("case", [c for c in CERTIFIED if not c.needs_context], ids=by_name)
def test_a_step_is_the_dense_solve(case):
    """Each token: h+ = h - (|Hess| + lambda)^-1 dE/dh, to rounding, in as many iterations as dimensions."""
    layer = case.derive(update=cem.Newton(0.5, 2 * D, 1e-14))
    plain = case.derive()
    h = case.inputs()["h"]
    with torch.no_grad():
        gradient = h - plain(h)
        hessian = dense_hessians(layer, h)
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        size = (vectors.mT @ gradient.unsqueeze(-1)) / (values.abs() + 0.5).unsqueeze(-1)
        assert_close(layer(h), h - (vectors @ size).squeeze(-1), 1e-9)


def test_one_step_on_a_quadratic():
    layer, _, lowest = quadratic_layer(6, 0.01, 3.0, shift=True, update=cem.Newton(0.0, 6, 0.0))
    h = torch.randn(2, 3, 6, dtype=torch.float64)
    assert_close(layer(h), lowest.expand_as(h), 1e-10)


def test_damping_on_a_quadratic():
    """(1 - w / (w + lambda)) h a step."""
    layer, spectrum, _ = quadratic_layer(6, update=cem.Newton(0.3, 6, 0.0, step_size=0.5))
    h = torch.randn(2, 3, 6, dtype=torch.float64)
    assert_close(layer(h), (1 - 0.5 * spectrum / (spectrum + 0.3)) * h, 1e-11)


def test_quadratic_convergence():
    """On a smooth strongly convex energy the number of right digits doubles."""

    @cem.energy(h="dim")
    def steep(h):
        return (cem.softplus(2 * h) - 0.3 * h + 0.1 * h * h).sum()

    errors = []
    h = torch.full((1, 1, 3), 0.2, dtype=torch.float64)
    best = cem.derive(steep, dim=3, steps=30, update=cem.Newton(0.0, 3, 0.0))(h)
    for steps in (1, 2, 3, 4):
        layer = cem.derive(steep, dim=3, steps=steps, update=cem.Newton(0.0, 3, 0.0))
        errors.append(float((layer(h) - best).abs().max()))
    ratios = [b / a**2 for a, b in zip(errors[:3], errors[1:4], strict=True) if a > 1e-6]
    assert len(ratios) >= 2 and max(ratios) < 1 and errors[0] < 0.5


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_every_step_lowers_a_concave_energy(iterations):
    case = Case(energies.interaction + energies.gated_relu, ())
    layer = case.derive(update=cem.Newton(0.1, iterations), steps=4)
    (found,) = cem.trace(layer, case.inputs()["h"])
    assert (found.drop > 0).all()


def test_a_token_without_a_force_stays():
    layer, _, lowest = quadratic_layer(4, shift=True, update=cem.Newton(0.0, 4))
    h = lowest.expand(1, 2, 4).clone().requires_grad_()
    out = layer(h)
    assert_close(out, h, 1e-12)
    out.sum().backward()
    assert h.grad.isfinite().all() and layer.U.grad.isfinite().all()


def test_gradcheck():
    layer = Case(energies.interaction, ()).derive(update=cem.Newton(0.4, 3, 0.0))
    h = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    names = ("Q", "K")

    def call(h, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (h,))

    assert torch.autograd.gradcheck(call, (h, layer.Q, layer.K), fast_mode=True)


SIZES = {"dim": D, "hidden": 5}


def test_errors():
    message = "energy `gated_silu` is not known to be convex or concave.*got curvature 'unknown'; type `update=cem.Mom"
    with pytest.raises(ValueError, match=message):
        cem.derive(energies.gated, update=cem.Newton(), **SIZES)
    with pytest.raises(ValueError, match="takes no preconditioner.*got Diagonal"):
        cem.derive(energies.gated_relu, update=cem.Newton(), preconditioner=cem.Diagonal, **SIZES)
    for wrong in ((-1.0,), (0.1, 0), (0.1, 8, -1.0)):
        with pytest.raises(ValueError, match="needs a damping and a tolerance of at least 0"):
            cem.Newton(*wrong)
    shown = "Newton(damping=0.01, iterations=8, tolerance=1e-06, step_size=1)"
    assert repr(cem.Newton()) == shown


# -- the solvers ----------------------------------------------------------------------------------


def systems(symmetric, batch=(2, T), width=9):
    A = torch.randn(*batch, width, width, dtype=torch.float64)
    A = A @ A.mT / width if symmetric else A / width**0.5
    return A + torch.eye(width, dtype=torch.float64), torch.randn(
        *batch, width, dtype=torch.float64
    )


@pytest.mark.parametrize("early", [False, True])
def test_conjugate_gradients(early):
    A, b = systems(True)
    x = conjugate_gradients(lambda v: (A @ v.unsqueeze(-1)).squeeze(-1), b, 12, 1e-13, early=early)
    assert_close(x, torch.linalg.solve(A, b), 1e-11)


@pytest.mark.parametrize("symmetric", [False, True])
def test_conjugate_residuals(symmetric):
    A, b = systems(symmetric)
    products = []

    def apply(v):
        products.append(1)
        return (A @ v.unsqueeze(-1)).squeeze(-1)

    x = conjugate_residuals(apply, b, 50, 1e-12)
    assert_close(x, torch.linalg.solve(A, b), 1e-9)
    assert len(products) <= 2 * b.shape[-1]


def test_solvers_of_nothing():
    zero = torch.zeros(2, 3)
    assert torch.equal(conjugate_gradients(lambda v: v, zero, 3, 0.0), zero)
    assert torch.equal(conjugate_residuals(lambda v: v, zero, 3, 0.0), zero)
