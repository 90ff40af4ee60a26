"""What transformers expects of any model: configuration, files, weights, outputs, gradients.

tests/README.md says which check of the common suites of transformers each of these stands for.
"""

import copy
import json
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from language_models import BLOCKS, UNCACHED, VOCAB, WIDTH, config, model, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    set_seed,
)
from transformers import logging as hf_logging

from cem.hf import (
    CEMConfig,
    CEMForCausalLM,
    CEMForQuestionAnswering,
    CEMForSequenceClassification,
    CEMForTokenClassification,
    CEMModel,
)

hf_logging.disable_progress_bar()

KINDS = {
    CEMModel: AutoModel,
    CEMForCausalLM: AutoModelForCausalLM,
    CEMForSequenceClassification: AutoModelForSequenceClassification,
    CEMForTokenClassification: AutoModelForTokenClassification,
    CEMForQuestionAnswering: AutoModelForQuestionAnswering,
}
EVERY = {**BLOCKS, "newton": UNCACHED}
blocks = pytest.mark.parametrize("block", EVERY.values(), ids=EVERY)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def said(caplog, monkeypatch):
    """What transformers logs."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("cem"), "propagate", True)
    return caplog


# Configuration


@pytest.mark.parametrize("block", BLOCKS)
def test_a_configuration_is_its_file(block, tmp_path):
    its = config(block, bos_token_id=1, num_labels=4)
    assert json.loads(its.to_json_string())["hidden_size"] == WIDTH
    its.to_json_file(tmp_path / "written.json")
    its.save_pretrained(tmp_path / "inner")
    for found in (
        CEMConfig.from_json_file(tmp_path / "written.json"),
        CEMConfig.from_pretrained(tmp_path, subfolder="inner"),
        AutoConfig.from_pretrained(tmp_path / "inner"),
    ):
        assert isinstance(found, CEMConfig)
        assert found.to_dict() | {"_name_or_path": ""} == its.to_dict()
        assert found.blocks == its.blocks


def test_a_configuration_takes_what_all_take(tmp_path):
    assert CEMConfig().hidden_size == 512
    its = CEMConfig(num_labels=5, output_hidden_states=True, return_dict=False, dtype="bfloat16")
    assert (len(its.id2label), its.output_hidden_states, its.return_dict) == (5, True, False)
    its.num_labels = 3
    assert len(its.id2label) == len(its.label2id) == 3
    its.save_pretrained(tmp_path)
    assert CEMConfig.from_pretrained(tmp_path).dtype is torch.bfloat16


# Files


@pytest.mark.parametrize(
    "kind, block",
    [(CEMForCausalLM, block) for block in EVERY]
    + [(kind, "tied") for kind in KINDS if kind is not CEMForCausalLM],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_what_is_saved_is_loaded(kind, block, tmp_path):
    its = model(EVERY[block], kind, pad_token_id=0)
    first = its(tokens())[0]
    for _ in range(2):  # what was loaded can be saved as well
        its.save_pretrained(tmp_path)
        its, told = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"]
        # Weights that lie elsewhere in memory are multiplied in another order, which Newton's solver blows up.
        assert torch.allclose(
            its(tokens())[0], first, rtol=0, atol=1e-8 if block == "newton" else 1e-12
        )
        assert all(parameter.is_contiguous() for parameter in its.parameters())
    assert type(KINDS[kind].from_pretrained(tmp_path)) is kind
    assert (tmp_path / "generation_config.json").exists() == kind.can_generate()


def test_a_model_in_shards(tmp_path):
    its = model()
    its.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same_weights(CEMForCausalLM.from_pretrained(tmp_path), its)


def test_a_tied_head_is_not_in_the_file(tmp_path):
    its = model()
    its.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    found = CEMForCausalLM.from_pretrained(tmp_path)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_an_untied_head_is_in_the_file(tmp_path):
    its = model(tie_word_embeddings=False)
    assert its.lm_head.weight is not its.model.embed_tokens.weight
    its.save_pretrained(tmp_path)
    found, told = CEMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and same_weights(found, its)


def test_the_tied_weights_are_those_that_are_said_to_be():
    shared = {}
    for name, tensor in model().state_dict().items():
        shared.setdefault(tensor.data_ptr(), []).append(name)
    assert [names for names in shared.values() if len(names) > 1] == [
        ["model.embed_tokens.weight", "lm_head.weight"]
    ]
    assert CEMForCausalLM._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_weights_alone_are_enough():
    its = model()
    found = CEMForCausalLM.from_pretrained(None, config=its.config, state_dict=its.state_dict())
    assert same_weights(found, its.to(found.dtype))


def test_what_a_file_lacks_is_said(tmp_path):
    its = model(tie_word_embeddings=False)
    its.base_model.save_pretrained(tmp_path)
    found, told = CEMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert told["missing_keys"] == {"lm_head.weight"}
    assert same_weights(found.model, its.model)
    assert same_weights(CEMModel.from_pretrained(tmp_path), its.model)
    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found, told = CEMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert told["missing_keys"] == set(dict(found.named_parameters()))
    assert told["unexpected_keys"] == {"other"}


def test_other_shapes_are_refused_or_drawn_afresh(tmp_path, said):
    model(kind=CEMForSequenceClassification, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        CEMForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    found = CEMForSequenceClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    assert "Reinit due to size mismatch" in said.text
    assert found.score.weight.shape == (7, WIDTH) and found.score.weight.std() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "auto"])
def test_a_type_is_loaded(dtype, tmp_path):
    model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    expected = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    old, new = (
        CEMForCausalLM.from_pretrained(tmp_path, **{k: dtype}) for k in ("torch_dtype", "dtype")
    )
    assert {p.dtype for p in old.parameters()} == {p.dtype for p in new.parameters()} == {expected}
    assert old(tokens()).logits.dtype == expected
    made = AutoModelForCausalLM.from_config(config(), dtype=expected)
    assert {parameter.dtype for parameter in made.parameters()} == {expected}


def test_torch_save_and_a_state_dict(tmp_path):
    its, other = model(), model(seed=1)
    torch.save(its.state_dict(), tmp_path / "weights.bin")
    other.load_state_dict(torch.load(tmp_path / "weights.bin"))
    assert same_weights(its, other)


@blocks
def test_copies_and_pickles_are_the_model(block):
    its = model(block)
    first = its(tokens()).logits
    for other in (copy.deepcopy(its), pickle.loads(pickle.dumps(its))):
        assert torch.equal(other(tokens()).logits, first)


@pytest.mark.parametrize("where", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_a_device_map(where, tmp_path):
    its = model()
    its.save_pretrained(tmp_path)
    found = CEMForCausalLM.from_pretrained(tmp_path, device_map=where)
    assert torch.allclose(found(tokens()).logits, its(tokens()).logits, rtol=0, atol=1e-12)


def test_blocks_on_the_disk(tmp_path):
    its = model(tie_word_embeddings=False)
    its.save_pretrained(tmp_path)
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    where |= {"model.norm": "cpu", "lm_head": "disk"}
    found = CEMForCausalLM.from_pretrained(
        tmp_path, device_map=where, offload_folder=tmp_path / "offload"
    )
    assert found.model.layers[1].parts["gated_silu"].U.device.type == "meta"
    assert torch.allclose(found(tokens()).logits, its(tokens()).logits, rtol=0, atol=1e-12)
    assert torch.equal(
        found.generate(tokens(), max_new_tokens=3, do_sample=False),
        its.generate(tokens(), max_new_tokens=3, do_sample=False),
    )


# Weights


@blocks
def test_missing_weights_are_drawn_as_new_ones(block, monkeypatch):
    initialize = PreTrainedModel._initialize_weights

    def seeded(*args, **kwargs):
        set_seed(3)
        initialize(*args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", seeded)
    new = CEMForCausalLM(config(block))
    loaded = CEMForCausalLM.from_pretrained(None, config=config(block), state_dict={})
    assert same_weights(new, loaded)
    for one, other in zip(new.buffers(), loaded.buffers(), strict=True):
        assert torch.equal(one, other)


@blocks
def test_a_model_made_on_meta_is_filled(block):
    with torch.device("meta"):
        its = CEMForCausalLM(config(block))
    assert {tensor.device.type for tensor in its.state_dict().values()} == {"meta"}
    its.to_empty(device="cpu")
    for buffer in its.buffers():
        buffer.fill_(torch.nan)
    its.init_weights()
    fresh = CEMForCausalLM(config(block))
    for one, other in zip(its.buffers(), fresh.buffers(), strict=True):
        assert torch.equal(one, other)
    assert its(tokens()).logits.isfinite().all()


def test_nothing_is_loaded_onto_meta(tmp_path):
    model().save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
        CEMForCausalLM.from_pretrained(tmp_path)


@kinds
def test_embeddings_are_found_and_set(kind):
    its = model(kind=kind)
    assert its.get_input_embeddings().weight.shape == (VOCAB, WIDTH)
    head = its.get_output_embeddings()
    assert (head is not None) == (kind is CEMForCausalLM)
    new = nn.Embedding(10, 10)
    its.set_input_embeddings(new)
    assert its.get_input_embeddings() is new
    assert kind.main_input_name == "input_ids"
    assert (its.base_model is its) == (kind is CEMModel)


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows_and_shrinks(tied):
    its = model(tie_word_embeddings=tied)
    before = its.get_input_embeddings().weight.clone()
    for size in (VOCAB + 10, VOCAB - 15):
        its.resize_token_embeddings(size)
        assert its.config.vocab_size == its.lm_head.out_features == size
        assert its.lm_head.weight.shape == its.get_input_embeddings().weight.shape == (size, WIDTH)
        assert (its.lm_head.weight is its.get_input_embeddings().weight) == tied
        assert its(tokens() % size, labels=tokens() % size).logits.shape == (2, 9, size)
        kept = min(size, VOCAB)
        assert torch.equal(its.get_input_embeddings().weight[:kept], before[:kept])
    head = its.lm_head.weight.clone()
    its.post_init()
    assert torch.equal(its.lm_head.weight, head)
    assert its.resize_token_embeddings(VOCAB, pad_to_multiple_of=64).weight.shape[0] == 64
    with pytest.raises(ValueError, match="not and integer"):
        its.resize_token_embeddings(VOCAB, pad_to_multiple_of=1.3)


# Outputs


@blocks
def test_a_row_is_the_same_in_any_batch(block):
    its = model(block)
    # Newton's conjugate gradients stop when all tokens of a batch are within their tolerance.
    atol = 1e-5 if block is UNCACHED else 1e-12
    together = its(tokens(4), output_hidden_states=True)
    alone = its(tokens(4)[:1], output_hidden_states=True)
    assert torch.allclose(together.logits[:1], alone.logits, rtol=0, atol=atol)
    for one, other in zip(together.hidden_states, alone.hidden_states, strict=True):
        assert torch.allclose(one[:1], other, rtol=0, atol=atol)
    assert torch.equal(its(tokens(4)).logits, together.logits)


@kinds
def test_tuples_are_the_outputs(kind):
    its = model(kind=kind, pad_token_id=0)
    for options in ({}, {"output_hidden_states": True}, {"use_cache": False}):
        with torch.no_grad():
            named = its(tokens(), **options, return_dict=True).to_tuple()
            plain = its(tokens(), **options, return_dict=False)
        assert isinstance(plain, tuple) and len(plain) == len(named)
        assert torch.equal(plain[0], named[0])


@kinds
def test_hidden_states_are_given(kind):
    for its, options in (
        (model(kind=kind, pad_token_id=0), {"output_hidden_states": True}),
        (model(kind=kind, pad_token_id=0, output_hidden_states=True), {}),
    ):
        states = its(tokens(), **options).hidden_states
        assert [tuple(state.shape) for state in states] == [(2, 9, WIDTH)] * 3
        states[0].retain_grad()
        its.zero_grad()
        its(tokens())
        states[-1].sum().backward()
        assert states[0].grad is not None
    last = model(kind=CEMModel)(tokens(), output_hidden_states=True)
    assert torch.equal(last.hidden_states[-1], last.last_hidden_state)


def test_there_are_no_attention_weights_and_that_is_said(said):
    assert model()(tokens(), output_attentions=True).attentions is None
    assert "no attention weights" in said.text


@pytest.mark.parametrize("kind", [CEMModel, CEMForCausalLM])
def test_embeddings_stand_for_tokens(kind):
    its = model(kind=kind)
    embeds = its.get_input_embeddings()(tokens())
    assert torch.equal(its(inputs_embeds=embeds)[0], its(tokens())[0])


@blocks
def test_the_loss_is_that_of_the_next_token(block):
    its, ids = model(block), tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    out = its(ids, labels=labels)
    expected = nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
    )
    counted = (labels[:, 1:] != -100).sum()
    assert torch.allclose(out.loss, expected / counted, rtol=1e-6)
    shared = its(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    assert torch.allclose(shared, expected / 40, rtol=1e-6)


def test_the_scores_of_some_tokens_only():
    its = model()
    every = its(tokens(), logits_to_keep=0).logits
    assert every.shape == (2, 9, VOCAB)
    assert torch.allclose(its(tokens(), logits_to_keep=2).logits, every[:, -2:], rtol=0, atol=1e-12)
    some = torch.tensor([1, 5])
    assert torch.allclose(its(tokens(), logits_to_keep=some).logits, every[:, some], atol=1e-12)


PROBLEMS = {
    "single_label_classification": (3, torch.tensor([0, 2])),
    "multi_label_classification": (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
    "regression": (1, torch.tensor([0.5, -0.5])),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_sequences_are_classified(problem):
    count, labels = PROBLEMS[problem]
    its = model(
        kind=CEMForSequenceClassification,
        dtype=torch.float32,
        num_labels=count,
        problem_type=problem,
        pad_token_id=0,
    )
    out = its(tokens(), labels=labels)
    assert out.logits.shape == (2, count)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in its.parameters())


def test_tokens_are_classified_and_answers_found():
    its = model(kind=CEMForTokenClassification, num_labels=3)
    out = its(tokens(), labels=tokens() % 3)
    assert out.logits.shape == (2, 9, 3) and out.loss.isfinite()
    its = model(kind=CEMForQuestionAnswering)
    ends = torch.tensor([2, 3])
    out = its(tokens(), start_positions=ends, end_positions=ends)
    assert out.start_logits.shape == out.end_logits.shape == (2, 9) and out.loss.isfinite()


def test_outputs_are_captured_once(monkeypatch):
    """Two captures inside one another would mix what they collect."""
    captured = pytest.importorskip("transformers.utils.output_capturing")
    depth, most = 0, 0
    enter, leave = captured._active_collector.set, captured._active_collector.reset

    def set_(value):
        nonlocal depth, most
        depth += 1
        most = max(most, depth)
        return enter(value)

    def reset(token):
        nonlocal depth
        depth -= 1
        leave(token)

    monkeypatch.setattr(captured._active_collector, "set", set_)
    monkeypatch.setattr(captured._active_collector, "reset", reset)
    model()(tokens(), output_hidden_states=True)
    assert (depth, most) == (0, 1)


# Attention


@pytest.mark.parametrize("padded", ["left", "right", None])
@blocks
def test_eager_and_sdpa_are_the_same(block, padded):
    # Llama's eager softmax is float32 in some versions of transformers.
    dtype, atol = (torch.float32, 1e-5) if block is BLOCKS["llama"] else (torch.float64, 1e-10)
    its, mask = model(block, dtype=dtype), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
        mask = mask.flip(1) if padded == "right" else mask
    inputs = {"input_ids": tokens(), "attention_mask": mask if padded else None}
    assert its.config._attn_implementation == "sdpa"
    first = its(**inputs).logits[mask.bool()]
    its.set_attn_implementation("eager")
    assert its.config._attn_implementation == "eager"
    assert torch.allclose(its(**inputs).logits[mask.bool()], first, rtol=0, atol=atol)


def test_attention_is_chosen_in_every_way(tmp_path):
    model("llama").save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        its = CEMForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert its.config._attn_implementation == name
        assert its.model.layers[0].parts["attention"].module.config._attn_implementation == name
        assert CEMConfig(attn_implementation=name)._attn_implementation == name
    its.set_attn_implementation("eager")
    assert its.model.layers[0].parts["attention"].module.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2", "foo"])
def test_other_kernels_are_refused(name):
    its = model()
    with pytest.raises((ValueError, ImportError), match="support|not supported|Flash"):
        its.set_attn_implementation(name)
    assert its.config._attn_implementation == "sdpa"
    assert its(tokens()).logits.isfinite().all()


@blocks
def test_documents_in_one_row_are_apart(block):
    """Whether a cache is made, as a plain call does, or not."""
    its, ids = model(block), tokens(1, 11)
    places = torch.cat([torch.arange(4), torch.arange(7)])[None]
    alone = torch.cat([its(ids[:, :4]).logits, its(ids[:, 4:]).logits], 1)
    for use_cache in (None, True, False):
        packed = its(ids, position_ids=places, use_cache=use_cache).logits
        assert torch.allclose(packed, alone, rtol=0, atol=1e-5 if block is UNCACHED else 1e-12)


@blocks
def test_a_mask_of_pairs(block):
    """Three endings of one beginning, side by side."""
    its = model(block)
    ids = torch.tensor([[10, 11, 12, 13], [10, 11, 12, 14], [10, 11, 12, 15]])
    alone = its(ids).logits[:, -1]
    seen = torch.ones(6, 6).tril()
    seen[4, 3] = seen[5, 3] = seen[5, 4] = 0
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    mask = mask.masked_fill(seen == 0, torch.finfo(torch.float64).min)
    together = its(
        torch.tensor([[10, 11, 12, 13, 14, 15]]),
        attention_mask=mask,
        position_ids=torch.tensor([[0, 1, 2, 3, 3, 3]]),
    )
    expected = 1e-5 if block is UNCACHED else 1e-10
    assert torch.allclose(together.logits[0, -3:], alone, rtol=0, atol=expected)


# Training


@blocks
def test_every_parameter_has_a_gradient_and_checkpoints_change_none(block):
    its = model(block).train()
    its.config.use_cache = False
    new = hasattr(its, "activation_checkpointing_enable")
    enable, disable = (
        getattr(its, f"{'activation' if new else 'gradient'}_checkpointing_{which}")
        for which in ("enable", "disable")
    )
    assert not its.model.layers[0].gradient_checkpointing

    def gradients():
        its.zero_grad()
        its(tokens(), labels=tokens()).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in its.named_parameters()}

    plain = gradients()
    assert all(gradient.isfinite().all() for gradient in plain.values())
    for reentrant in (False, True):
        enable({"use_reentrant": reentrant})
        assert its.model.layers[0].gradient_checkpointing
        its.enable_input_require_grads()
        again = gradients()
        its.disable_input_require_grads()
        for name, gradient in plain.items():
            assert torch.allclose(again[name], gradient, rtol=0, atol=1e-8), name
    disable()
    assert not its.model.layers[0].gradient_checkpointing
    its._hf_peft_config_loaded = True  # as with an adapter in it
    enable()
    assert its.model.layers[0].gradient_checkpointing


def test_checkpoints_are_turned_on_by_the_configuration():
    its = CEMForCausalLM(config(gradient_checkpointing=True))
    assert its.model.layers[0].gradient_checkpointing


def test_the_trainer_trains_and_goes_on(tmp_path):
    transformers = pytest.importorskip("transformers", reason="trainer")
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 8)]

    def trained(folder, resume=None, **options):
        arguments = transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        its = model("tied", dtype=torch.float32)
        trainer = transformers.Trainer(its, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return its, trainer.state.log_history

    straight, log = trained(tmp_path / "one", max_steps=4, logging_steps=1)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed, _ = trained(tmp_path / "two", str(tmp_path / "one" / "checkpoint-2"), max_steps=4)
    assert same_weights(straight, resumed)


def test_a_bfloat16_file_trains_on_in_float32(tmp_path):
    model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    its = CEMForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    its(tokens(), labels=tokens()).loss.backward()
    assert {parameter.grad.dtype for parameter in its.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert its(tokens(), labels=tokens()).loss.isfinite()


# Graphs


@pytest.mark.slow
@pytest.mark.parametrize("block", ["tied", "llama"])
def test_a_training_step_compiles_to_one_graph(block):
    its = model(block, dtype=torch.float32).train()
    inputs = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}
    its(**inputs).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in its.named_parameters()}
    its.zero_grad()
    torch.compile(its, fullgraph=True, backend="aot_eager")(**inputs).loss.backward()
    for name, parameter in its.named_parameters():
        assert torch.allclose(parameter.grad, plain[name], atol=1e-5), name


@blocks
def test_a_model_is_exported(block):
    if block is UNCACHED:
        pytest.skip("conjugate gradients stop by what they read")
    its = model(block)
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    program = torch.export.export(its, (), {**inputs, "use_cache": False})
    found = program.module()(**inputs, use_cache=False).logits
    assert torch.allclose(found, its(**inputs).logits, rtol=0, atol=1e-12)


TASKS = {
    "text-generation": (CEMForCausalLM, "generated_text"),
    "feature-extraction": (CEMModel, None),
    "text-classification": (CEMForSequenceClassification, "score"),
    "token-classification": (CEMForTokenClassification, "score"),
}


@pytest.mark.parametrize("task", TASKS)
def test_pipelines(task, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

    kind, key = TASKS[task]
    words = {word: place for place, word in enumerate("? the cat sat on a mat".split())}
    written = Tokenizer(models.WordLevel(words, unk_token="?"))
    written.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=written, pad_token="?").save_pretrained(tmp_path)
    model(kind=kind, vocab_size=len(words), pad_token_id=0).save_pretrained(tmp_path)
    run = pipeline(
        task,
        model=str(tmp_path),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
        device="cpu",
    )
    options = {"max_new_tokens": 4, "do_sample": False} if kind is CEMForCausalLM else {}
    found = run("the cat sat", **options)
    if kind is CEMModel:
        assert torch.tensor(found).shape == (1, 3, WIDTH)
    elif kind is CEMForCausalLM:
        assert found[0][key].startswith("the cat sat")
    else:
        assert 0 < found[0][key] <= 1


def test_this_table_is_what_is_tested():
    here = Path(__file__).parent
    files = ("test_hf_model.py", "test_hf_generation.py")
    tests = set(
        re.findall(r"^def (test_\w+)", "".join((here / f).read_text() for f in files), re.M)
    )
    text = (here / "README.md").read_text()
    suites, rest = text.split("## Beyond the common suites")
    rows = re.findall(r"^\| (\w+) \| (passed|not applicable|not run) \| (.+) \|$", suites, re.M)
    assert len({name for name, *_ in rows}) == len(rows)
    for name, result, why in rows:
        named = re.findall(r"`(test_\w+)`", why)
        assert (result != "passed" or len(named) == 1) and tests.issuperset(named), name
    told = re.search(r"Of (\d+) checks, (\d+) passed, 0 failed, (\d+) are .* and (\d+) were", text)
    results = [result for _, result, _ in rows]
    counts = [results.count(result) for result in ("passed", "not applicable", "not run")]
    assert list(map(int, told.groups())) == [len(rows), *counts]
    named = set(re.findall(r"`(test_\w+)`", rest))
    assert named <= tests
    assert tests - named - {n for *_, why in rows for n in re.findall(r"`(test_\w+)`", why)} == {
        "test_this_table_is_what_is_tested"
    }
