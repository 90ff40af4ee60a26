"""cem.trace: energies before and after every step, and a model left as it was."""

import inspect

import numpy as np
import pytest
import torch
from helpers import ENERGIES, UNTRANSLATABLE, B, Case, D, T, by_name
from torch import nn

import cem
from cem import energies
from cem.testing import assert_close, reference_energy
from cem.testing.reference import values_of


class Block(nn.Module):
    """Two energy layers, the second called twice."""

    def __init__(self):
        super().__init__()
        self.attention = Case(energies.interaction, ()).derive(norm=nn.RMSNorm)
        self.inner = nn.ModuleList([Case(energies.gated, ()).derive(steps=2)])

    def forward(self, h):
        h = self.attention(h)
        return self.inner[0](self.inner[0](h))


@pytest.fixture
def h():
    return torch.randn(B, T, D, dtype=torch.float64)


@pytest.mark.parametrize("case", [*ENERGIES, *UNTRANSLATABLE], ids=by_name)
@pytest.mark.parametrize("refresh", ["layer", "step"])
def test_energies_are_those_of_the_definition(case, refresh):
    """Before and after each step, at the context and the gates that the step saw."""
    layer = case.derive(steps=2, refresh=refresh)
    inputs = case.inputs()
    (found,) = cem.trace(layer, **inputs)
    assert found.before.shape == found.after.shape == (2, B, T)
    h = inputs.pop("h")
    if case.has_context:
        inputs.setdefault("context", h)
    one = case.derive(refresh=refresh)
    values = values_of(layer)
    middle = one(h, **inputs)
    states = [h, middle, layer(h, **inputs)]
    for step in range(2):
        frozen = h if refresh == "layer" else states[step]
        fixed = {"frozen": frozen, **inputs, **values}
        before = reference_energy(case.energy, states[step], **fixed)
        after = reference_energy(case.energy, states[step + 1], **fixed)
        assert_close(found.before[step], before, 1e-12)
        assert_close(found.after[step], after, 1e-12)
        assert_close(found.states[step], states[step], 1e-12)
    assert_close(found.drop, found.before - found.after, 1e-12)


def test_a_trace_computes_what_the_model_does(h):
    model = Block()
    seen = []
    hook = model.inner[0].register_forward_hook(lambda *inputs: seen.append(inputs[-1]))
    cem.trace(model, h)
    hook.remove()
    assert_close(seen[-1], model(h), 1e-12)


def test_nested_layers_in_the_order_of_their_calls(h):
    trace = cem.trace(Block(), h)
    assert [layer.name for layer in trace] == ["attention", "inner.0", "inner.0"]
    assert [layer.energy_name for layer in trace] == ["interaction", "gated_silu", "gated_silu"]
    assert len(trace) == 3 and trace["inner.0"] is trace[1]
    assert [layer.before.shape[0] for layer in trace] == [1, 2, 2]
    assert not torch.equal(trace[1].before, trace[2].before)
    with pytest.raises(KeyError, match="no layer `mlp` in this trace: its layers are attention"):
        trace["mlp"]


def test_the_model_is_left_as_it_was(h):
    model = Block()
    before = model(h)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    cem.trace(model, h)
    for layer in (model.attention, model.inner[0]):
        assert "begin" not in vars(layer)
        assert inspect.ismethod(layer.begin)
    assert torch.equal(model(h), before)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_the_model_is_left_as_it_was_after_an_error(h):
    model = Block()
    with pytest.raises(ValueError, match="takes a state of shape"):
        cem.trace(model, h[..., :-1])
    assert "begin" not in vars(model.attention)
    assert model(h).shape == h.shape


def test_nothing_is_tracked(h):
    (found,) = cem.trace(Case(energies.memory, ()).derive(), h.requires_grad_())
    assert not found.before.requires_grad and not found.states.requires_grad
    assert torch.is_grad_enabled()


def test_a_concave_energy_falls_for_every_token(h):
    (found,) = cem.trace(Case(energies.interaction, ()).derive(steps=3), h)
    assert (found.drop > 0).all() and found.share_down == 1.0


def test_without_energies_after(h):
    trace = cem.trace(Block(), h, after=False, states=False)
    assert trace[0].after is None and trace[0].states is None
    assert trace.numpy()["attention"]["after"] is None
    with pytest.raises(ValueError, match="no energies after each step: got after=False"):
        _ = trace[0].drop


def test_numpy_and_table(h):
    trace = cem.trace(Block(), h)
    arrays = trace.numpy()["attention"]
    assert isinstance(arrays["before"], np.ndarray) and arrays["before"].shape == (1, B, T)
    lines = trace.table().splitlines()
    assert lines[0].split() == ["layer", "step", "before", "after", "median", "drop", "down"]
    assert len(lines) == 1 + 1 + 2 + 2
    assert lines[1].split()[:2] == ["attention", "1"]
    assert float(lines[1].split()[2]) == pytest.approx(trace[0].before.mean().item(), rel=1e-3)
    assert lines[1].split()[-1] == f"{trace[0].share_down:.0%}"


@pytest.mark.parametrize("case", [ENERGIES[0], ENERGIES[3], UNTRANSLATABLE[0]], ids=by_name)
def test_energies_at_other_points(case, h):
    layer = case.derive(norm=nn.RMSNorm).double()
    (found,) = cem.trace(layer, h)
    points = torch.randn(5, D, dtype=torch.float64)
    for token in (0, 3, -1):
        own = found.states[0][1, token]
        at = found.energy_at(torch.cat([own[None], points]), batch=1, token=token)
        assert at.shape == (6,)
        assert_close(at[0], found.before[0, 1, token], 1e-12)
        g = layer.norm(h)[1:2]
        moved = g.clone()
        moved[0, token] = points[2]
        context = {"context": g} if case.has_context else {}
        whole = reference_energy(case.energy, moved, frozen=g, **context, **values_of(layer))
        assert_close(at[3], whole[0, token], 1e-12)


def test_masks_contexts_and_leading_axes():
    case = Case(energies.interaction, ())
    layer = case.derive(causal=False)
    inputs = case.inputs(context=True, lead=(2, 3))
    inputs["visible"] = torch.rand(2, 3, T, 9) < 0.4
    (found,) = cem.trace(layer, **inputs)
    truth = reference_energy(case.energy, causal=False, **inputs, **values_of(layer))
    assert_close(found.before[0].reshape(2, 3, T), truth, 1e-12)
    for batch in (3, -3):
        at = found.energy_at(inputs["h"][1, 0, 2:3], batch=batch, token=2)
        assert_close(at[0], truth[1, 0, 2], 1e-12)


def test_nan_is_traced_and_shown(h):
    h[0, 2] = float("nan")
    trace = cem.trace(Case(energies.gated, ()).derive(), h)
    assert trace[0].before[0, 0].isnan().tolist() == [n == 2 for n in range(T)]
    assert "nan" not in trace.table()
    assert trace[0].share_down < 1


def test_a_model_without_energy_layers(h):
    with pytest.raises(ValueError, match=r"found no energy layer in Linear.*`cem.derive\("):
        cem.trace(nn.Linear(D, D), h)


def test_a_model_that_calls_none(h):
    class Idle(Block):
        def forward(self, h):
            return h

    with pytest.raises(ValueError, match="saw no energy layer run: Idle has attention, inner.0"):
        cem.trace(Idle(), h)
