"""Layers that know where tokens stand: shifts, documents, padding, windows, digits, and what is refused.

Legend: B batch, T tokens, D dim, H heads, R rank.
"""

import pytest
import torch
from helpers import ENERGIES, assert_same, by_name, gradients, self_excluded
from sympy import Sum

import cem
from cem import energies
from cem.lowering.kernels import sharing
from cem.testing import assert_close, relative_error

PLACED = [case for case in ENERGIES if case.energy.has_positions]
# Sinks are tokens at a position of their own; all else depends on distances.
RELATIVE = [case for case in PLACED if not case.name.endswith(("_2_1", "grouped_window"))]
ids = {"ids": by_name}
BY_NAME = {case.name: case for case in PLACED}


def tokens(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_catalogue_has_placed_energies():
    gallery = {"rotary", "alibi", "sliding_window", "relative"}
    assert {f"{name}_interaction" for name in gallery} <= BY_NAME.keys()
    assert len(RELATIVE) == len(PLACED) - 2


@pytest.mark.parametrize("lowering", ["fused", "autograd"])
@pytest.mark.parametrize("case", RELATIVE, **ids)
def test_only_distances_count(case, lowering):
    layer = case.derive(lowering=lowering)
    h, places = tokens(2, 7, 12), torch.arange(7)
    assert_close(layer(h, positions=places + 57), layer(h), 1e-12)
    assert_close(
        layer(h, positions=places + 57, context=h, context_positions=places + 57), layer(h), 1e-12
    )
    unmoved = (energies.sliding_window_interaction, energies.energy_transformer, self_excluded)
    far = relative_error(layer(h, positions=2 * places), layer(h))
    assert (far > 1e-4) == (case.energy not in unmoved)


@pytest.mark.parametrize("case", PLACED, **ids)
def test_a_position_for_each_sequence(case):
    layer = case.derive()
    h, places = tokens(2, 7, 12), torch.tensor([[0, 1, 2, 3, 4, 5, 6], [3, 4, 6, 9, 10, 11, 30]])
    found = layer(h, positions=places)
    for one, where, out in zip(h, places, found, strict=True):
        assert_close(out, layer(one, positions=where), 1e-12)


@pytest.mark.parametrize("lowering", ["fused", "autograd"])
@pytest.mark.parametrize("case", PLACED, **ids)
def test_documents_are_sequences_of_their_own(case, lowering):
    """In the output and every gradient, with positions that start afresh."""
    layer = case.derive(lowering=lowering)
    h = tokens(2, 7, 12)
    packed = {
        "document_ids": torch.tensor([0, 0, 0, 1, 1, 1, 1]),
        "positions": torch.tensor([0, 1, 2, 0, 1, 2, 3]),
    }

    def apart(h):
        return torch.cat([layer(h[:, :3]), layer(h[:, 3:])], 1)

    assert_same(
        gradients(layer, layer, {"h": h}, **packed), gradients(apart, layer, {"h": h}), 1e-12
    )


@pytest.mark.parametrize("case", RELATIVE, **ids)
def test_documents_need_no_positions_where_distances_count(case):
    layer, h = case.derive(), tokens(2, 7, 12)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [5, 5, 5, 2, 2, 2, 2]])
    apart = torch.cat([layer(h[:, :3]), layer(h[:, 3:])], 1)
    assert_close(layer(h, document_ids=documents), apart, 1e-12)


@pytest.mark.parametrize("case", PLACED, **ids)
def test_padding_on_the_left_is_no_padding(case):
    layer, h = case.derive(), tokens(2, 7, 12)
    padded = torch.cat([tokens(2, 4, 12, seed=1), h], 1)
    real = torch.arange(11) >= 4
    found = layer(padded, visible=real.expand(2, 11), positions=torch.arange(11) - 4)
    assert_close(found[:, 4:], layer(h), 1e-12)


@pytest.mark.parametrize("name", ["sliding_window_interaction_3", "sliding_window_interaction_2_1"])
@pytest.mark.parametrize("lowering", ["fused", "autograd"])
def test_what_leaves_the_window_has_no_influence_at_all(name, lowering):
    layer, h = BY_NAME[name].derive(lowering=lowering), tokens(1, 7, 12)
    t = torch.arange(7)
    seen = (t[:, None] >= t) & (t[:, None] - t < int(name.split("_")[3]))
    seen |= (t[:, None] >= t) & (t < 1) if name.endswith("_1") else False
    jacobian = torch.autograd.functional.jacobian(layer, h)[0, :, :, 0].abs().amax((1, 3))  # (T, T)
    assert torch.equal(jacobian > 0, seen)
    for last in range(7):
        gone = torch.where(seen[last, :, None], h, h.cos())
        assert torch.equal(layer(gone)[:, last], layer(h)[:, last])


