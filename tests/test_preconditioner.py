"""Preconditioners: positive semi-definite, the identity at the start, their dense matrix."""

import copy
import pickle
from functools import partial

import pytest
import torch
from helpers import assert_same, copy_of, gradients
from torch import nn

import cem
from cem.testing import assert_close, reference_of

WIDTH = 6
PRECONDITIONERS = [
    cem.ScaledIdentity,
    cem.Diagonal,
    partial(cem.DiagonalPlusLowRank, rank=4),
    partial(cem.BlockDiagonal, blocks=2),
]
SIGNED = [
    partial(cem.Diagonal, signed=True),
    partial(cem.DiagonalPlusLowRank, rank=4, signed=True),
]
NORMS = {
    "rms": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
    "rms with eps": lambda: nn.RMSNorm(WIDTH, eps=0.3, elementwise_affine=False),
    "rms with a gain": lambda: nn.RMSNorm(WIDTH),
    "layer": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "layer with a gain": lambda: nn.LayerNorm(WIDTH),
    "another": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
}


def name_of(kind):
    return repr(kind(WIDTH))


definite = pytest.mark.parametrize("kind", PRECONDITIONERS, ids=name_of)
every = pytest.mark.parametrize("kind", [*PRECONDITIONERS, *SIGNED], ids=name_of)
norms = pytest.mark.parametrize("name", NORMS)


def drawn(part):
    for parameter in part.double().parameters():
        nn.init.normal_(parameter, std=2.0)
    return part


@every
def test_the_identity_at_the_start(kind):
    assert_close(kind(WIDTH).dense(), torch.eye(WIDTH), 1e-6)


@every
def test_no_parameter_is_stuck_at_the_start(kind):
    """The first derivative of a loss for the parameters is not zero, but where U = 0 hides V."""
    part, gradient = kind(WIDTH), torch.randn(5, WIDTH)
    (part(gradient) * torch.randn(5, WIDTH)).sum().backward()
    for name, parameter in part.named_parameters():
        hidden = name == "V" and not part.definite
        assert (parameter.grad == 0).all() if hidden else (parameter.grad != 0).all(), name


