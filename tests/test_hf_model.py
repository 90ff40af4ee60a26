"""What transformers expects of any model: weights, outputs, gradients.

tests/README.md says which check of the common suites of transformers each of these stands for.
"""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from language_models import (
    UNCACHED,
    VOCAB,
    WIDTH,
    blocks,
    config,
    kinds,
    model,
    same_weights,
    tokens,
)
from torch import nn
from transformers import PreTrainedModel, set_seed

from cem.hf import (
    CEMForCausalLM,
    CEMForQuestionAnswering,
    CEMForSequenceClassification,
    CEMForTokenClassification,
    CEMModel,
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


def test_this_table_is_what_is_tested():
    here = Path(__file__).parent
    text = "".join(file.read_text() for file in here.glob("test_hf_*.py"))
    tests = set(re.findall(r"^def (test_\w+)", text, re.M))
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
