"""Training: what a run leaves behind, and what it refuses to begin."""

import itertools
import json
import math

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from accelerate.utils import DistributedType
from training_runs import ENERGIES, Killed, data, tiny_run
from transformers import AutoModelForCausalLM, TrainingArguments

import cem.lm
from cem.lm import Data, pictures, training
from cem.lm.callbacks import Clock, Records, read_records
from cem.lm.run import Run
from cem.lm.trainer import PARTIAL, _check_engine, checkpoints

pytestmark = pytest.mark.usefixtures("no_pictures")
SAVE = pictures.save


# What it leaves behind


def test_a_run_leaves_what_is_needed_to_read_it(trained):
    out, result = trained
    assert Run.read(out / "run.yaml") == tiny_run()
    versions = json.loads((out / "versions.json").read_text())
    assert versions["torch"] == torch.__version__ and versions["digest"] == result.digest
    assert versions["data"]["tokenizers"] == versions["tokenizers"]
    assert [c.name for c in checkpoints(out)] == ["checkpoint-9", "checkpoint-12"]
    SAVE(out)
    assert (out / "loss.png").stat().st_size > 1000
    assert not (out / PARTIAL).exists() and not list(out.glob(".*partial"))
    lines = read_records(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [5, 10, 12]
    assert lines[-1]["tokens"] == result.tokens == 12 * 4 * 16
    assert lines[-1]["held_out_loss"] == result.loss
    assert result.seed == 0 and result.processes == 1
    assert result.parameters == AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert 0 < result.mfu and 0 < result.tokens_per_second and result.peak_memory > 10**8


def test_a_finished_run_is_not_run_again(trained, monkeypatch):
    monkeypatch.setattr(training, "_trainer", None)
    assert cem.lm.train(tiny_run(), trained[0]) == trained[1]


def test_a_folder_holds_one_run(trained):
    with pytest.raises(
        ValueError, match="holds another run: its `trainer.max_steps` is 12, got 13"
    ):
        cem.lm.train(tiny_run(trainer={"max_steps": 13}), trained[0])
    how = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert cem.lm.train(tiny_run(trainer=how, threads=2), trained[0]) == trained[1]


def test_the_held_out_loss_counts_every_token_once(trained):
    out, result = trained
    model = AutoModelForCausalLM.from_pretrained(out)
    nats, count, prepared = 0.0, 0, Data(**data()).prepare()
    assert len(prepared.held_out) % 3, "a batch that is not full shows what is left out"
    for item in prepared.held_out:  # one by one, where the run took threes
        batch = {name: value[None] for name, value in item.items() if name != "labels"}
        scores = model(**batch, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        for t, label in enumerate(item["labels"][1:].tolist()):
            if label != -100:
                nats, count = nats - scores[t, label].item(), count + 1
    assert count == prepared.held_out.predicted
    # the model computes in float32
    assert result.loss == pytest.approx(nats / count, rel=1e-6)
    bits = result.loss / math.log(2) / prepared.bytes_per_token
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-12)
    assert cem.lm.evaluate(out) == {"loss": result.loss, "bits_per_byte": result.bits_per_byte}


def test_a_trained_model_writes(trained):
    first = cem.lm.sample(trained[0], "abc", tokens=6, seed=1)
    assert first.startswith("abc") and len(first) > 3
    assert first == cem.lm.sample(trained[0], "abc", tokens=6, seed=1)
    assert cem.lm.sample(trained[0], "", tokens=2)


def test_gradients_are_accumulated_over_all_tokens(trained, tmp_path):
    """Twice two windows are four: the same batches, so nearly the same losses, in the same tokens."""
    half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    result = cem.lm.train(tiny_run(trainer=half), tmp_path)
    assert result.tokens == trained[1].tokens
    # float32, summed in another order
    assert result.loss == pytest.approx(trained[1].loss, abs=1e-4)


def test_what_was_not_trained_cannot_be_read(tmp_path):
    for read in (cem.lm.evaluate, lambda out: cem.lm.sample(out, "a")):
        with pytest.raises(ValueError, match="there is no trained model in .*; type `cem train"):
            read(tmp_path)


def test_a_checkpoint_writes(trained):
    assert cem.lm.sample(checkpoints(trained[0])[-1], "abc", tokens=2).startswith("abc")


def test_other_data_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text(tiny_run().to_yaml())
    (tmp_path / "versions.json").write_text('{"digest": "other"}')
    with pytest.raises(
        ValueError, match="the data of .* have changed .*: got digest .* and not other"
    ):
        cem.lm.train(tiny_run(), tmp_path)


def test_a_run_that_does_not_start_claims_no_folder(tmp_path):
    for wrong in ({"optim": "sdg"}, {"per_device_train_batch_size": 640}):
        with pytest.raises(ValueError):
            cem.lm.train(tiny_run(trainer=wrong), tmp_path)
    cem.lm.train(tiny_run(trainer={"max_steps": 1}), tmp_path)


def test_too_little_data(tmp_path):
    run = tiny_run(trainer={"per_device_train_batch_size": 640})
    with pytest.raises(
        ValueError, match="got .* and 640; type `trainer.per_device_train_batch_size"
    ):
        cem.lm.train(run, tmp_path)


def test_training_learns(tmp_path):
    run = tiny_run(trainer={"max_steps": 60, "learning_rate": 0.02, "eval_steps": 60})
    result = cem.lm.train(run, tmp_path)
    first = read_records(tmp_path / "metrics.jsonl")[0]["loss"]
    assert first > 5.4 and result.loss < 3.2


def test_fsdp_that_is_not_set_up_is_refused(tmp_path, monkeypatch):
    message = "FSDP was asked for and is not what runs: got NO on .*; .*`trainer.fsdp`"
    with pytest.raises(ValueError, match=message):
        cem.lm.train(tiny_run(trainer={"fsdp": True}), tmp_path / "a")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=message):
        cem.lm.train(tiny_run(), tmp_path / "b")
    with pytest.raises(ValueError, match="got MULTI_CPU on cpu; start it on GPUs"):
        _check_engine(TrainingArguments(use_cpu=True), DistributedType.MULTI_CPU)
    _check_engine(TrainingArguments(use_cpu=True), DistributedType.FSDP)


