"""`generate` with routed parts: what a cache of transformers holds of them gives what the whole sequence gives."""

import pytest
import torch
from language_models import ALIBI, ATTENTION, MLP, WAYS, tokens, write
from language_models import model as plain
from transformers import DynamicCache, StaticCache

from cem.lm.cache import CACHE, MoreThanKeys
from cem.testing import assert_close

SHARE = {"capacity": 0.4, "bottleneck": 4}
CHOSEN = {**SHARE, "context": "selected"}
LINEAR = {"energy": "gated_linear_attention", "heads": 2, "rank": 8}
WINDOW = {"energy": {"sliding_window_interaction_by": {"window": 4}}, "heads": 2, "rank": 8}
LLAMA = {"module": "attention", "heads": 2, "kv_heads": 1, "rank": 8}

# What is routed, and what of it a cache holds.
BLOCKS = {
    "all": [{**ATTENTION, "routed": SHARE}, {**MLP, "routed": {**SHARE, "tie": True}}],
    "chosen": [{**ATTENTION, "routed": CHOSEN}, MLP],
    "mlp": [LLAMA, {**MLP, "routed": SHARE}],
    "states": [[{**LINEAR, "routed": SHARE}], [{**LINEAR, "routed": CHOSEN}]],
    "together": [
        [{"parts": [ATTENTION, MLP], "routed": CHOSEN}],
        [{"parts": [ATTENTION, MLP], "routed": {**SHARE, "causal": "predictor"}}],
    ],
    "mixed": [[{**MLP, "routed": SHARE}], [{**WINDOW, "routed": CHOSEN}], [ALIBI]],
}
cached = pytest.mark.parametrize("block", BLOCKS)
croppable = pytest.mark.parametrize("block", [name for name in BLOCKS if name != "states"])


def model(block):
    """A model of a kind of ``BLOCKS``, with predictors that choose some."""
    its = plain(BLOCKS[block])
    for router in (module for module in its.modules() if hasattr(module, "predictor")):
        torch.nn.init.normal_(router.predictor.weight)
        torch.nn.init.zeros_(router.predictor.bias)
        router.level.fill_(0.1)
    return its


def padded():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize(
    ("block", "way"),
    [(block, "greedy") for block in BLOCKS]
    + [(block, way) for block in ("all", "together") for way in ("sampling", "beams returned")],
)
def test_a_cache_changes_nothing(block, way):
    its, ids, options = model(block), tokens(), WAYS[way] | {"attention_mask": padded()}
    expected = write(its, ids, **options, use_cache=False)
    assert torch.equal(write(its, ids, **options), expected)
    if way == "greedy":
        assert torch.equal(expected[:1, 9:], write(its, ids[:1, 3:])[:, 6:])
        for more in (
            {"cache_implementation": "static", "disable_compile": True},
            {"prefill_chunk_size": 4},
        ):
            assert torch.equal(write(its, ids, **options, **more), expected)


def choices(its):
    """The weight of every token in the last choice of every routed part, -1 where it was not chosen."""
    found = []
    for part in (part for block in its.model.layers for part in block.parts.values()):
        if (choice := getattr(part, "choice", None)) is not None:
            index, weight, present = choice
            if index is not None:
                weight = weight if present is None else weight.masked_fill(~present, -1)
                count = its.seen
                weight = weight.new_full((len(weight), count), -1).scatter_(1, index, weight)
            found.append(weight)
    return found


def called(its, ids, mask, cuts=None, cache=None):
    """Logits and choices of a text, in one call or in pieces that a cache joins."""
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, chosen, start = [], [], 0
    for stop in cuts or [ids.shape[1]]:
        inputs = {"attention_mask": mask[:, :stop], "position_ids": places[:, start:stop]}
        its.seen = stop - start
        inputs |= {CACHE: cache} if cuts else {"use_cache": False}
        logits.append(its(ids[:, start:stop], **inputs).logits)
        chosen.append(choices(its))
        start = stop
    return torch.cat(logits, 1), [torch.cat(each, 1) for each in zip(*chosen, strict=True)]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@cached
