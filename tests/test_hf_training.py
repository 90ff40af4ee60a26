"""What transformers does with any model: training, graphs, pipelines.

tests/README.md says which check of the common suites of transformers each of these stands for.
"""

import pytest
import torch

pytest.importorskip("transformers")

from language_models import BLOCKS, WIDTH, blocks, config, model, same_weights, tokens

from cem.hf import CEMForCausalLM, CEMForSequenceClassification, CEMForTokenClassification, CEMModel

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
    its = model(block, dtype=torch.float32, num_hidden_layers=1).train()
    inputs = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}
    its(**inputs).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in its.named_parameters()}
    its.zero_grad()
    torch.compile(its, fullgraph=True, backend="aot_eager")(**inputs).loss.backward()
    for name, parameter in its.named_parameters():
        assert torch.allclose(parameter.grad, plain[name], atol=1e-5), name


@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_is_exported(block):
    """All but Newton's: conjugate gradients stop by the numbers that they read."""
    its = model(block)
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    program = torch.export.export(its, (), {**inputs, "use_cache": False})
    found = program.module()(**inputs, use_cache=False).logits
    assert torch.allclose(found, its(**inputs).logits, rtol=0, atol=1e-12)


# Pipelines


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
