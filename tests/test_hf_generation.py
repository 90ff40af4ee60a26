"""`generate` of transformers: with a cache of any kind it writes what it writes without one.

tests/README.md says which check of the common suites of transformers each of these stands for.
"""

import pytest
import torch

pytest.importorskip("transformers")

from language_models import (
    ALIBI,
    ATTENTION,
    BLOCKS,
    EVERY,
    MLP,
    UNCACHED,
    WAYS,
    WIDTH,
    blocks,
    cached,
    model,
    tokens,
    write,
)
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers import logging as hf_logging
from transformers.generation import GenerationMixin

from cem.hf import CEMForCausalLM
from cem.lm.model import CACHE

croppable = pytest.mark.parametrize("block", [name for name in BLOCKS if name != "linear"])


@pytest.mark.parametrize(
    "block, way",
    # Newton's blocks keep no cache and say so, in whatever way it is asked for.
    [(block, way) for block in BLOCKS for way in WAYS]
    + [("newton", "greedy"), ("newton", "beams")],
)
def test_a_cache_changes_nothing(block, way):
    its, options = model(EVERY[block]), WAYS[way]
    with_cache, without = (write(its, tokens(), **options, use_cache=on) for on in (True, False))
    assert with_cache.shape == (2 * options.get("num_return_sequences", 1), 9 + 5)
    assert torch.equal(with_cache, without)


@blocks
def test_all_outputs_have_their_shapes(block):
    its = model(block)
    for beams in (1, 2):
        out = its.generate(
            tokens(),
            max_new_tokens=3,
            do_sample=False,
            num_beams=beams,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
            output_attentions=True,
        )
        assert [tuple(one.shape) for one in out.scores] == [(2 * beams, 37)] * 3
        assert len(out.logits) == len(out.hidden_states) == 3
        assert [tuple(one.shape) for one in out.hidden_states[0]] == [(2 * beams, 9, WIDTH)] * 3
        lengths = [states[0].shape[1] for states in out.hidden_states]
        assert lengths == ([9, 10, 11] if block is UNCACHED else [9, 1, 1])
        assert out.attentions == (None, None, None)
        if block is not UNCACHED:
            assert out[CACHE].get_seq_length() == 9 + 3 - 1


@blocks
def test_eager_writes_the_same(block):
    its = model(block)
    expected = write(its, tokens())
    its.set_attn_implementation("eager")
    assert torch.equal(write(its, tokens()), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@cached
def test_every_kind_of_cache(block, kind):
    its, expected = model(block), write(model(block), tokens())
    found = write(its, tokens(), cache_implementation=kind, disable_compile=True)
    assert torch.equal(found, expected)
    if kind == "static":
        cache = StaticCache(config=its.config, max_cache_len=20)
        assert torch.equal(write(its, tokens(), **{CACHE: cache}), expected)


def test_a_cache_of_mixed_layers():
    """States beside keys, and a block that keeps nothing in front of those that do."""
    linear = {"energy": "gated_linear_attention", "heads": 2, "rank": 8}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for parts in ([[linear, MLP], [ATTENTION]], [[ALIBI], [linear]], [[MLP], [ATTENTION], [MLP]]):
        its = model(parts)
        for options in ({}, {"attention_mask": mask}):
            expected = write(its, tokens(), use_cache=False, **options)
            assert torch.equal(write(its, tokens(), **options), expected)
            static = {"cache_implementation": "static", "disable_compile": True}
            assert torch.equal(write(its, tokens(), **static, **options), expected)


def test_other_caches_say_what_they_need():
    its = model()
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match="CUDA|accelerator"):
            write(its, tokens(), cache_implementation="offloaded")
    try:
        import optimum.quanto  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="quanto"):
            write(its, tokens(), cache_implementation="quantized")