def test_logits_and_choices_are_those_of_the_whole_sequence(block, kind):
    its, ids, mask = model(block), tokens(2, 15), torch.ones(2, 15, dtype=torch.long)
    mask[0, :3] = 0
    whole, chosen = called(its, ids, mask)
    assert all((0 < each).any() and (each < 0).any() for each in chosen)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(its.config, max_cache_len=20)
    for _ in range(2 if kind == "static" else 1):
        found, pieces = called(its, ids, mask, [5, 6, 7, 8, 12, 15], cache)
        assert_close(found[mask.bool()], whole[mask.bool()], 1e-12)
        for one, other in zip(pieces, chosen, strict=True):
            assert torch.equal(one < 0, other < 0)
            assert_close(one, other, 1e-12)
        assert cache.get_seq_length() == 15
        cache.reset()


@cached
def test_the_future_changes_no_bit_of_the_past(block):
    its, ids, mask = model(block), tokens(2, 15), torch.ones(2, 15, dtype=torch.long)
    whole, chosen = called(its, ids, mask)
    for seed in (2, 3):
        other = torch.cat([ids[:, :9], tokens(2, 6, seed)], 1)
        found, again = called(its, other, mask)
        assert torch.equal(again[0][:, :9], chosen[0][:, :9])
        assert not torch.equal(again[0], chosen[0])
        for one, its_own in zip(again, chosen, strict=True):
            # Another number of chosen tokens is a product of another shape, which rounds otherwise.
            assert torch.equal(one[:, :9] < 0, its_own[:, :9] < 0)
            assert_close(one[:, :9], its_own[:, :9], 1e-12)
        assert_close(found[:, :9], whole[:, :9], 1e-12)


@croppable
def test_a_cache_forgets_its_last_tokens(block):
    its, ids = model(block), tokens(1)
    expected = write(its, ids)
    assert torch.equal(write(its, ids, assistant_model=plain("tied", seed=2)), expected)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    whole, _ = called(its, ids, mask)
    cache = DynamicCache(config=its.config)
    called(its, torch.cat([ids[:, :6], tokens(2, 5, 4)], 1), mask[:, :11], [4, 8, 9, 11], cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 6
    found = its(ids[:, 6:], attention_mask=mask, **{CACHE: cache}).logits
    assert_close(found, whole[:, 6:], 1e-12)


@cached
def test_rows_change_places(block):
    its, ids, mask = model(block), tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    whole, cache = called(its, ids, mask)[0], DynamicCache(config=its.config)
    called(its, ids[:, :9], mask[:, :9], [4, 9], cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 3, 1, 0]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    found = its(ids[:, 9:].flip(0), **{CACHE: cache}).logits
    assert_close(found, whole[:, 9:].flip(0), 1e-12)


def test_what_a_cache_holds():
    its, ids, mask = model("chosen"), tokens(2, 15), torch.ones(2, 15, dtype=torch.long)
    _, chosen = called(its, ids, mask)
    cache = DynamicCache(config=its.config)
    called(its, ids, mask, range(1, 16), cache)
    for layer, weights in zip(cache.layers, chosen, strict=True):
        columns = int((weights >= 0).any(0).sum())
        assert isinstance(layer, MoreThanKeys) and columns < 15
        assert layer.inner.keys.shape == (2, 2, columns, 8) and layer.inner.values.shape[-1] == 0
        assert layer.scores["rotary_interaction"].shape == (2, 15)
        assert layer.places.shape == (2, columns)
        layer.offload()
        layer.prefetch()


def test_it_goes_on_from_a_cache_and_from_embeddings():
    its, ids = model("all"), tokens()
    whole = write(its, ids, max_new_tokens=6)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = its.generate(ids, **options)
    assert torch.equal(
        write(its, first.sequences, max_new_tokens=3, **{CACHE: first[CACHE]}), whole
    )
    embeds = its.get_input_embeddings()(ids)
    assert torch.equal(write(its, None, inputs_embeds=embeds, max_new_tokens=6), whole[:, 9:])


def test_training_keeps_no_cache():
    its = model("all").train()
    assert getattr(its(tokens()), CACHE) is None
    assert getattr(its.eval()(tokens()), CACHE).get_seq_length() == 9


def test_refusals():
    its = model("all")
    with pytest.raises(ValueError, match="got a mask for every pair with a cache; type `use_cache"):
        inputs = {"attention_mask": torch.zeros(2, 1, 9, 9), CACHE: DynamicCache()}
        its(tokens(), **inputs)
    newton = plain([{**ATTENTION, "update": {"Newton": {}}, "routed": SHARE}])
    with pytest.raises(ValueError, match="asks for energies or Hessians in its steps"):
        newton(tokens(), **{CACHE: DynamicCache()})
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        states = model("states")
        getattr(states(tokens()), CACHE).crop(-1)
