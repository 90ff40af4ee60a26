"""Decoding from a cache: the same numbers as the whole sequence at once, from what the program keeps."""

import pytest
import torch
from helpers import CONTEXT, SIZES, Case, a, assert_same, by_name, dot, gradients, h, key, lse, r, s
from sympy import Sum

import cem
from cem import energies
from cem.testing import assert_close

CUTS = [(1,) * 7, (3, 1, 1, 2), (7,), (2, 5)]
DECODED = [case for case in CONTEXT if not case.needs_context]
DENSE = ("soft_capped_interaction", "soft_capped", "sparse_attention", "sparse_window")

t, u = cem.position(h), cem.position(s)
Q, K = (
    cem.parameter("Q", *cem.dims("heads rank dim")),
    cem.parameter("K", *cem.dims("heads rank dim")),
)
slope = cem.parameter("slope", cem.dims("heads"))
SCORE = Sum(dot(Q, a, r) * key(K, a, r), r)
TURNED = Sum(cem.rope(dot(Q, a, r), r, h) * cem.rope(key(K, a, r), r, s), r)
WINDOWS = {
    "strict": cem.Energy(lse(TURNED + cem.only(t - u < 3)), name="strict"),
    "at most": cem.Energy(lse(SCORE + cem.only(t - u <= 2)), name="at_most"),
    "without itself": cem.Energy(lse(SCORE + cem.only((t - u < 3) & (u < t))), name="itself"),
    "sloped": cem.Energy(lse(SCORE - slope[a] * (t - u) + cem.only(t - u < 3)), name="sloped"),
}
ROTARY = Case(cem.Energy(lse(TURNED), name="rotary"), ())
ROTARY_SIZES = {"rank": 6}


def decoded(layer, h, cuts, max_seq=16, **inputs):
    """The states from a cache, filled by pieces of the given lengths."""
    cache, out, start = layer.init_cache(len(h), max_seq), [], 0
    for count in cuts:
        stop = start + count
        own = {
            name: z[:, :stop] if name == "visible" else z[:, start:stop]
            for name, z in inputs.items()
        }
        out.append(layer(h[:, start:stop], cache=cache, **own))
        start = stop
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("case", DECODED, ids=by_name)
def test_decoding_is_the_whole_sequence(case, steps):
    layer = case.derive(steps=steps, update=cem.GradientDescent(0.1))
    (h,) = case.inputs().values()
    if case.name in DENSE:
        with pytest.raises(ValueError, match="cannot be decoded token by token from a cache: "):
            layer.init_cache(2, 16)
        return
    for cuts in CUTS:
        found, cache = decoded(layer, h, cuts)
        assert_close(found, layer(h), 1e-12)
        assert cache.length == 7


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_a_ring(name):
    """The tensor is as long as the window, whatever the pieces are."""
    energy = WINDOWS[name]
    layer = cem.derive(energy, dim=12, heads=2, rank=6, dtype=torch.float64)
    h = torch.randn(2, 11, 12, dtype=torch.float64)
    for cuts in ((1,) * 11, (5, 1, 1, 4), (2, 1, 1, 1, 6), (11,), (1, 1, 3, 1, 1, 4)):
        found, cache = decoded(layer, h, cuts)
        assert_close(found, layer(h), 1e-12)
        assert cache.window == 3 and all(tensor.shape[2] == 3 for tensor in cache.tensors)


def test_sinks_are_kept():
    energy = cem.Energy(lse(SCORE + cem.only((t - u < 3) | (u < 1))), name="sinks")
    layer = cem.derive(energy, dim=12, heads=2, rank=5, dtype=torch.float64)
    h = torch.randn(2, 9, 12, dtype=torch.float64)
    found, cache = decoded(layer, h, (1,) * 9)
    assert cache.window is None
    assert_close(found, layer(h), 1e-12)


