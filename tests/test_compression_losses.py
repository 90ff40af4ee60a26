"""Gains by loss: against a loop that compresses one head at a time, and plans made from them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

pytest.importorskip("transformers")

from test_compression_models import VOCAB, model_of

from cem.allocation import Heads, allocate, uniform
from cem.compression import attentions, compress, inputs_of, losses, replaced, spectra
from cem.compression.curves import NOTHING, measured, worth

TOKENS, OTHERS = torch.randint(1, VOCAB, (2, 3, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def divergence(model, layers):
    """The mean divergence of the next-token probabilities, token by token in float64."""
    before = model(OTHERS, use_cache=False).logits.double()
    with replaced(model, layers):
        after = model(OTHERS, use_cache=False).logits.double()
    p, q = (one.softmax(-1).flatten(0, 1) for one in (before, after))
    return sum(float((m * (m / n).log()).sum()) for m, n in zip(p, q, strict=True)) / len(p)


@pytest.mark.parametrize(("kind", "steps"), [("llama", 3), ("gpt2", 3), ("cem", 0)])
def test_gains_are_what_the_predictions_lose_to_one_head(kind, steps):
    torch.manual_seed(0)
    model = model_of(kind)
    before, seen = model(OTHERS, use_cache=False).logits, inputs_of(model, TOKENS)
    found = losses(model, TOKENS, OTHERS, steps=steps)
    assert torch.equal(model(OTHERS, use_cache=False).logits, before), "the model is as it was"
    bare = [replace(layer, gains=None) for layer in spectra(model)]
    assert [replace(layer, gains=None) for layer in found] == bare
    name, module = list(attentions(model).items())[1]
    ranks = measured(8, found[1].step)
    lost = []
    for rank in ranks:
        small, _ = compress(module, [8, rank], seen[name], steps=steps)
        lost.append(divergence(model, {name: small}))
    wanted = worth(ranks, lost, 8, found[1].step)
    assert found[1].gains[1] == pytest.approx(wanted, rel=1e-9, abs=1e-13)
    assert sum(found[1].gains[1]) == pytest.approx(lost[0], rel=1e-9)
    assert lost[0] > 1e-5


def test_a_plan_by_loss_is_never_worth_less_than_an_even_one():
    torch.manual_seed(0)
    model = model_of("llama")
    layers = losses(model, TOKENS, OTHERS, steps=3)
    for share in (1 / 4, 1 / 2, 3 / 4):
        plan = allocate(share, layers, cost="rank")
        even = uniform(share, layers, cost="rank")
        kept = sum(
            sum(row[: rank // layer.step])
            for layer, ranks in zip(layers, even.ranks, strict=True)
            for row, rank in zip(layer.gains, ranks, strict=True)
        )
        whole = sum(sum(row) for layer in layers for row in layer.gains)
        assert plan.exact and plan.cost <= even.full * share
        assert plan.gain >= kept / whole - 1e-12


def test_ranks_where_a_loss_is_measured():
    assert measured(64) == (0, 8, 16, 24, 32, 48)
    assert measured(8, 2) == (0, 2, 4, 6) and measured(2, 2) == (0,)


@given(
    some.lists(some.floats(0, 10), min_size=6, max_size=6), some.sampled_from([(32, 2), (16, 1)])
)
def test_steps_are_worth_less_and_less_and_all_that_is_lost(lost, sizes):
    full, step = sizes
    ranks = measured(full, step)
    found = worth(ranks, lost, full, step)
    assert len(found) == full // step and min(found) >= 0
    assert all(a >= b - 1e-12 for a, b in zip(found, found[1:], strict=False))
    assert sum(found) == pytest.approx(max(lost[0], NOTHING), abs=1e-9)
    left = sum(found)
    for rank, gain in zip(range(0, full, step), found, strict=True):
        if rank in ranks:
            assert left <= max(lost[ranks.index(rank)], NOTHING) + 1e-9, "below the curve"
        left -= gain


def test_falls_that_grow_count_their_mean():
    """The second step gives back more than the first, so the two are worth the same."""
    assert worth((0, 1, 2), (8.0, 7.0, 1.0), 3) == pytest.approx((3.5, 3.5, 1.0))
    layers = [Heads("a", 8, 2, 3, gains=(worth((0, 1, 2), (8.0, 7.0, 1.0), 3),) * 2)]
    assert allocate(4, layers, cost="rank").ranks == ((2, 2),)