@pytest.mark.parametrize(
    "block, kind",
    [(block, "dynamic") for block in EVERY] + [(block, "static") for block in BLOCKS],
)
def test_padding_on_the_left_changes_nothing(block, kind):
    its, ids, atol = model(EVERY[block]), tokens(), 1e-5 if block == "newton" else 1e-12
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = (
        {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
    )
    found = write(its, ids, attention_mask=mask, **options)
    assert torch.equal(found[:1, 9:], write(its, ids[:1, 3:])[:, 6:])
    assert torch.equal(found[1:], write(its, ids[1:]))
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = its(ids, attention_mask=mask, position_ids=places).logits
    alone = its(ids[:1, 3:]).logits
    assert torch.allclose(padded[:1, 3:], alone, rtol=0, atol=atol)
    assert torch.equal(write(its, ids, attention_mask=mask, position_ids=places), found)


@cached
def test_padding_on_the_right_changes_nothing(block):
    its, ids = model(block), tokens()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    padded, alone = its(ids, attention_mask=mask).logits, its(ids[:1, :6]).logits
    assert torch.allclose(padded[:1, :6], alone, rtol=0, atol=1e-12)


@croppable
def test_assistants_change_nothing(block):
    its, ids = model(block), tokens(1)
    expected = write(its, ids)
    for assistant in (model("tied", seed=2, num_hidden_layers=1), its):
        assistant.generation_config.num_assistant_tokens = 2
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assert torch.equal(write(its, ids, assistant_model=assistant), expected)
    repeating = ids[:, [0, 1, 2, 3, 0, 1, 2, 3, 0]]
    found = write(its, repeating, prompt_lookup_num_tokens=2)
    assert torch.equal(found, write(its, repeating))
    drawn = write(its, ids, assistant_model=its, do_sample=True)
    assert drawn.shape == expected.shape


def test_a_state_takes_no_assistant():
    with pytest.raises(ValueError, match="not supported with stateful models"):
        write(model("linear"), tokens(1), assistant_model=model())


@cached
def test_a_prompt_in_chunks(block):
    its = model(block)
    assert torch.equal(write(its, tokens(), prefill_chunk_size=4), write(its, tokens()))


@cached
def test_writing_goes_on_from_a_cache(block):
    its, ids = model(block), tokens()
    whole = write(its, ids, max_new_tokens=6)
    first = its.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    found = write(its, first.sequences, max_new_tokens=3, **{CACHE: first[CACHE]})
    assert torch.equal(found, whole)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
@cached
def test_embeddings_begin_a_text(block, options):
    its, ids = model(block), tokens()
    embeds, options = its.get_input_embeddings()(ids), {**options, "disable_compile": True}
    expected = write(its, ids, **options)
    assert torch.equal(write(its, ids, inputs_embeds=embeds, **options), expected)
    assert torch.equal(write(its, None, inputs_embeds=embeds, **options), expected[:, 9:])
    other = its.generate(
        inputs_embeds=torch.rand_like(embeds),
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert not torch.allclose(other.scores[0], its(ids).logits[:, -1].float())


def test_writing_goes_on_from_embeddings():
    its, ids = model(), tokens()
    embed = its.get_input_embeddings()
    whole = write(its, None, inputs_embeds=embed(ids), max_new_tokens=4)
    first = its.generate(
        inputs_embeds=embed(ids), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    embeds = torch.cat([embed(ids), embed(first.sequences)], 1)
    last = write(its, None, inputs_embeds=embeds, max_new_tokens=1, **{CACHE: first[CACHE]})
    assert torch.equal(torch.cat([first.sequences, last], 1), whole)


def test_a_text_from_nothing():
    assert model(bos_token_id=1).generate(max_new_tokens=3, do_sample=False).shape == (1, 4)


def test_all_scores_or_the_last_only():
    its = model()
    assert torch.equal(write(its, tokens(), logits_to_keep=0), write(its, tokens()))


def test_inputs_are_passed_on():
    its = model()
    found = its.prepare_inputs_for_generation(
        tokens(), position_ids=torch.arange(9)[None], output_hidden_states=True, other=42
    )
    assert found["output_hidden_states"] is True and found["other"] == 42
    assert torch.equal(found["input_ids"], tokens())
    assert GenerationMixin in CEMForCausalLM.__bases__


NOT_CACHED = {
    "newton": (UNCACHED[0], "asks for energies or Hessians"),
    "pairs": (
        {"energy": "soft_capped_interaction", "heads": 2, "rank": 8},
        "cannot be decoded token by token",
    ),
}


@pytest.mark.parametrize("part", NOT_CACHED)
def test_layers_without_a_cache_are_said_once(part, said):
    hf_logging.get_logger("cem.lm.model").warning_once.cache_clear()
    part, why = NOT_CACHED[part]
    its = model([part, MLP])
    for _ in range(2):
        write(its, tokens())
    told = [record.message for record in said.records if "without a cache" in record.message]
    assert len(told) == 1 and why in told[0]
    assert getattr(its(tokens()), CACHE) is None
    with pytest.raises(ValueError, match=why):
        its(tokens(), **{CACHE: DynamicCache(config=its.config)})
    with pytest.raises(ValueError, match="give `input_ids`"):
        write(its, None, inputs_embeds=its.get_input_embeddings()(tokens()))


def test_a_mask_of_pairs_does_not_go_into_a_state():
    its = model("linear")
    cache = DynamicCache(config=its.config)
    with pytest.raises(
        ValueError, match="a mask for every pair with a cache; type `use_cache=False`"
    ):
        its(tokens(), attention_mask=torch.zeros(2, 1, 9, 9), **{CACHE: cache})


@pytest.mark.slow
@pytest.mark.parametrize("block", ["tied", "recursion"])
def test_a_step_compiles_to_one_graph(block):
    its = model(block, dtype=torch.float32, num_hidden_layers=1)
    once = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    once._compile_all_devices = True
    torch.compiler.reset()
    for seed in (1, 2):
        ids = tokens(seed=seed)
        with torch._dynamo.config.patch(error_on_recompile=seed == 2):
            found = its.generate(
                ids,
                max_new_tokens=5,
                do_sample=False,
                cache_implementation="static",
                compile_config=once,
                return_dict_in_generate=True,
                output_hidden_states=True,
            )
        assert torch.equal(found.sequences, write(its, ids))
        assert [states[0].shape[1] for states in found.hidden_states] == [9, 1, 1, 1, 1]
    assert hasattr(its, "_compiled_call")