def test_two_windows_keep_the_longer():
    other = WINDOWS["strict"].renamed(Q="Q2", K="K2", beta="b2")
    wide = cem.Energy(lse(SCORE + cem.only(t - u < 5)), name="wide")
    layer = cem.derive(other + wide, dim=12, heads=2, rank=6, b2=0.4, dtype=torch.float64)
    h = torch.randn(1, 9, 12, dtype=torch.float64)
    for cuts in ((4, 1, 1, 3), (1,) * 9, (1, 1, 1, 1, 1, 1, 2, 1), (6, 1, 2), (2, 2, 2, 1, 2)):
        found, cache = decoded(layer, h, cuts)
        assert cache.window == 5
        assert_close(found, layer(h), 1e-12)


def test_a_ring_turned_by_pieces_of_any_length():
    """After single tokens have turned the ring, a short piece keeps the latest and not the last in storage."""
    generator = torch.Generator().manual_seed(0)
    energy = cem.Energy(lse(TURNED + cem.only(t - u < 5)), name="ring")
    layer = cem.derive(energy, dim=12, heads=2, rank=6, dtype=torch.float64)
    h = torch.randn(1, 23, 12, dtype=torch.float64)
    visible = torch.rand(1, 23, generator=generator) < 0.7
    for _ in range(20):
        cuts = []
        while sum(cuts) < 23:
            most = min(4, 23 - sum(cuts))
            cuts.append(int(torch.randint(1, most + 1, (), generator=generator)))
        assert_close(decoded(layer, h, cuts, max_seq=23)[0], layer(h), 1e-12)
        hidden = decoded(layer, h, cuts, max_seq=23, visible=visible)[0]
        assert_close(hidden, layer(h, visible=visible), 1e-12)


def test_positions_and_left_padding():
    layer = ROTARY.derive(**ROTARY_SIZES)
    h = torch.randn(2, 7, 12, dtype=torch.float64)
    visible = torch.ones(2, 7, dtype=torch.bool)
    visible[0, :3] = False
    positions = torch.stack([torch.arange(7) - 3, torch.arange(7) + 100])
    whole = layer(h, visible=visible, positions=positions)
    found, _ = decoded(layer, h, (3, 1, 1, 2), visible=visible, positions=positions)
    assert_close(found, whole, 1e-12)


def test_tied_attention_keeps_one_tensor():
    """Half of keys and values."""
    layer = Case(energies.interaction, ()).derive()
    cache = layer.init_cache(3, 32)
    assert [tensor.shape for tensor in cache.tensors] == [(3, 2, 32, SIZES["rank"])]
    assert cache.nbytes == 3 * 2 * 32 * SIZES["rank"] * 8


def test_groups_keep_their_keys_once():
    layer = Case(energies.grouped_interaction, ()).derive()
    shape = (1, SIZES["groups"], 8, SIZES["rank"])
    assert [tensor.shape for tensor in layer.init_cache(1, 8).tensors] == [shape]


def test_linear_attention_keeps_a_state():
    layer = Case(energies.gated_linear_attention, ()).derive()
    assert layer.init_cache(1, 8).nbytes == layer.init_cache(1, 8000).nbytes


@pytest.mark.parametrize(
    "energy", [energies.interaction, energies.gated_linear_attention, ROTARY.energy]
)
def test_beams(energy):
    layer = Case(energy, ()).derive(**(ROTARY_SIZES if energy is ROTARY.energy else {}))
    h = torch.randn(3, 7, 12, dtype=torch.float64)
    rows = torch.tensor([2, 0, 0])
    _, cache = decoded(layer, h[:, :4], (4,))
    cache.reorder(rows)
    beams = torch.cat([h[rows, :4], h[:, 4:]], 1)
    found = [layer(beams[:, n : n + 1], cache=cache) for n in range(4, 7)]
    assert_close(torch.cat(found, 1), layer(beams)[:, 4:], 1e-12)


def test_going_back():
    layer = ROTARY.derive(**ROTARY_SIZES)
    h = torch.randn(2, 7, 12, dtype=torch.float64)
    _, cache = decoded(layer, h, (7,))
    cache.crop(4)
    assert_close(layer(h[:, 4:], cache=cache), layer(h)[:, 4:], 1e-12)
    _, state = decoded(Case(energies.squared_interaction, ()).derive(), h, (7,))
    with pytest.raises(ValueError, match="cannot go back to 4: a state or a ring has let go"):
        state.crop(4)


