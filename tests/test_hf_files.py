"""What transformers expects of the files of any model: configuration, weights, devices.

tests/README.md says which check of the common suites of transformers each of these stands for.
"""

import copy
import json
import pickle

import pytest
import torch

pytest.importorskip("transformers")

from language_models import BLOCKS, EVERY, KINDS, WIDTH, blocks, config, model, same_weights, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cem.hf import CEMConfig, CEMForCausalLM, CEMForSequenceClassification, CEMModel


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
