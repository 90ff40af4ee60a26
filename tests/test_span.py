"""Steps in the span of what they move along: the same numbers as the loop over h, with fewer products."""

import math

import pytest
import torch
from helpers import assert_same, copy_of, gradients
from sympy import Sum
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cem
from cem import energies
from cem.descent import least_tokens
from cem.testing import assert_close

B, T, D = 2, 9, 12
HEADS = {"heads": 2, "rank": 4}


class Looped(cem.GradientDescent):
    """A rule of one's own: nothing is known of it, so that the loop stays one over h."""


class LoopedMomentum(cem.Momentum):
    """Likewise."""


class LoopedNesterov(cem.Nesterov):
    """Likewise."""


RULES = {
    "one": (cem.GradientDescent, Looped, {"step_size": 0.3}),
    "learned": (cem.GradientDescent, Looped, {"step_size": 0.3, "learn": True}),
    "per step": (cem.GradientDescent, Looped, {"step_size": [0.3, 0.1, 0.2], "learn": True}),
    "momentum": (cem.Momentum, LoopedMomentum, {"step_size": 0.3, "learn": True}),
    "nesterov": (cem.Nesterov, LoopedNesterov, {"step_size": [0.3, 0.1, 0.2], "momentum": 0.5}),
}
FITTING = [
    (energies.interaction, HEADS),
    (energies.rotary_interaction, HEADS),
    (energies.sink_interaction, HEADS),
    (energies.squared_interaction, HEADS),
    (energies.symmetric_interaction, HEADS),
    (energies.collaborative_interaction, HEADS),
    (energies.symmetrised_interaction, {"heads": 2, "rank": 3}),
    (energies.two_sided_gated, {"hidden": 5}),
    (energies.gated, {"hidden": 14}),
    (0.7 * energies.interaction + energies.gated, {**HEADS, "hidden": 5}),
    (energies.parallel_block, {**HEADS, "hidden": 5}),
]
NAMES = [energy.name for energy, _ in FITTING]
every = pytest.mark.parametrize(("energy", "sizes"), FITTING, ids=NAMES)


def pair(energy, sizes, rule="one", **options):
    """The same layer twice, the second with the loop over h."""
    mine, theirs, arguments = RULES[rule]
    options = {"steps": 3, **options}
    layer = cem.derive(energy, dim=D, update=mine(**arguments), **sizes, **options).double()
    again = {name: value for name, value in options.items() if name != "causal"}
    loop = copy_of(layer, update=theirs(**arguments), **again)
    assert least_tokens(layer) <= B * T and least_tokens(loop) == math.inf
    return layer, loop


def states(seed=0, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (B, T, D)), dtype=torch.float64, generator=generator)


@pytest.fixture
def only_span(monkeypatch):
    """Takes the program of a step on h away from a layer."""

    def take(layer):
        def missing(*inputs):
            raise AssertionError("the loop over h was taken")

        monkeypatch.setattr(layer.lowering, "gradient", missing)

    return take


@every
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_loop(energy, sizes, rule, only_span):
    """In its output and in the gradient of the input and of every parameter and step size."""
    layer, loop = pair(energy, sizes, rule)
    truth = gradients(loop, loop, {"h": states()})
    only_span(layer)
    assert_same(gradients(layer, layer, {"h": states()}), truth, 1e-12)


@pytest.mark.parametrize(
    ("causal", "seen"),
    [
        (False, {}),
        (True, {"visible": torch.arange(T) > torch.tensor([[0], [3]])}),
        (True, {"document_ids": torch.arange(T).expand(B, T) // 4}),
        (False, {"context": states(1, B, 11, D)}),
        (True, {"positions": torch.arange(T) + 5}),
    ],
    ids=["all", "padding", "documents", "context", "positions"],
)
def test_whatever_the_tokens_see(causal, seen, only_span):
    layer, loop = pair(energies.rotary_interaction, HEADS, causal=causal)
    truth = gradients(loop, loop, {"h": states()}, **seen)
    only_span(layer)
    assert_same(gradients(layer, layer, {"h": states()}, **seen), truth, 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"refresh": "step"},
        {"moving": True},
        {"tolerance": 0.0},
        {"norm": nn.RMSNorm},
        {"preconditioner": cem.Diagonal},
        {"update": cem.LineSearch()},
        {"update": cem.Proximal(0.1, cem.prox.l1(0.1))},
        {"lowering": "autograd"},
    ],
    ids=str,
)
def test_layers_that_need_the_state_between_steps(options):
    layer = cem.derive(energies.interaction, dim=D, **HEADS, **{"steps": 3, **options})
    assert least_tokens(layer) == math.inf and "matrices" not in layer.code


