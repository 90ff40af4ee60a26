"""Update rules: the formula, the state they remember, learned step sizes, rates on quadratics."""

import copy
import math

import pytest
import torch
from quadratics import quadratic_layer

import cem
from cem.testing import assert_close

UPDATES = [
    cem.GradientDescent(),
    cem.GradientDescent(0.25),
    cem.GradientDescent(0.25, learn=True),
    cem.Momentum(0.25, 0.5),
    cem.Momentum(0.25, 0.5, learn=True),
    cem.Nesterov(0.25, 0.5),
]
every = pytest.mark.parametrize("update", UPDATES, ids=repr)


@every
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_step_is_its_formula(update, scale):
    h, gradient, memory = torch.randn(3, 2, 5, 7)
    moved, state = update.update(h, gradient, update.init(h), scale)
    step = torch.as_tensor(update.step_size).item() * scale * gradient
    assert_close(moved, h - step, 1e-6)
    if not update.remembers:
        assert state is None
        return
    assert_close(state, -step, 1e-6)
    moved, state = update.update(h, gradient, memory, scale)
    assert_close(state, 0.5 * memory - step, 1e-6)
    assert_close(moved, h + state, 1e-6)


@every
def test_where_a_rule_looks(update):
    h, memory = torch.randn(2, 5, 7)
    if isinstance(update, cem.Nesterov):
        assert_close(update.look(h, memory), h + 0.5 * memory, 1e-6)
    else:
        assert update.look(h, memory) is h


@every
def test_derivatives(update):
    update = copy.deepcopy(update).double()
    points = torch.randn(3, 2, 3, dtype=torch.float64)
    names = [name for name, _ in update.named_parameters()]

    def step(h, gradient, memory, *values):
        given = (update.look(h, memory), gradient, memory if update.remembers else None, -0.7)
        held = dict(zip(names, values, strict=True))
        return torch.func.functional_call(
            _Move(update), {f"rule.{n}": v for n, v in held.items()}, given
        )

    inputs = [z.detach().clone().requires_grad_() for z in (*points, *update.parameters())]
    assert torch.autograd.gradcheck(step, inputs)


class _Move(torch.nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, *inputs):
        return self.rule.update(*inputs)[0]


@every
def test_the_state_keeps_its_dtype(update):
    h = torch.randn(3, 4, dtype=torch.bfloat16)
    state = update.init(h)
    moved, state = update.update(update.look(h, state), h, state)
    assert moved.dtype == torch.bfloat16 and (state is None or state.dtype == torch.bfloat16)


def test_learned_numbers_are_parameters():
    assert not list(UPDATES[1].parameters())
    assert dict(UPDATES[2].named_parameters()).keys() == {"step_size"}
    assert repr(UPDATES[2]) == "GradientDescent(step_size=0.25, learn=True)"
    assert dict(UPDATES[4].named_parameters()).keys() == {"step_size", "momentum"}
    assert repr(UPDATES[4]) == "Momentum(step_size=0.25, momentum=0.5, learn=True)"
    layer = cem.derive(cem.energies.gated, dim=4, hidden=3, update=UPDATES[2])
    assert "update.step_size" in layer.state_dict()


@pytest.mark.parametrize("step_size", [0, -1.0, float("nan"), (), (0.5, 0.0)])
@pytest.mark.parametrize("kind", [cem.GradientDescent, cem.Momentum, cem.Nesterov])
def test_a_step_size_is_positive(kind, step_size):
    with pytest.raises(ValueError, match=f"`{kind.__name__}` needs a positive step size: got"):
        kind(step_size)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_is_a_share(momentum):
    message = "`Nesterov` needs a momentum of at least 0 and below 1: got"
    with pytest.raises(ValueError, match=message):
        cem.Nesterov(1.0, momentum)


# -- one step size a step -------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("kind", [cem.GradientDescent, cem.Momentum])
def test_one_step_size_a_step(kind, learn):
    rule = kind([0.5, 0.25, 0.125], learn=learn)
    layer, spectrum, _ = quadratic_layer(3, update=rule, steps=3)
    h = torch.randn(2, 5, 3, dtype=torch.float64)
    expected, memory = h, torch.zeros_like(h)
    for step_size in (0.5, 0.25, 0.125):
        memory = (0.9 if kind is cem.Momentum else 0.0) * memory - step_size * spectrum * expected
        expected = expected + memory
    assert_close(layer(h), expected, 1e-7 if learn else 1e-12)
    assert repr(rule).startswith(f"{kind.__name__}(step_size=(0.5, 0.25, 0.125)")
    if learn:
        layer(h).square().sum().backward()
        assert rule.step_size.shape == (3,) and (rule.step_size.grad != 0).all()


def test_as_many_step_sizes_as_steps():
    message = (
        "`GradientDescent` has one step size a step: got 2 of them and steps=3; type `steps=2`"
    )
    with pytest.raises(ValueError, match=message):
        quadratic_layer(3, update=cem.GradientDescent([0.5, 0.25]), steps=3)