@pytest.mark.parametrize("lowering", ["fused", "autograd"])
@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("self_excluded", torch.arange(7)),
        ("sliding_window_interaction_3", torch.tensor([0, 1, 2, 3, 4, 5, 90])),
    ],
)
def test_a_token_whose_visible_set_is_empty_stays(name, places, lowering):
    """Nothing is near and nothing else is there: no force, an energy of 0, no NaN in any gradient."""
    layer, h = BY_NAME[name].derive(lowering=lowering), tokens(1, 7, 12)
    empty = 0 if name == "self_excluded" else 6
    inputs = {"positions": places}
    if empty:
        inputs |= {"context": tokens(1, 7, 12, seed=1), "context_positions": torch.arange(7)}
    found = gradients(layer, layer, {"h": h}, **inputs)
    assert torch.equal(found["output"][:, empty], h[:, empty])
    assert not torch.equal(found["output"][:, 3], h[:, 3])
    assert all(value.isfinite().all() for value in found.values())
    assert layer.energy(h, **inputs)[0, empty] == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("start", [0, 4000])
def test_linear_biases_keep_their_digits_in_bfloat16(start, masked):
    """At most twice the error of a program in bfloat16 whose biases are exact, and one rounding.

    bfloat16 has 8 bits: between 2048 and 4096 its numbers are 16 apart.
    """
    T, D, H, R = 64, 32, 4, 8
    layer = cem.derive(energies.alibi_interaction, dim=D, heads=H, rank=R, dtype=torch.float64)
    slopes = torch.tensor([float(slope) for slope in cem.alibi_slopes(H)])
    with torch.no_grad():
        layer.slope.copy_(slopes)
        for weight in (layer.Q, layer.K):
            weight.copy_(tokens(H, R, D).bfloat16() / 4)
    h, places = tokens(2, T, D).bfloat16(), start + torch.arange(T)
    past = torch.ones(T, T, dtype=torch.bool).tril()
    seen = past & (torch.arange(T) % 5 != 2) if masked else past

    def eager(h, dtype):
        Q, K = layer.Q.to(dtype), layer.K.to(dtype)
        q, k = h[:, None] @ Q.mT, h[:, None] @ K.mT  # (B, H, T, R)
        t = torch.arange(T)
        scores = (q @ k.mT).double() * R**-0.5 - slopes[:, None, None] * (t[:, None] - t)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num().to(dtype)
        return (weights @ k @ Q).sum(1)

    with torch.no_grad():
        truth, plain = eager(h.double(), torch.float64), eager(h, torch.bfloat16)
        options = {"visible": seen.expand(2, T, T)} if masked else {}
        assert_close(layer(h.double(), positions=places, **options) - h.double(), truth, 1e-10)
        low = layer.bfloat16()
        _, g, there = low.reader(low.norm, h, positions=places, **options)
        found = low.lowering.gradient(g, g, *there, *low.values()) * -low.lowering.scale
    bound = 2 * relative_error(plain, truth) + torch.finfo(torch.bfloat16).eps
    assert relative_error(found, truth) <= bound


# -- what is refused ------------------------------------------------------------------------------

SHAPES = {
    "too short": torch.arange(6),
    "of another batch": torch.zeros(3, 7),
    "of too many axes": torch.zeros(1, 2, 7),
    "a number": torch.tensor(3),
}


