"""Update rules: the formula, the state they remember, learned step sizes."""

import copy

import pytest
import torch

import cem
from cem.testing import assert_close

UPDATES = [cem.GradientDescent(), cem.GradientDescent(0.25), cem.GradientDescent(0.25, learn=True)]
every = pytest.mark.parametrize("update", UPDATES, ids=repr)


@every
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_gradient_descent_is_its_formula(update, scale):
    h, gradient = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    moved, state = update.update(h, gradient, update.init(h), scale)
    assert state is None
    assert_close(moved, h - torch.as_tensor(update.step_size).item() * scale * gradient, 1e-6)


@every
def test_derivatives(update):
    update = copy.deepcopy(update).double()
    h, gradient = torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_()
    points = [h, gradient, *update.parameters()]

    def step(h, gradient, *step_size):
        return update.update(h, gradient, None, -0.7)[0]

    assert torch.autograd.gradcheck(step, [z.detach().clone().requires_grad_() for z in points[:2]])
    update.update(h, gradient, None, 2.0)[0].sum().backward()
    for parameter in update.parameters():
        assert_close(parameter.grad, -2.0 * gradient.sum().detach(), 1e-12)


@every
def test_the_state_keeps_its_dtype(update):
    h = torch.randn(3, 4, dtype=torch.bfloat16)
    assert update.update(h, h, update.init(h))[0].dtype == torch.bfloat16


def test_learned_step_sizes_are_parameters():
    assert not list(UPDATES[1].parameters())
    assert dict(UPDATES[2].named_parameters()).keys() == {"step_size"}
    assert repr(UPDATES[2]) == "GradientDescent(step_size=0.25, learn=True)"
    layer = cem.derive(cem.energies.gated, dim=4, hidden=3, update=UPDATES[2])
    assert "update.step_size" in layer.state_dict()


@pytest.mark.parametrize("step_size", [0, -1.0, float("nan")])
def test_a_step_size_is_positive(step_size):
    with pytest.raises(ValueError, match="needs a positive step size: got"):
        cem.GradientDescent(step_size)


def test_descent_on_a_quadratic():
    """h+ = (1 - eta) h on |h|^2 / 2, n times."""

    @cem.energy(h="dim")
    def bowl(h):
        return 0.5 * (h * h).sum()

    layer = cem.derive(bowl, dim=5, steps=4, update=cem.GradientDescent(0.3))
    h = torch.randn(2, 3, 5)
    assert_close(layer(h), 0.7**4 * h, 1e-6)