@pytest.mark.parametrize(
    ("energy", "sizes"),
    [
        (energies.diagonal_plus_low_rank, {"heads": 2, "rank": 4, "block": 6}),
        (energies.memory, {"hidden": 5}),
        (energies.quadratic_well, {"rank": 4}),
    ],
)
def test_energies_that_read_the_state_as_it_is(energy, sizes):
    layer = cem.derive(energy, dim=D, steps=3, **sizes)
    assert layer.lowering.span is None and least_tokens(layer) == math.inf


def test_it_pays_below_twice_the_width_and_from_some_tokens_on():
    """F = M: a token saves F (2 D - F) in each later step, the Gram matrix takes F F D once."""
    for hidden in (1, 12, 23, 24, 40):
        layer = cem.derive(energies.gated, dim=D, hidden=hidden, steps=4)
        wanted = hidden * D / (3 * (2 * D - hidden)) if hidden < 2 * D else math.inf
        assert least_tokens(layer) == pytest.approx(wanted)
    layer, loop = pair(energies.interaction, HEADS)
    few = states(0, 1, math.ceil(least_tokens(layer)) - 1, D)
    assert torch.equal(layer(few), loop(few))


def test_products_are_saved():
    """Three steps of a gate: A and G once, then two products with the Gram matrix, and B at the end."""
    hidden, tokens = 14, B * T
    layer, loop = pair(energies.gated, {"hidden": hidden})
    counted = {}
    for name, one in (("span", layer), ("loop", loop)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(states())
        counted[name] = counter.get_total_flops() // 2
    wide = tokens * hidden * D
    assert counted["loop"] == (1 + 3 * 2) * wide
    assert counted["span"] == 3 * wide + 2 * tokens * hidden**2 + hidden**2 * D


def test_a_trace_and_a_cache_know_every_state():
    """They take the loop over h, and arrive where the span does."""
    layer, _ = pair(energies.rotary_interaction, HEADS)
    h = states()
    out = layer(h)
    (found,) = cem.trace(layer, h)
    assert_close(found.states[-1], out, 1e-12)
    cache = layer.init_cache(B, T)
    parts = [layer(part, cache=cache) for part in h.split([4, 1, 4], 1)]
    assert_close(torch.cat(parts, 1), out, 1e-12)


def test_a_memory_from_outside_lies_in_no_span():
    layer, loop = pair(energies.interaction, HEADS, "momentum")
    for found, truth in zip(
        layer(states(), memory=states(2)), loop(states(), memory=states(2)), strict=True
    ):
        assert torch.equal(found, truth)


def test_checkpoints_of_coefficients(only_span):
    layer, loop = pair(energies.rotary_interaction, HEADS, "per step", checkpoint=True)
    truth = gradients(loop, loop, {"h": states()})
    only_span(layer)
    assert_same(gradients(layer, layer, {"h": states()}), truth, 1e-12)


def test_in_one_graph_without_breaks():
    layer, loop = pair(energies.interaction, HEADS, "per step")
    truth = gradients(loop, loop, {"h": states()})
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, layer, {"h": states()}), truth, 1e-12)


def test_autocast_keeps_the_type_of_the_state():
    """Coefficients are summed in float32, and so is the state."""
    layer, loop = pair(energies.parallel_block, {**HEADS, "hidden": 5})
    h, layer, loop = states().float(), layer.float(), loop.float()
    exact = loop(h)
    with torch.autocast("cpu", torch.bfloat16):
        found, other = layer(h), loop(h)
    assert found.dtype == other.dtype == torch.float32
    assert (found - exact).abs().max() <= 2 * (other - exact).abs().max()


def test_the_code_shows_both_steps():
    layer, _ = pair(energies.parallel_block, {**HEADS, "hidden": 5})
    assert layer.code.startswith(layer.lowering.code)
    assert "def matrices(" in layer.code and "def force(z, " in layer.code
    assert f"# From {math.ceil(least_tokens(layer))} tokens on" in layer.code
    inner = layer.code.split("def force")[1]
    assert "torch.matmul" not in inner and "F.linear" not in inner


def test_parameters_may_be_called_like_what_is_added():
    dim, hidden = cem.dims("dim hidden")
    h, z = cem.state(dim), cem.parameter("z", hidden, dim)
    i, m = dim.index("i"), hidden.index("m")
    energy = cem.Energy(
        -Sum(cem.softplus(Sum(z[m, i] * h[i], i)), m),
        name="clash",
    )
    layer, loop = pair(energy, {"hidden": 5})
    assert_close(layer(states()), loop(states()), 1e-12)