# How it trains


def test_schedules_are_those_of_transformers(tmp_path):
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2}
    schedule["lr_scheduler_kwargs"] = {"num_decay_steps": 4}
    cem.lm.train(tiny_run(trainer=schedule | {"learning_rate": 0.1}), tmp_path)
    rates = [
        line["learning_rate"] for line in read_records(tmp_path / "metrics.jsonl") if "loss" in line
    ]
    assert rates[:3] == [0.0, 0.05, 0.1] and rates[2:9] == [0.1] * 7 and rates[-1] < 0.02


def test_tensorboard_is_one_word(tmp_path):
    pytest.importorskip("tensorboard")
    run = tiny_run(trainer={"report_to": "tensorboard", "max_steps": 2})
    cem.lm.train(run, tmp_path)
    assert list(tmp_path.rglob("events.out.tfevents*"))


# Its energies


def test_the_energies_of_the_layers_are_recorded(tmp_path, monkeypatch):
    model = {"preset": "tiny", "hidden_size": 16, "num_hidden_layers": 2}
    model["block"] = [{"energy": "rotary_interaction", "heads": 2}, {"energy": "gated_silu"}]
    run = tiny_run(model=model, trace_steps=5, trainer={"per_device_eval_batch_size": 8})

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 11:
            raise Killed

    with monkeypatch.context() as patch:  # what was recorded after checkpoint 9 comes again
        patch.setattr(Clock, "on_step_begin", interrupt)
        with pytest.raises(Killed):
            cem.lm.train(run, tmp_path)
    cem.lm.train(run, tmp_path)
    lines = read_records(tmp_path / "energies.jsonl")
    names = [f"model.layers.{i}.parts.{n}" for i in (0, 1) for n in ENERGIES]
    steps = (0, 5, 10, 12)
    assert [(x["step"], x["layer"]) for x in lines] == list(itertools.product(steps, names))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(trained).__name__ == "CEMForCausalLM"
    batch = transformers.default_data_collator(Data(**data()).prepare().held_out)
    del batch["labels"]
    for line, layer in zip(lines[-4:], cem.trace(trained, use_cache=False, **batch), strict=True):
        assert line["before"] == pytest.approx(layer.before[0].mean().item(), rel=1e-6)
        assert line["after"] == pytest.approx(layer.after[0].mean().item(), rel=1e-6)
        assert line["down"] == layer.share_down and line["energy"] in ENERGIES


def test_pictures_of_energies(tmp_path):
    records = Records(tmp_path / "energies.jsonl", 0)
    for step, layer in itertools.product((0, 10, 20), range(3)):
        line = {"step": step, "layer": f"model.layers.{layer}.mlp", "energy": ENERGIES[layer % 2]}
        records.write(line | {"before": 0.0, "after": 1.0 - step - layer})
    SAVE(tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["energies.png"]
