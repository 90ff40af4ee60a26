"""EnergyLayer: steps, frozen states, norms, step sizes, and being a plain citizen of torch."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from helpers import (
    CONTEXT,
    ENERGIES,
    UNTRANSLATABLE,
    Case,
    D,
    S,
    T,
    assert_same,
    by_name,
    copy_of,
    drawn,
    gradients,
    looped,
    untranslatable_gate,
)
from torch import nn

import cem
from cem import energies
from cem.testing import assert_close, reference_of, reference_update

FEW = [
    case
    for case in ENERGIES
    if case.name in ("interaction", "gated_silu", "narrow_values", "two_sided_gated_relu", "mean")
]
COMPILED = [
    case
    for case in ENERGIES
    if case.name in ("interaction", "gated_silu", "gaussian", "soft_capped", "mixture", "memory")
]
few = pytest.mark.parametrize("case", FEW, ids=by_name)
untranslatable = pytest.mark.parametrize("case", UNTRANSLATABLE, ids=by_name)


def reference(layer):
    return lambda **inputs: reference_of(layer, **inputs)


@few
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("refresh", ["layer", "step"])
@pytest.mark.parametrize("norm", [None, nn.RMSNorm, nn.LayerNorm])
def test_steps_refresh_and_norm(case, steps, refresh, norm):
    options = {"steps": steps, "refresh": refresh, "norm": norm}
    layer = case.derive(**options).double()
    inputs = case.inputs()
    found = gradients(layer, layer, inputs)
    assert_same(found, gradients(reference(layer), layer, inputs), 1e-11)
    slow = copy_of(layer, lowering="autograd", **options).double()
    assert_same(found, gradients(slow, slow, inputs), 1e-11)


def test_refresh_matters():
    layers = [Case(energies.gated, ()).derive(steps=3, refresh=r) for r in ("layer", "step")]
    h = torch.randn(1, T, D, dtype=torch.float64)
    assert not torch.allclose(layers[0](h), layers[1](h))


def test_a_norm_may_be_a_module_of_any_kind():
    class Halved(nn.Module):
        def forward(self, h):
            return torch.tanh(h / 2)

    layer = Case(energies.interaction, ()).derive(norm=Halved())
    inputs = {"h": torch.randn(2, T, D, dtype=torch.float64)}
    inputs["context"] = torch.randn(2, S, D, dtype=torch.float64)
    assert_same(gradients(layer, layer, inputs), gradients(reference(layer), layer, inputs), 1e-12)


def test_what_the_context_alone_decides_is_computed_once():
    layer = Case(energies.interaction, ()).derive(steps=3)
    prepared = inspect.getsource(layer.lowering.prepare)
    repeated = inspect.getsource(layer.lowering.gradient)
    assert "F.linear(x" in prepared and "F.linear(h" not in prepared
    assert "F.linear(h" in repeated and "F.linear(x" not in repeated
    once = inspect.getsource(Case(energies.interaction, ()).derive().lowering.prepare)
    assert "F.linear" not in once


def test_a_gate_that_is_frozen_for_the_layer_is_computed_once():
    def prepared(refresh):
        layer = Case(energies.gated, ()).derive(steps=3, refresh=refresh)
        return inspect.getsource(layer.lowering.prepare)

    assert "silu" in prepared("layer")
    assert "silu" not in prepared("step")


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("preconditioner", [None, cem.ScaledIdentity, cem.Diagonal])
def test_step_sizes_and_preconditioners(learn, preconditioner):
    case = Case(energies.interaction + 0.5 * energies.gated, ())
    options = {
        "update": cem.GradientDescent(0.3, learn=learn),
        "preconditioner": preconditioner,
        "steps": 2,
    }
    layer = case.derive(**options)
    if preconditioner is not None:
        nn.init.normal_(layer.preconditioner.d)
    found = gradients(layer, layer, case.inputs())
    assert ("update.step_size" in found) == learn
    assert ("preconditioner.d" in found) == (preconditioner is not None)
    assert_same(found, gradients(reference(layer), layer, case.inputs()), 1e-12)


def test_learned_scalars():
    case = Case(energies.interaction, ())
    layer = case.derive(learn="beta", beta=0.7)
    assert_close(layer.log_beta.exp(), torch.tensor([0.7]), 1e-7)
    assert layer.scalars == {"beta": pytest.approx(0.7)}
    found = gradients(layer, layer, case.inputs())
    assert found["log_beta"] != 0
    assert_same(found, gradients(reference(layer), layer, case.inputs()), 1e-12)
    slow = copy_of(layer, lowering="autograd", learn="beta", beta=0.7)
    assert_same(found, gradients(slow, slow, case.inputs()), 1e-12)
    assert "log_beta" not in dict(case.derive().named_parameters())


def test_a_learned_scalar_without_a_sign_is_its_own_parameter():
    @cem.energy(h="dim")
    def bowl(h, *, depth=0.0):
        return 0.5 * depth * (h * h).sum()

    layer = cem.derive(bowl, dim=D, learn=["depth"], dtype=torch.float64)
    assert dict(layer.named_parameters()).keys() == {"depth"}
    with torch.no_grad():
        layer.depth.fill_(0.25)
    h = torch.randn(T, D, dtype=torch.float64)
    assert_close(layer(h), 0.75 * h, 1e-12)


def test_with_the_defaults_the_layer_is_h_minus_the_gradient():
    layer = Case(energies.memory, ()).derive()
    h = torch.randn(T, D, dtype=torch.float64)
    weights = torch.softmax(D**-0.5 * h @ layer.U.T, -1)
    assert_close(layer(h), weights @ layer.U, 1e-12)


def test_training_flows_through_frozen_but_not_through_a_literal_detach():
    """The gate of plain autograd with h.detach() is blind to what made h."""
    layer = Case(energies.gated, ()).derive()
    inputs = {"h": torch.randn(1, T, D, dtype=torch.float64)}
    found = gradients(layer, layer, inputs)
    truth = gradients(reference(layer), layer, inputs)
    assert_same(found, truth, 1e-12)

    def literal(h):
        gate = nn.functional.silu(h.detach() @ layer.G.T)
        energy = -0.5 * (gate * (h @ layer.U.T).square()).sum()
        return h - torch.autograd.grad(energy, h, create_graph=True)[0]

    cut = gradients(literal, layer, inputs)
    assert_close(cut["output"], truth["output"], 1e-12)
    assert (cut["h"] - truth["h"]).abs().max() > 0.1


@untranslatable
def test_untranslatable_energies_are_right_through_autograd(case):
    layer = case.derive()
    assert layer.lowering.kind == "autograd" and layer.lowering.kernels == ("autograd",)
    (reason,) = layer.lowering.reasons
    assert case.name in reason and ", line " in reason
    found = gradients(layer, layer, case.inputs())
    assert_same(found, gradients(reference(layer), layer, case.inputs()), 1e-12)
    inputs = case.inputs()
    assert_close(layer.energy(**inputs), layer.energy(inputs["h"], frozen=inputs["h"]), 1e-12)


def test_a_masked_loop_is_the_interaction_energy():
    slow = Case(looped, ()).derive()
    fast = Case(energies.interaction, ()).derive()
    visible = torch.rand(2, T, S) < 0.5
    inputs = Case(looped, ()).inputs(context=True)
    found = gradients(slow, slow, inputs, visible=visible)
    assert_same(found, gradients(fast, fast, inputs, visible=visible), 1e-12)


def test_a_detach_in_an_untranslatable_energy_is_frozen():
    layer = Case(untranslatable_gate, ()).derive(steps=2)
    inputs = {"h": torch.randn(1, T, D, dtype=torch.float64)}
    found = gradients(layer, layer, inputs)
    assert found["G"].abs().max() > 0.01
    assert_same(found, gradients(reference(layer), layer, inputs), 1e-12)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (1, 2, 2)])
@few
def test_leading_axes(case, lead):
    layer = case.derive()
    inputs = case.inputs(lead=lead)
    assert layer(**inputs).shape == (*lead, T, D)
    assert layer.energy(**inputs).shape == (*lead, T)
    flat = {name: z.reshape(-1, *z.shape[-2:]) for name, z in inputs.items()}
    assert_close(layer(**inputs).reshape(-1, T, D), layer(**flat), 1e-12)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("per_token", [False, True])
def test_masks_with_leading_axes(lead, per_token):
    case = Case(energies.interaction, ())
    layer = case.derive(causal=False)
    inputs = case.inputs(context=True, lead=lead)
    shape = (*lead, T, S) if per_token else (*lead, S)
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    inputs["visible"] = visible
    assert_close(layer(**inputs), reference_of(layer, **inputs), 1e-12)
    whole = visible.reshape(*lead, -1, S).expand(*lead, T, S)
    assert torch.equal(layer(**inputs), layer(**inputs | {"visible": whole}))


def test_a_prefix_is_run_as_in_the_whole():
    """The last tokens with the whole as context: what a decoder does."""
    layer = Case(energies.interaction, ()).derive()
    h = torch.randn(2, T, D, dtype=torch.float64)
    assert_close(layer(h[:, -2:], context=h), layer(h)[:, -2:], 1e-12)


@few
def test_state_dict_round_trip(case):
    layer, other = case.derive(), case.derive()
    assert set(layer.state_dict()) == {str(p.name) for p in case.energy.parameters}
    nn.init.normal_(next(other.parameters()))
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(layer(**case.inputs()), other(**case.inputs()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda z: pickle.loads(pickle.dumps(z))])
@pytest.mark.parametrize("case", [*FEW, *UNTRANSLATABLE], ids=by_name)
def test_copies(case, copied):
    layer = case.derive(
        steps=2, norm=nn.RMSNorm, update=cem.GradientDescent(0.5, learn=True)
    ).double()
    again = copied(layer)
    assert torch.equal(layer(**case.inputs()), again(**case.inputs()))
    assert again.code == layer.code
    with torch.no_grad():
        next(again.parameters()).zero_()
    assert next(layer.parameters()).abs().max() > 0


@few
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_call_and_vmap_over_models(case):
    layers = [drawn(case.derive(), seed) for seed in range(3)]
    stacked, _ = torch.func.stack_module_state(layers)
    inputs = case.inputs()

    def call(values):
        return torch.func.functional_call(layers[0], values, kwargs=inputs)

    together = torch.func.vmap(call)(stacked)
    for one, layer in zip(together, layers, strict=True):
        assert_close(one, layer(**inputs), 1e-12)


def test_dtype_device_and_meta():
    layer = cem.derive(energies.interaction, dim=D, heads=2, rank=5, device="meta")
    assert layer.Q.is_meta
    assert layer(torch.empty(2, T, D, device="meta")).shape == (2, T, D)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(2, T, D)).isfinite().all()
    assert layer.to(torch.bfloat16)(torch.randn(T, D).bfloat16()).dtype == torch.bfloat16
    assert cem.derive(energies.gated, dim=D, hidden=3, dtype=torch.float16).U.dtype == torch.float16


@few
def test_autocast(case):
    layer = case.derive(norm=nn.RMSNorm).float()
    inputs = case.inputs(dtype=torch.float32)
    truth = gradients(layer, layer, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(layer, layer, inputs)
    # bfloat16 keeps 8 bits: 4e-3 for each product, several of them in a row.
    assert_same(found, truth, 4e-2)


def test_initial_values():
    layer = cem.derive(energies.diagonal_plus_low_rank_full, dim=400, heads=2, rank=50)
    assert layer.Q.std().item() == pytest.approx(400**-0.5, rel=0.05)
    block = cem.derive(energies.diagonal_plus_low_rank, dim=400, heads=2, rank=50)
    assert not block.lam.any() and block.lam.shape == (2, 200)


def test_what_a_layer_says_of_itself():
    layer = Case(energies.interaction, ()).derive(steps=2)
    assert layer.sizes == {"dim": D, "heads": 2, "rank": 5}
    assert layer.scalars == {"beta": pytest.approx(5**-0.5)}
    assert "energy=interaction" in repr(layer) and "sdpa" in repr(layer)
    assert layer.code.startswith("def gradient(h, x, visible, causal, K, Q):")


@few
def test_one_graph_without_breaks(case):
    """torch.compile with an eager backend sees the whole layer, its steps too, as one graph."""
    layer = case.derive(steps=2, norm=nn.RMSNorm).double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(
        gradients(compiled, layer, case.inputs()), gradients(layer, layer, case.inputs()), 1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=by_name)
def test_compiled(case):
    layer = case.derive().float()
    inputs = case.inputs(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    assert_same(gradients(compiled, layer, inputs), gradients(layer, layer, inputs), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "grouped_interaction",
        "rotary_interaction",
        "alibi_interaction",
        "sliding_window_interaction_3",
        "relative_interaction",
        "sink_interaction",
        "squared_interaction",
        "sparse_memory",
    ],
)
def test_one_graph(name):
    case = next(case for case in ENERGIES if case.name == name)
    layer, inputs = case.derive(), case.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, layer, inputs), gradients(layer, layer, inputs), 1e-12)


def test_compiled_by_the_default_backend():
    case = CONTEXT[1]
    layer = case.derive().float()
    inputs = case.inputs(dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True)
    assert_same(gradients(compiled, layer, inputs), gradients(layer, layer, inputs), 1e-5)


@few
def test_export(case):
    layer = case.derive(steps=2)
    inputs = case.inputs()
    program = torch.export.export(layer, (), inputs)
    assert_close(program.module()(**inputs), layer(**inputs), 1e-12)


def test_export_with_a_dynamic_length():
    layer = Case(energies.interaction, ()).derive()
    length = torch.export.Dim("length", min=2, max=64)
    h = torch.randn(2, T, D, dtype=torch.float64)
    program = torch.export.export(layer, (h,), dynamic_shapes=({1: length},)).module()
    longer = torch.randn(2, 3 * T, D, dtype=torch.float64)
    assert_close(program(longer), layer(longer), 1e-12)


def test_reference_update_is_a_loop_over_the_energy():
    h = torch.randn(3, D, dtype=torch.float64)
    U = torch.randn(4, D, dtype=torch.float64)
    found = reference_update(energies.plain, h, U=U, step_size=0.5)
    assert_close(found, h + 0.5 * torch.relu(h @ U.T) @ U, 1e-12)