# -- memory from layer to layer -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [cem.Momentum, cem.Nesterov])
def test_memory_carried_over_is_one_long_descent(kind):
    """Two layers of 2 and 3 steps that hand the memory on are one layer of 5 steps."""
    rule = kind(0.2, 0.8)
    first, second, whole = (quadratic_layer(4, update=rule, steps=n)[0] for n in (2, 3, 5))
    h = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    middle, memory = first(h, memory=rule.init(h))
    assert memory.shape == h.shape and memory.abs().min() > 0
    last, _ = second(middle, memory=memory)
    assert_close(last, whole(h), 1e-12)
    assert (last - second(middle)).abs().max() > 1e-3


def test_memory_that_does_not_fit():
    h = torch.randn(2, 5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="has no memory: its update rule is GradientDescent"):
        quadratic_layer(4)[0](h, memory=h)
    layer, *_ = quadratic_layer(4, update=cem.Momentum())
    message = r"must have the shape of the state: got \(5, 4\) and \(2, 5, 4\)"
    with pytest.raises(ValueError, match=message):
        layer(h, memory=h[0])


# -- known answers on quadratics ------------------------------------------------------------------


def test_descent_on_a_quadratic():
    """h+ = (1 - eta w) h on sum w h^2 / 2, n times."""
    layer, spectrum, _ = quadratic_layer(5, steps=4, update=cem.GradientDescent(0.3))
    h = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_close(layer(h), (1 - 0.3 * spectrum) ** 4 * h, 1e-12)


def test_gradient_descent_is_the_flow_to_first_order():
    """n steps of size 1/n against exp(-w) h: the error falls with 1/n."""
    h, errors = torch.randn(1, 3, 5, dtype=torch.float64), []
    for steps in (32, 64, 128):
        layer, spectrum, _ = quadratic_layer(
            5, steps=steps, update=cem.GradientDescent(1 / steps), high=3.0
        )
        errors.append(float((layer(h).detach() - (-spectrum).exp() * h).abs().max()))
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(0.95 < slope < 1.05 for slope in slopes)


LOW, HIGH = 0.01, 1.0
ROOTS = (HIGH**0.5 - LOW**0.5) / (HIGH**0.5 + LOW**0.5)


def distances(update, steps):
    """|h| after each number of steps, the minimiser being 0."""
    h = torch.ones(1, 1, 9, dtype=torch.float64)
    layers = [quadratic_layer(9, LOW, HIGH, steps=n, update=update)[0] for n in steps]
    with torch.no_grad():
        return [float(layer(h).norm()) for layer in layers]


def test_the_rate_of_gradient_descent():
    """At the best step size 2 / (L + mu): (L - mu) / (L + mu) a step, exactly at the extremes."""
    near, far = distances(cem.GradientDescent(2 / (HIGH + LOW)), (100, 200))
    assert (far / near) ** (1 / 100) == pytest.approx((HIGH - LOW) / (HIGH + LOW), rel=1e-3)


def test_the_rate_of_heavy_ball():
    """At the best parameters: (sqrt L - sqrt mu) / (sqrt L + sqrt mu) a step, up to a factor n."""
    step_size = 4 / (HIGH**0.5 + LOW**0.5) ** 2
    near, far = distances(cem.Momentum(step_size, ROOTS**2), (100, 200))
    # The double root at both ends gives n ROOTS^n: a factor 2 between 100 and 200 steps.
    assert (far / near / 2) ** (1 / 100) == pytest.approx(ROOTS, rel=2e-3)


def test_the_rate_of_nesterov():
    """E after n steps is at most (1 - sqrt(mu/L))^n (E_0 + mu |h_0|^2 / 2)."""
    steps = (1, 5, 20, 80)
    rule = cem.Nesterov(1 / HIGH, ROOTS)
    h = torch.randn(4, 1, 9, dtype=torch.float64)
    start, *_ = quadratic_layer(9, LOW, HIGH)
    bound = start.energy(h) + LOW * h.square().sum(-1) / 2
    for n in steps:
        layer, *_ = quadratic_layer(9, LOW, HIGH, steps=n, update=rule)
        assert (start.energy(layer(h)) <= (1 - (LOW / HIGH) ** 0.5) ** n * bound).all()
    slow, *_ = quadratic_layer(9, LOW, HIGH, steps=80, update=cem.GradientDescent(1 / HIGH))
    assert (start.energy(layer(h)) < 0.01 * start.energy(slow(h))).all()


@pytest.mark.parametrize("update", UPDATES, ids=repr)
def test_the_fixed_point_is_the_minimiser(update):
    layer, _, lowest = quadratic_layer(
        5, 0.3, 1.0, steps=300, update=copy.deepcopy(update), shift=True
    )
    h = torch.randn(1, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        assert_close(layer(h), lowest.expand_as(h), 1e-10)


def test_a_layer_calls_its_rule_as_a_module():
    """What offloads parameters brings them back in a hook on the module that holds them."""
    layer, *_ = quadratic_layer(3, update=cem.GradientDescent(0.25, learn=True), steps=2)
    called = []
    layer.update.register_forward_pre_hook(lambda rule, _: called.append(rule))
    layer(torch.ones(1, 1, 3, dtype=torch.float64))
    assert called == [layer.update] * 2
