"""FixedPoint: implicit gradients are those of many unrolled steps, at the memory of one."""

import copy

import pytest
import torch
from helpers import D, T, assert_same, gradients
from quadratics import quadratic_layer
from torch import nn

import cem
from cem.testing import assert_close


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim", U="hidden dim")
def repelled(h, x, *, Q, K, U):
    """Strongly convex with an attention term and a frozen gate: curvature between 1 and about 3."""
    scores = torch.einsum("ard,d,are,se->as", Q, h, K, x)
    gate = torch.sigmoid(U @ h.detach())
    return (
        0.5 * (h * h).sum()
        + torch.logsumexp(0.3 * scores, dim=-1).sum()
        + 0.2 * (gate * (U @ h).square()).sum()
        - h.sum()
    )


def made(steps=400, update=None, energy=repelled, **options):
    layer = cem.derive(
        energy,
        dim=D,
        heads=2,
        rank=3,
        hidden=5,
        steps=steps,
        update=update or cem.GradientDescent(0.4),
        dtype=torch.float64,
        **options,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ("Q", "K", "U"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif name.startswith("preconditioner"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return layer


def inputs():
    return {"h": torch.randn(2, T, D, dtype=torch.float64)}


RULES = {
    "descent": cem.GradientDescent(0.4),
    "momentum": cem.Momentum(0.4, 0.4),
    "nesterov": cem.Nesterov(0.4, 0.3),
    "newton": cem.Newton(1e-3, 12),
    "proximal": cem.Proximal(0.4, cem.prox.l1(0.3)),
    "box": cem.Proximal(0.4, cem.prox.box(-0.5, 0.9)),
}


@pytest.mark.parametrize(
    ("rule", "preconditioner"),
    # Newton takes no preconditioner: its curvature is one.
    [
        (rule, P)
        for rule in RULES
        for P in (None, cem.Diagonal)
        if (rule, P) != ("newton", cem.Diagonal)
    ],
)
def test_the_gradients_of_many_steps(rule, preconditioner):
    steps = 40 if rule == "newton" else 400
    layer = made(steps, update=copy.deepcopy(RULES[rule]), preconditioner=preconditioner)
    assert layer.energy_function.curvature == "convex"
    model = cem.FixedPoint(layer, tolerance=1e-13)
    z = inputs()
    found, truth = gradients(model, layer, z), gradients(layer, layer, z)
    assert model.steps_taken < layer.steps and model.moved <= 1e-13
    # What only says how to get there has no effect on the fixed point of a smooth energy.
    smooth = not isinstance(layer.update, cem.Proximal)
    own = {name for name in truth if smooth and name.startswith("preconditioner")}
    truth = {name: value for name, value in truth.items() if name not in own}
    assert_same(found, truth, 1e-8, atol=1e-11)
    assert all(found[name].abs().max() > 1e-3 for name in ("h", "Q", "K", "U"))
    for name in own:
        assert found[name].abs().max() < 1e-10


def test_gates_of_every_step():
    """With refreshed gates dF/dh is not symmetric."""
    layer = made(refresh="step")
    model = cem.FixedPoint(layer, tolerance=1e-13)
    z = inputs()
    assert_same(gradients(model, layer, z), gradients(layer, layer, z), 1e-8)


def test_a_norm_that_can_be_inverted():
    class Stretched(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.linspace(0.8, 1.2, D, dtype=torch.float64))

        def forward(self, h):
            return torch.asinh(h) * self.by

    layer = made(norm=Stretched())
    z = inputs()
    found = gradients(cem.FixedPoint(layer, tolerance=1e-13), layer, z)
    assert_same(found, gradients(layer, layer, z), 1e-8)


def test_gradcheck_for_the_context():
    layer = made(causal=False)
    model = cem.FixedPoint(layer, tolerance=1e-12)
    h = torch.randn(1, 2, D, dtype=torch.float64)
    x = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(h, context=x), (x,), fast_mode=True)


def test_the_known_minimum():
    layer, _, lowest = quadratic_layer(5, shift=True, steps=500, update=cem.GradientDescent(1.0))
    model = cem.FixedPoint(layer, tolerance=1e-12)
    assert_close(model(torch.randn(2, 3, 5, dtype=torch.float64)), lowest.expand(2, 3, 5), 1e-10)


def test_memory_does_not_grow_with_the_steps():
    from test_recursion import kept_bytes

    h = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    layer = made()
    kept, taken = [], []
    for tolerance in (1e-2, 1e-12):
        model = cem.FixedPoint(layer, tolerance)
        kept.append(kept_bytes(model, h))
        taken.append(model.steps_taken)
    assert taken[1] > 3 * taken[0] and kept[1] == kept[0]
    assert kept[0] < 0.3 * kept_bytes(made(steps=20), h)


def test_without_gradients_and_in_a_trace():
    layer = made()
    model = cem.FixedPoint(layer, tolerance=1e-8)
    h = inputs()["h"]
    with torch.no_grad():
        assert torch.equal(model(h), model(h.clone().requires_grad_()).detach())
    (found,) = cem.trace(model, h)
    assert len(found.before) == model.steps_taken
    assert (found.drop >= -1e-12).all()
    assert_close(found.states[-1], model(h), 1e-12)


def test_leading_axes_copies_and_dtype():
    model = cem.FixedPoint(made(), tolerance=1e-10)
    h = torch.randn(2, 3, T, D, dtype=torch.float64)
    assert_close(model(h)[1], model(h[1]), 1e-8)
    assert torch.equal(copy.deepcopy(model)(h), model(h))
    assert repr(model).startswith("FixedPoint(\n  tolerance=1e-10")
    single = cem.FixedPoint(made(), tolerance=1e-3).bfloat16()
    assert single(h.bfloat16()).dtype == torch.bfloat16


WRONG = {
    "needs a positive tolerance: got 0": lambda: cem.FixedPoint(made(), 0),
    "takes up to `steps` steps: layer `repelled` has 1": lambda: cem.FixedPoint(made(1)),
    "has moving=True; type `moving=False`": lambda: cem.FixedPoint(made(moving=True)),
    "which forgets the length of h; type `norm=None`": lambda: cem.FixedPoint(
        made(norm=nn.RMSNorm(D))
    ),
    "repeats one step: layer `repelled` has step sizes": lambda: cem.FixedPoint(
        made(2, cem.GradientDescent([0.1, 0.2]))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()
