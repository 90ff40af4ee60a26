"""Recursion: contexts that move, stopping early, activation checkpoints."""

import inspect

import pytest
import torch
from helpers import ENERGIES, Case, D, T, assert_same, gradients
from quadratics import quadratic_layer
from test_descent import BOTH, RULES, made
from torch import nn

import cem
from cem import energies
from cem.testing import assert_close, reference_of

every = pytest.mark.parametrize("rule", RULES)


@pytest.mark.parametrize("refresh", ["layer", "step"])
@every
def test_a_moving_context_is_its_definition(rule, refresh):
    layer = made(rule, None, nn.RMSNorm, refresh, moving=True)
    inputs = BOTH.inputs(lead=(1,))
    truth = gradients(lambda **inputs: reference_of(layer, **inputs), layer, inputs)
    assert_same(gradients(layer, layer, inputs), truth, 1e-9 if rule == "newton" else 1e-12)
    still = made(rule, None, nn.RMSNorm, refresh)
    assert (layer(**inputs) - still(**inputs)).abs().max() > 1e-3


def test_moving_steps_are_layers_on_top_of_each_other():
    layer = BOTH.derive(steps=3, moving=True, refresh="step")
    one = BOTH.derive()
    h = BOTH.inputs()["h"]
    assert_close(layer(h), one(one(one(h))), 1e-12)


def test_what_moves_is_not_computed_once():
    layer = Case(energies.interaction, ()).derive(steps=3, moving=True)
    assert "F.linear(x" in inspect.getsource(layer.lowering.gradient)
    assert "F.linear" not in inspect.getsource(layer.lowering.prepare)


@pytest.mark.parametrize("moving", [False, True])
def test_a_trace_of_a_moving_context(moving):
    """The energy after a step is taken at the context that the step saw."""
    layer = BOTH.derive(steps=2, moving=moving)
    h = BOTH.inputs()["h"]
    (found,) = cem.trace(layer, h)
    middle = found.states[1]
    context = middle if moving else h
    plain = BOTH.derive()
    for energy, state in ((found.before[1], middle), (found.after[1], found.states[2])):
        assert_close(energy, plain.energy(state, context=context, frozen=h), 1e-12)
    assert torch.equal(found.before[1], found.after[0]) == (not moving)


def test_what_cannot_move():
    with pytest.raises(ValueError, match="energy `gated_silu` has no context.*got moving=True"):
        Case(energies.gated, ()).derive(moving=True)
    narrow = next(case for case in ENERGIES if case.needs_context)
    with pytest.raises(ValueError, match="has a context of another width than the state"):
        narrow.derive(moving=True)
    layer = BOTH.derive(moving=True)
    h = BOTH.inputs()["h"]
    with pytest.raises(ValueError, match="moves its context.*got `context`; call it without"):
        layer(h, context=h)


# -- stopping -------------------------------------------------------------------------------------


def test_it_stops_when_the_mean_energy_stops_falling():
    """On w h^2 / 2 the energy after n steps is known: it falls by less than the tolerance first at n."""
    layer, _, _ = quadratic_layer(
        1, 1.0, 1.0, steps=50, update=cem.GradientDescent(0.5), tolerance=1e-3
    )
    h = torch.tensor([[[3.0], [1.0]]], dtype=torch.float64)
    energy = [float((h * 0.5**n).square().mean() / 2) for n in range(51)]
    expected = next(n for n in range(1, 51) if energy[n - 1] - energy[n] <= 1e-3)
    assert_close(layer(h), h * 0.5**expected, 1e-12)
    assert layer.steps_taken == expected < 50
    (found,) = cem.trace(layer, h)
    assert len(found.before) == len(found.after) == expected


@pytest.mark.parametrize(
    "options", [{}, {"refresh": "step"}, {"moving": True}, {"checkpoint": True}]
)
@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if not getattr(RULES[rule](), "per_step", False)]
)
def test_a_stopped_layer_is_one_of_fewer_steps(rule, options):
    """In its output and in every gradient."""
    shared = {"update": RULES[rule](), "norm": nn.RMSNorm, **options}
    layer = BOTH.derive(steps=40, tolerance=0.5, **shared).double()
    h = BOTH.inputs()
    found = gradients(layer, layer, h)
    assert 1 < layer.steps_taken < 40
    shorter = BOTH.derive(steps=layer.steps_taken, **shared).double()
    assert_same(found, gradients(shorter, shorter, h), 1e-12)
    with torch.no_grad():
        assert torch.equal(layer(**h), found["output"])


def test_stopping_with_a_mask_that_only_energies_need():
    layer = Case(energies.interaction, ()).derive(steps=30, tolerance=1e-2)
    h = torch.randn(2, T, D, dtype=torch.float64)
    visible = torch.rand(2, T, T) < 0.7
    layer(h, visible=visible)
    taken = layer.steps_taken
    assert_close(
        layer(h, visible=visible),
        Case(energies.interaction, ()).derive(steps=taken)(h, visible=visible),
        1e-12,
    )


def test_all_steps_are_taken_without_a_tolerance():
    layer = BOTH.derive(steps=4)
    layer(**BOTH.inputs())
    assert layer.steps_taken == 4


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_a_tolerance_is_not_negative(tolerance):
    with pytest.raises(
        ValueError, match="`tolerance` is a fall of the mean energy, at least 0: got"
    ):
        BOTH.derive(tolerance=tolerance)


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["layer", "step"])
@every
def test_the_gradients_of_checkpoints_are_the_same_bits(rule, refresh):
    plain = made(rule, None, nn.RMSNorm, refresh)
    layer = made(rule, None, nn.RMSNorm, refresh, checkpoint=True)
    inputs = BOTH.inputs()
    found, truth = gradients(layer, layer, inputs), gradients(plain, plain, inputs)
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def kept_bytes(layer, h):
    """The bytes that autograd keeps for the backward pass, each storage once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(h)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("refresh", ["layer", "step"])
def test_checkpoints_keep_one_state_a_step(refresh):
    """With 8 more steps: 8 more states, against all that the steps compute."""
    h = torch.randn(2, 64, D, dtype=torch.float64, requires_grad=True)
    kept = {}
    for checkpoint in (False, True):
        for steps in (4, 12):
            layer = BOTH.derive(
                steps=steps, refresh=refresh, norm=nn.RMSNorm, checkpoint=checkpoint
            )
            kept[checkpoint, steps] = kept_bytes(layer.double(), h)
    grown = {c: kept[c, 12] - kept[c, 4] for c in (False, True)}
    assert grown[True] <= 8 * h.nbytes
    assert grown[False] > 4 * grown[True]


def test_checkpoints_in_one_graph_without_breaks():
    layer = BOTH.derive(steps=3, checkpoint=True, update=cem.Momentum(0.2, 0.5))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = BOTH.inputs()
    assert_same(gradients(compiled, layer, inputs), gradients(layer, layer, inputs), 1e-12)


def test_what_cannot_be_checkpointed():
    message = "is lowered to autograd, which cannot be checkpointed: asked for with lowering"
    with pytest.raises(ValueError, match=message):
        BOTH.derive(checkpoint=True, lowering="autograd")