def test_training_from_the_start_finds_a_low_rank():
    """P is fitted to I + q q^T: V has to leave its first coordinates."""
    part = cem.DiagonalPlusLowRank(WIDTH, rank=1).double()
    q = torch.randn(WIDTH, 1, dtype=torch.float64)
    wanted = torch.eye(WIDTH, dtype=torch.float64) + q @ q.T
    optimizer = torch.optim.Adam(part.parameters(), lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        loss = (part.dense() - wanted).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 1e-5 * (q @ q.T).square().sum()


@every
def test_it_equals_its_dense_matrix(kind):
    part, gradient = drawn(kind(WIDTH)), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    assert_close(part(gradient), gradient @ part.dense().T, 1e-12)


def test_the_dense_matrices_are_the_formulas():
    part = drawn(cem.DiagonalPlusLowRank(WIDTH, 4))
    formula = torch.diag(nn.functional.softplus(part.d)) + part.V @ part.V.T
    assert_close(part.dense(), formula, 1e-12)
    part = drawn(cem.DiagonalPlusLowRank(WIDTH, 4, signed=True))
    assert_close(part.dense(), torch.diag(1 + part.d) + part.U @ part.V.T, 1e-12)
    part = drawn(cem.BlockDiagonal(WIDTH, 2))
    assert_close(part.dense(), torch.block_diag(*(L @ L.T for L in part.L)), 1e-12)


@definite
def test_symmetric_and_positive_semi_definite(kind):
    part = drawn(kind(WIDTH))
    dense = part.dense()
    assert part.definite and part.scalar == isinstance(part, cem.ScaledIdentity)
    assert_close(dense, dense.T, 1e-12)
    assert torch.linalg.eigvalsh(dense).min() >= 0
    gradient = torch.randn(9, WIDTH, dtype=torch.float64)
    assert ((gradient @ dense) * gradient).sum(-1).min() > 0


@pytest.mark.parametrize("kind", SIGNED, ids=name_of)
def test_signed_ones_promise_nothing(kind):
    part = drawn(kind(WIDTH))
    assert not part.definite and not part.scalar
    assert torch.linalg.eigvals(part.dense()).real.min() < 0


@every
def test_derivatives(kind):
    part, gradient = drawn(kind(WIDTH)), torch.randn(3, WIDTH, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in part.named_parameters()]

    def apply(gradient, *values):
        return torch.func.functional_call(part, dict(zip(names, values, strict=True)), (gradient,))

    points = [gradient, *(p.detach().clone().requires_grad_() for p in part.parameters())]
    assert torch.autograd.gradcheck(apply, points)


@every
def test_the_gradient_keeps_its_dtype(kind):
    gradient = torch.randn(3, WIDTH)
    assert kind(WIDTH)(gradient.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kind(WIDTH)(gradient).dtype == torch.float32


@every
def test_a_class_or_a_module(kind):
    sizes = {"dim": WIDTH, "hidden": 3}
    for part in (kind, kind(WIDTH)):
        layer = cem.derive(cem.energies.gated, preconditioner=part, **sizes)
        assert isinstance(layer.preconditioner, cem.AbstractPreconditioner)
        assert any(name.startswith("preconditioner.") for name in layer.state_dict())
        assert name_of(kind) in repr(layer)
    plain = cem.derive(cem.energies.gated, **sizes)
    plain.load_state_dict(layer.state_dict(), strict=False)
    h = torch.randn(2, 3, WIDTH)
    assert_close(layer(h), plain(h), 1e-6)


@definite
def test_a_preconditioned_step_lowers_the_energy(kind):
    layer = cem.derive(
        cem.energies.interaction,
        dim=WIDTH,
        heads=2,
        rank=3,
        preconditioner=drawn(kind(WIDTH)),
        dtype=torch.float64,
    )
    h = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        drop = layer.energy(h) - layer.energy(layer(h), context=h, frozen=h)
    assert (drop > 0).all()


@norms
def test_the_jacobian_of_a_norm(name):
    part = drawn(cem.NormJacobian(NORMS[name]()))
    h = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    if part.dim is None:
        assert not part.definite
        part.dim = WIDTH
    jacobian = torch.autograd.functional.jacobian(part.norm, h)
    assert_close(part.dense(h), jacobian.T, 1e-12)
    points = torch.randn(2, 3, WIDTH, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(part, list(points.unbind()))
    if part.definite:
        assert_close(jacobian, jacobian.T, 1e-12)
        assert torch.linalg.eigvalsh(jacobian).min() > -1e-12
    assert part.definite == (name in ("rms", "rms with eps", "layer"))


@norms
def test_the_true_gradient_through_a_norm(name):
    """One step moves h by d/dh E(norm(h)), at a fixed context and fixed gates."""
    norm = drawn(NORMS[name]())
    layer = cem.derive(
        cem.energies.interaction + cem.energies.gated,
        dim=WIDTH,
        heads=2,
        rank=3,
        hidden=5,
        norm=norm,
        preconditioner=cem.NormJacobian(norm),
        dtype=torch.float64,
    )
    h = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    energy = layer.energy(h, context=h.detach(), frozen=h.detach())
    (slope,) = torch.autograd.grad(energy.sum(), h)
    assert_close(h - layer(h), slope, 1e-12)
    inputs = {"h": h}
    truth = gradients(lambda **inputs: reference_of(layer, **inputs), layer, inputs)
    assert_same(gradients(layer, layer, inputs), truth, 1e-11)


def test_the_jacobian_of_a_norm_in_bfloat16():
    h, gradient = torch.randn(2, 5, WIDTH).bfloat16()
    for name in ("rms", "layer with a gain", "another"):
        norm = NORMS[name]().bfloat16()
        assert cem.NormJacobian(norm)(gradient, h).dtype == torch.bfloat16


def options(steps):
    parts = [cem.Diagonal(WIDTH), cem.BlockDiagonal(WIDTH, 3), cem.DiagonalPlusLowRank(WIDTH, 2)]
    return {"preconditioner": parts[:steps], "steps": steps, "update": cem.GradientDescent(0.5)}


@pytest.mark.parametrize("lowering", ["fused", "autograd"])
def test_one_preconditioner_a_step(lowering):
    layer = cem.derive(
        cem.energies.gated,
        dim=WIDTH,
        hidden=5,
        dtype=torch.float64,
        lowering=lowering,
        **options(3),
    )
    drawn(layer.preconditioner)
    inputs = {"h": torch.randn(2, 3, WIDTH, dtype=torch.float64)}
    truth = gradients(lambda **inputs: reference_of(layer, **inputs), layer, inputs)
    assert_same(gradients(layer, layer, inputs), truth, 1e-12)
    assert truth["preconditioner.parts.2.V"].abs().min() > 0
    one_by_one = inputs["h"]
    for part in layer.preconditioner.parts:
        single = copy_of(layer, refresh="step", **options(3)).double()
        single.steps, single.preconditioner = 1, part
        one_by_one = single(one_by_one)
    again = copy_of(layer, refresh="step", **options(3))
    assert_close(again(**inputs), one_by_one, 1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda z: pickle.loads(pickle.dumps(z))])
def test_copies_share_the_norm(copied):
    norm = nn.RMSNorm(WIDTH)
    layer = cem.derive(
        cem.energies.gated, dim=WIDTH, hidden=5, norm=norm, preconditioner=cem.NormJacobian(norm)
    )
    again = copied(layer)
    assert again.preconditioner.norm is again.norm and again.norm is not norm
    h = torch.randn(2, 3, WIDTH)
    assert torch.equal(again(h), layer(h))


@every
def test_one_graph_without_breaks(kind):
    layer = cem.derive(
        cem.energies.gated, dim=WIDTH, hidden=5, preconditioner=[kind, kind], steps=2
    )
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = {"h": torch.randn(2, 3, WIDTH)}
    found = gradients(compiled, layer, inputs)
    assert_same(found, gradients(layer, layer, inputs), 1e-6)


@norms
def test_one_graph_with_a_norm(name):
    norm = NORMS[name]()
    layer = cem.derive(
        cem.energies.gated, dim=WIDTH, hidden=5, norm=norm, preconditioner=cem.NormJacobian(norm)
    )
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = {"h": torch.randn(2, 3, WIDTH)}
    found = gradients(compiled, layer, inputs)
    assert_same(found, gradients(layer, layer, inputs), 1e-5)


SIZES = {"dim": WIDTH, "hidden": 5}
WRONG = {
    "a rank of none": (
        lambda: cem.DiagonalPlusLowRank(WIDTH, 0),
        "has a rank between 1 and 6: got 0; type `cem.DiagonalPlusLowRank\\(6, rank=4\\)`",
    ),
    "a rank above the width": (lambda: cem.DiagonalPlusLowRank(2, 3), "between 1 and 2: got 3"),
    "blocks that do not fit": (
        lambda: cem.BlockDiagonal(WIDTH, 4),
        "splits dim=6 into equal blocks: got blocks=4; type a divisor of 6",
    ),
    "no state": (
        lambda: cem.NormJacobian(nn.RMSNorm(WIDTH))(torch.zeros(WIDTH)),
        "depends on the state: got none",
    ),
    "another norm": (
        lambda: cem.derive(
            cem.energies.gated, preconditioner=cem.NormJacobian(nn.RMSNorm(WIDTH)), **SIZES
        ),
        "is that of the layer's own norm: got RMSNorm.*where the layer has Identity",
    ),
    "another number of steps": (
        lambda: cem.derive(cem.energies.gated, preconditioner=[cem.Diagonal] * 2, steps=3, **SIZES),
        "has one a step: got 2 of them and steps=3; type `steps=2`",
    ),
    "another width": (
        lambda: cem.derive(
            cem.energies.gated, preconditioner=cem.DiagonalPlusLowRank(7, 2), **SIZES
        ),
        r"has dim=7 and the state 6.*type `cem.DiagonalPlusLowRank\(6, rank=2\)`",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors(what):
    act, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        act()


def test_not_a_preconditioner():
    with pytest.raises(TypeError, match="`preconditioner` is a preconditioner: got Linear; type"):
        cem.derive(cem.energies.gated, preconditioner=nn.Linear(WIDTH, WIDTH), **SIZES)