@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("name", ["positions", "context_positions", "document_ids"])
def test_wrong_shapes(name, what):
    layer = cem.derive(energies.rotary_interaction, dim=12, heads=2, rank=4)
    shape = str(tuple(SHAPES[what].shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(
        ValueError, match=rf"`{name}` must have shape \(7,\) or \(2, 7\): got {shape}"
    ):
        layer(torch.zeros(2, 7, 12), **{name: SHAPES[what]})


def test_positions_are_numbers_and_wanted():
    h = torch.zeros(2, 7, 12)
    layer = cem.derive(energies.rotary_interaction, dim=12, heads=2, rank=4)
    with pytest.raises(
        TypeError, match=r"`positions` are whole numbers: got torch.bool; type `torch"
    ):
        layer(h, positions=torch.ones(7, dtype=torch.bool))
    layer = cem.derive(energies.interaction, dim=12, heads=2, rank=4)
    for name in ("positions", "context_positions"):
        with pytest.raises(ValueError, match=f"has no positions: got `{name}`; use `cem.position`"):
            layer(h, **{name: torch.arange(7)})
    layer = cem.derive(energies.gated, dim=12, hidden=4)
    for name in ("context_positions", "document_ids"):
        with pytest.raises(ValueError, match=f"has no context: got `{name}`; call it without"):
            layer(h, **{name: torch.arange(7)})


dim, rank = cem.dims("dim rank")
h, x = cem.state(dim), cem.context(dim)
i, r, s = dim.index("i"), rank.index("r"), x.index("s")
score = Sum(h[i] * x[s, i], i)


@pytest.mark.parametrize("rank", [5, 1])
def test_an_odd_axis_does_not_turn(rank):
    with pytest.raises(
        ValueError, match=f"turns pairs: got {rank} of the {rank} coordinates of `rank`"
    ):
        cem.derive(energies.rotary_interaction, dim=12, heads=2, rank=rank)
    with pytest.raises(
        ValueError, match="turns pairs: got 3 of the 6 coordinates of `rank`; choose"
    ):
        cem.derive(energies.rotary_interaction_by(fraction=1 / 2), dim=12, heads=2, rank=6)
    with pytest.raises(ValueError, match="turns 3 pairs: got an axis `rank` of 4; give at most 2"):
        by_hand = energies.rotary_interaction_by(frequencies=(1, 2, 3))
        cem.derive(by_hand, dim=12, heads=2, rank=4)
    with pytest.raises(ValueError, match="turns pairs: got 5 of the 5 coordinates"):
        cem.rope(torch.zeros(5), torch.tensor(1))


@pytest.mark.parametrize("value", [h[i], torch.zeros(4)], ids=["symbolic", "torch"])
def test_the_options_of_a_rotation(value):
    where = (i, h) if value is h[i] else (torch.tensor(1),)
    with pytest.raises(
        ValueError, match='`pairing` is "half" or "interleaved": got \'llama\'; type'
    ):
        cem.rope(value, *where, pairing="llama")
    for fraction in (0, -1, 1.5):
        with pytest.raises(
            ValueError, match=f"between 0 and 1: got {fraction}; type `fraction=1/4`"
        ):
            cem.rope(value, *where, fraction=fraction)


def test_whose_position():
    with pytest.raises(
        TypeError, match="takes the state or an index of the context: got i of type Idx"
    ):
        cem.position(i)
    with pytest.raises(
        TypeError, match="`lookup` reads along an index: got 3 of type int; make one"
    ):
        cem.lookup(h[i], 3, cem.position(h))


MOVING = {
    "only": cem.logsumexp(score + cem.only(Sum(h[i], i)), s),
    "rope": Sum(cem.rope(h[i], i, Sum(h[i], i)), i),
    "lookup": Sum(cem.lookup(x[s, i], i, Sum(h[i], i)), s),
}


@pytest.mark.parametrize("word", MOVING)
def test_what_moves_with_the_state_is_no_place(word):
    with pytest.raises(
        ValueError, match=f"`{word}` takes what does not move with the state: got .*; use"
    ):
        cem.Energy(MOVING[word])


def test_a_lookup_in_the_torch_pen_reads_one_size():
    @cem.energy(h="dim", x="seq dim", table="rank dim")
    def flat(h, x, *, table, position):
        return cem.lookup(table.flatten(), position) + (x @ h).sum()

    assert "`lookup` reads the last axis of a tensor, one named size" in flat.reason


def test_angles_are_made_once_for_all_who_share_positions():
    layers = [BY_NAME["rotary_interaction"].derive() for _ in range(2)]
    h, own = tokens(2, 5, 12), torch.arange(3.0, 8.0, dtype=torch.float64)[None]
    apart = [layer(h, positions=own) for layer in layers]
    shared = sharing(own.clone())
    for layer, alone in zip(layers, apart, strict=True):
        assert torch.equal(layer(h, positions=shared), alone)
    assert len(shared.turns) == 1


def test_positions_of_the_user_may_change_in_place():
    layer = BY_NAME["rotary_interaction"].derive(causal=False)
    h, x, own = tokens(1, 5, 12), tokens(1, 5, 12, seed=1), torch.arange(5, dtype=torch.float64)
    places = {"context": x, "positions": own[None], "context_positions": own.clone()}
    before = layer(h, **places)
    own += 3
    after = layer(h, **places)
    assert not torch.allclose(before, after)
    assert torch.equal(after, layer(h, **places | {"positions": own.clone()[None]}))