@pytest.mark.parametrize("rule", [cem.Momentum(0.1, 0.5), cem.Nesterov(0.1, 0.5)])
def test_rules_with_momentum(rule):
    layer = Case(energies.interaction, ()).derive(steps=3, update=rule, norm=torch.nn.LayerNorm(12))
    layer = layer.double()
    h = torch.randn(2, 7, 12, dtype=torch.float64)
    assert_close(decoded(layer, h, (3, 1, 3))[0], layer(h), 1e-12)


def test_a_trace_sees_whole_sequences():
    layer = Case(energies.interaction, ()).derive()
    h = torch.randn(1, 3, 12, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="sees whole sequences: layer `interaction` was called with a"
    ):
        cem.trace(layer, h, cache=layer.init_cache(1, 4))


def test_what_a_cache_refuses():
    layer = Case(energies.interaction, ()).derive()
    h = torch.randn(2, 3, 12, dtype=torch.float64)
    cache = layer.init_cache(2, 4)
    layer(h, cache=cache)
    with pytest.raises(
        ValueError, match="holds 4 tokens: got 3 more after 3; type `layer.init_cache"
    ):
        layer(h, cache=cache)
    with pytest.raises(ValueError, match="takes its context from the cache: got `context`"):
        layer(h[:, :1], context=h, cache=cache)
    with pytest.raises(ValueError, match="is for 2 sequences: got 1; type `layer.init_cache\\(1"):
        layer(h[:1, :1], cache=cache)
    with pytest.raises(ValueError, match="at least one token of one sequence: got batch=0"):
        layer.init_cache(0, 4)
    ring = cem.derive(WINDOWS["strict"], dim=12, heads=2, rank=6).init_cache
    linear = Case(energies.squared_interaction, ()).derive()
    with pytest.raises(ValueError, match="so none can be hidden later: got `visible`"):
        linear(h, cache=linear.init_cache(2, 8), visible=torch.ones(2, 3, dtype=torch.bool))
    layer = cem.derive(WINDOWS["strict"], dim=12, heads=2, rank=6, dtype=torch.float64)
    assert ring(1, 8).window == 3
    with pytest.raises(ValueError, match="is a ring of 3 tokens, which needs positions that grow"):
        layer(h, cache=layer.init_cache(2, 8), positions=torch.tensor([0, 0, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False}, "sees later tokens, so it cannot be decoded"),
        ({"moving": True, "steps": 2}, "moves its context, which a cache does not keep"),
        ({"update": cem.LineSearch()}, "asks for energies or Hessians in its steps"),
        ({"lowering": "autograd"}, "is lowered to autograd, which keeps no cache"),
    ],
)
def test_layers_without_a_cache(options, message):
    with pytest.raises(ValueError, match=message):
        Case(energies.interaction, ()).derive(**options).init_cache(1, 4)
    with pytest.raises(ValueError, match="has no context made of its own states"):
        Case(energies.gated, ()).derive().init_cache(1, 4)


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_a_window_in_blocks_is_the_mask(sinks):
    """A sequence in order goes block by block, with the numbers and the gradients of the mask."""
    near = (t - u < 4) | (u < sinks) if sinks else t - u < 4
    energy = cem.Energy(lse(TURNED + cem.only(near)), name="near")
    layer = cem.derive(energy, dim=12, heads=2, rank=6, dtype=torch.float64)
    assert "kernels.windowed_attention" in layer.code
    h = torch.randn(2, 300, 12, dtype=torch.float64)
    blocks, mask = (
        gradients(layer, layer, {"h": h}, **inputs)
        for inputs in ({}, {"positions": torch.arange(300)})
    )
    assert_same(blocks, mask, 1e-12)
    changed = h.clone()
    changed[:, 200:] = 0.0
    assert torch.equal(layer(changed)[:, :200], layer(h)[:, :200])
