"""Training: what a run says, what it leaves behind, and that an interruption changes nothing."""

import copy
import itertools
import json
import logging
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from accelerate.utils import DistributedType
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

import cem.lm
from cem.lm import Data, pictures, training
from cem.lm.callbacks import Clock, Records, read_records
from cem.lm.optimizer import Muon, decayed, hidden_matrices
from cem.lm.run import Run
from cem.lm.throughput import flops_per_token, peak_flops
from cem.lm.tokenizer import byte_tokenizer
from cem.lm.trainer import PARTIAL, Trainer, _check_engine, checkpoints

ROOT = Path(__file__).resolve().parents[1]
SAVE = pictures.save
ENERGIES = ("rotary_interaction", "gated_silu")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
STEPS = {
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "logging_steps": 1,
    "eval_steps": 5,
    "save_steps": 3,
}


DATA = {"tokenizer": "bytes", "context": 16, "held_out": 0.2}


@pytest.fixture(scope="module", autouse=True)
def _text(tmp_path_factory):
    """Short documents of a few words."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(12)]
    for number in range(40):
        text = " ".join(draw.choices(words, k=draw.randint(3, 9)))
        (folder / f"{number}.txt").write_text(f"{number} {text}")
    DATA.update(source=str(folder / "*.txt"), cache=str(folder / "cache"))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "save", lambda out: None)  # slow, and tested by itself


def tiny_run(**changes):
    trainer = STEPS | {"disable_tqdm": True} | changes.pop("trainer", {})
    return Run(**{"model": LLAMA, "data": DATA, "trainer": trainer} | changes)


def losses(out):
    """What the training saw: (step, loss, norm of the gradient), and (step, held-out loss)."""
    names = ("step", "loss", "grad_norm", "learning_rate", "held_out_loss", "tokens")
    return [[line.get(name) for name in names] for line in read_records(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder and the result of a run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "save", lambda out: None)
        out = tmp_path_factory.mktemp("trained")
        return out, cem.lm.train(tiny_run(), out)


# What a run says


def test_a_run_is_a_file_with_changes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: tiny\ntrainer:\n  learning_rate: 3e-4\n  max_steps: 5\ndata: {context: 8}\n"
    )
    changes = ["trainer.max_steps=20", "model.num_hidden_layers=3", "seed=4", "data.source=a=b"]
    run = Run.read(file, changes)
    assert run.trainer["learning_rate"] == 3e-4 and run.trainer["max_steps"] == 20
    assert run.model == {"preset": "tiny", "num_hidden_layers": 3}
    assert run.data == {"context": 8, "source": "a=b"} and run.seed == 4
    assert Run.from_yaml(run.to_yaml()) == run


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("off", "off"), ("true", True), ("False", False), ("3e-4", 3e-4), ("1.5", 1.5)]
    + [("2", 2), ("-1e3", -1000.0), (".5", 0.5), ("1.0e-2", 0.01), ("null", None), ("e4", "e4")],
)
def test_values_are_those_of_yaml_1_2(text, value):
    run = Run.from_yaml("", [f"model={{a: {text}}}"])
    assert run.model == {"a": value} and type(run.model["a"]) is type(value)
    assert Run.from_yaml(run.to_yaml()) == run


def test_the_defaults_are_those_of_pretraining(tmp_path):
    args = training.arguments(Run(), tmp_path)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.95, 0.1)
    assert args.max_grad_norm == 1.0 and args.lr_scheduler_type == "cosine"
    assert args.get_warmup_steps(1000) == 20 and args.optim == "adamw_torch_fused"
    assert args.data_seed == args.seed == 0


def test_schedules_are_those_of_transformers(tmp_path):
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2}
    schedule["lr_scheduler_kwargs"] = {"num_decay_steps": 4}
    cem.lm.train(tiny_run(trainer=schedule | {"learning_rate": 0.1}), tmp_path)
    rates = [
        line["learning_rate"] for line in read_records(tmp_path / "metrics.jsonl") if "loss" in line
    ]
    assert rates[:3] == [0.0, 0.05, 0.1] and rates[2:9] == [0.1] * 7 and rates[-1] < 0.02


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("moodel: tiny", [], "a run has no `moodel`: got that name; type `model`"),
        ("trainer: {max_step: 3}", [], "no `trainer.max_step`: .*type `trainer.max_steps`"),
        ("data: {contxt: 3}", [], "no `data.contxt`: .*type `data.context`"),
        ("", ["trainer.learning_rat=1"], "type `trainer.learning_rate`"),
        ("zzzz: 1", [], "type one of model, data, trainer"),
        ("a: [", [], "a run is not YAML: got .*; type `name: value`"),
        ("- a", [], "a run is written `name: value`: got .*type `model: tiny`"),
        ("seed: 1", ["seed"], "a change of a run is written NAME=VALUE: got `seed`"),
        ("seed: 1", [".a=1"], "a change of a run is written NAME=VALUE: got `.a=1`"),
        ("seed: 1", ["seed.a=1"], "`seed` in `seed.a=1` holds one value: got 1; type `seed=VALUE`"),
        ("seed: 1", ["seed=["], "the value of `seed` is not YAML"),
        ("data: 3", [], "`data` of a run holds names and values: got 3"),
        ("model: 3", [], "`model` of a run is a preset or a configuration: got 3"),
        ("optimizer: sgd", [], "must be adamw or muon: got 'sgd'; .*`trainer.optim=NAME`"),
        ("seed: x", [], "`seed` of a run must be an integer from 0: got 'x'; type `seed=1`"),
        ("threads: 0", [], "`threads` of a run must be an integer from 1: got 0"),
        ("trainer: {seed: 1}", [], "`trainer.seed` has another place: got 1; type `seed=0`"),
        ("trainer: {output_dir: a}", [], "`trainer.output_dir` has another place: .*`--out DIR`"),
    ],
)
def test_mistakes_in_a_run(text, changes, message):
    with pytest.raises(ValueError, match=message):
        Run.from_yaml(text, changes)


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no run .*none.yaml"):
        Run.read(tmp_path / "none.yaml")


def test_a_value_that_the_trainer_refuses(tmp_path):
    run = Run(trainer={"lr_scheduler_type": "cosin"})
    with pytest.raises(ValueError, match="`trainer` of the run is refused: got cosin is not"):
        training.arguments(run, tmp_path)


# Which model it builds


def test_the_vocabulary_and_the_ends_are_the_tokenizers():
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    for model in (LLAMA, {"preset": "llama-tiny", "num_hidden_layers": 1}, "tiny"):
        config = training.build(model, tokenizer).config
        assert config.vocab_size == len(tokenizer) == 257 and config.eos_token_id == end
    assert training.build({"preset": "tiny", "num_hidden_layers": 1}, tokenizer).config.blocks


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tine", "a preset is one of tiny, .*: got 'tine'; type 'tiny'"),
        ({"preset": "tiny", "hiden_size": 3}, "no `model.hiden_size`: .*type `model.hidden_size`"),
        ({"hidden_size": 3}, "needs a preset or a model_type: got .*; type `model.preset=tiny`"),
        ({"model_type": "llma"}, "a run has no `model_type llma`: .*`model_type llama`"),
        (LLAMA | {"hiden_size": 3}, "a run has no `model.hiden_size`: .*type `model.hidden_size`"),
        (LLAMA | {"vocab_size": 100}, "got 100 and 257; leave out `model.vocab_size`"),
    ],
)
def test_mistakes_in_a_model(model, message):
    with pytest.raises(ValueError, match=message):
        training.build(model, byte_tokenizer())


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
    nats, count, prepared = 0.0, 0, Data(**DATA).prepare()
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


# Interruptions


class Killed(BaseException):
    """What no code of a run catches."""


@pytest.mark.parametrize(("optimizer", "step"), [("adamw", 1), ("adamw", 12), ("muon", 5)])
def test_an_interrupted_run_takes_the_same_losses(optimizer, step, tmp_path, monkeypatch):
    assert 8 < len(Data(**DATA).prepare().train) // 4 < 20  # 30 steps are some epochs
    run = tiny_run(
        optimizer=optimizer, trainer={"max_steps": 30, "save_steps": 4, "logging_steps": 3}
    )
    cem.lm.train(run, tmp_path / "straight")

    last = step

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step >= last:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Clock, "on_step_begin", interrupt)
        for _ in range(2):
            with pytest.raises(Killed):
                cem.lm.train(run, tmp_path / "resumed")
            last += 13
    result = cem.lm.train(run, tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    assert result.loss == training.Result.read(tmp_path / "straight").loss


def test_a_run_that_goes_on_makes_no_remarks(tmp_path, monkeypatch):
    model = {"preset": "tiny", "num_hidden_layers": 1}
    run = tiny_run(model=model, trainer={"max_steps": 6, "eval_steps": 0.5}, trace_steps=0)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Clock, "on_step_begin", interrupt)
        with pytest.raises(Killed):
            cem.lm.train(run, tmp_path)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    cem.lm.train(run, tmp_path)
    assert not said


def test_a_half_written_checkpoint_is_never_picked_up(trained, tmp_path, monkeypatch):
    def interrupt(self, folder):
        if self.state.global_step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", interrupt)
        with pytest.raises(Killed):
            cem.lm.train(tiny_run(), tmp_path)
    assert (tmp_path / PARTIAL / "checkpoint-6" / "optimizer.pt").is_file()
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-3"]
    cem.lm.train(tiny_run(), tmp_path)
    assert losses(tmp_path) == losses(trained[0])
    assert not (tmp_path / PARTIAL).exists()


def test_a_run_without_its_result_gets_it(trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_model", save_model_or_stop)
        with pytest.raises(Killed):
            cem.lm.train(tiny_run(), tmp_path)
    monkeypatch.setattr(Trainer, "train", None)
    assert cem.lm.train(tiny_run(), tmp_path).loss == trained[1].loss
    assert cem.lm.evaluate(tmp_path)["loss"] == trained[1].loss


def save_model_or_stop(self, output_dir=None, _internal_call=False):
    if not _internal_call:
        raise Killed
    transformers.Trainer.save_model(self, output_dir, _internal_call)


def test_the_best_checkpoint_is_kept_and_found(tmp_path):
    best = {"load_best_model_at_end": True, "save_total_limit": 1, "learning_rate": 0.01}
    cem.lm.train(tiny_run(trainer=best | {"eval_steps": 3}), tmp_path)
    state = json.loads((checkpoints(tmp_path)[-1] / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) in checkpoints(tmp_path)


@pytest.mark.slow
def test_a_killed_run_takes_the_same_losses(tmp_path):
    run = tiny_run(trainer={"max_steps": 40, "save_steps": 6, "eval_steps": 20})
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "cem", "train", tmp_path / "run.yaml", "--out", out]
    process = subprocess.Popen(command, cwd=ROOT)
    step = random.Random().randint(8, 30)
    while process.poll() is None and len(read_records(out / "metrics.jsonl")) < step:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
    assert not (out / "result.json").exists() and checkpoints(out)
    resumed, straight = cem.lm.train(run, out), cem.lm.train(run, tmp_path / "straight")
    assert losses(out) == losses(tmp_path / "straight"), f"killed at step {step}"
    assert resumed.loss == straight.loss


def test_records_drop_what_comes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert Records(path, step=2).lines == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# Optimizers


def test_muon_is_torchs_on_matrices_and_adamw_elsewhere():
    W, b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))
    own_W, own_b = nn.Parameter(W.detach().clone()), nn.Parameter(b.detach().clone())
    groups = [{"params": [own_W], "muon": True}, {"params": [own_b], "weight_decay": 0.0}]
    own = Muon(groups, lr=0.1, weight_decay=0.2)
    muon = torch.optim.Muon([W], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([b], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(4):
        W.grad, b.grad = torch.randn(6, 4), torch.randn(5)
        own_W.grad, own_b.grad = W.grad.clone(), b.grad.clone()
        for optimizer in (own, muon, adamw):
            optimizer.step()
    assert torch.equal(own_W, W) and torch.equal(own_b, b)


def test_a_stack_of_heads_is_one_matrix_for_muon():
    Q = nn.Parameter(torch.randn(2, 3, 8))
    flat = nn.Parameter(Q.detach().flatten(0, 1).clone())
    optimizers = [Muon([{"params": [p], "muon": True}], lr=0.1) for p in (Q, flat)]
    for _ in range(3):
        Q.grad = torch.randn(2, 3, 8)
        flat.grad = Q.grad.flatten(0, 1).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(Q.flatten(0, 1), flat)


def test_muon_goes_on_from_its_state():
    def made(seed):
        torch.manual_seed(seed)
        Q, b = nn.Parameter(torch.randn(2, 3, 8)), nn.Parameter(torch.randn(5))
        return (Q, b), Muon([{"params": [Q], "muon": True}, {"params": [b]}], lr=0.1)

    def steps(parameters, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    first, optimizer = made(0)
    steps(first, optimizer, 1)
    second, again = made(5)
    for ours, theirs in zip(second, first, strict=True):
        ours.data.copy_(theirs.data)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(first, optimizer, 2)
    steps(second, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match=r"Muon needs matrices: got a parameter of shape \(3,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}])


@pytest.mark.parametrize("tied", [True, False])
def test_who_gets_what(tied):
    model = training.build(LLAMA | {"tie_word_embeddings": tied}, byte_tokenizer())
    matrices, hidden = decayed(model), hidden_matrices(model)
    assert "model.embed_tokens.weight" in matrices and not any("norm" in n for n in matrices)
    assert len(hidden) == 2 * 7 and all(name.startswith("model.layers") for name in hidden)


@pytest.mark.parametrize("muon", [True, False])
def test_weight_decay_is_for_matrices(muon, tmp_path):
    model = training.build(LLAMA, byte_tokenizer())
    args = training.arguments(tiny_run(), tmp_path)
    trainer = Trainer(model, args, eval_dataset=[], bytes_per_token=1.0, muon=muon)
    found = {}
    for group in trainer.create_optimizer().param_groups:
        found |= {id(p): (group["weight_decay"], p.ndim >= 2) for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    assert {*found.values()} == {(0.1, True), (0.0, False)}


# What it measures


def test_the_operations_of_a_llama():
    model = training.build(LLAMA | {"num_key_value_heads": 1}, byte_tokenizer())
    T, dim, layers, vocab, hidden = 16, 16, 2, 257, 24
    matrices = layers * (dim * dim * 2 + 2 * dim * 8 + 3 * dim * hidden) + vocab * dim
    attention = layers * 2 * 2 * T * dim  # scores and mixing, forward
    before = torch.random.get_rng_state()
    # some versions of transformers turn the rotary angles by a matrix product too
    counted = flops_per_token(model, Data(**DATA).prepare().train[0])
    assert counted == pytest.approx(6 * matrices + 3 * attention, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_clock_counts_training_only(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock, control = Clock(10.0), transformers.TrainerControl()
    clock.on_train_begin(None, None, control)
    for seconds, event, logs in (
        (1, "step_end", {}),
        (2, "log", {"logs": {"loss": 1.0}}),  # where a GPU is waited for
        (40, "log", {"logs": {"eval_loss": 1.0}}),  # the end of an evaluation
        (80, "evaluate", {}),
        (160, "save", {}),
        (4, "step_end", {}),
    ):
        now += seconds
        getattr(clock, f"on_{event}")(None, None, control, **logs)
    with clock.stopped():
        now += 320
    now += 8
    clock.on_step_end(None, None, control)
    assert clock.seconds == 10 + 1 + 2 + 4 + 8


def test_the_peak_of_a_cpu():
    assert 1e8 < peak_flops("cpu", torch.float32) < 1e15
    assert peak_flops("cpu", torch.float32) == peak_flops("cpu", torch.float32)


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
    batch = transformers.default_data_collator(Data(**DATA).prepare().held_out)
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


def test_tensorboard_is_one_word(tmp_path):
    pytest.importorskip("tensorboard")
    run = tiny_run(trainer={"report_to": "tensorboard", "max_steps": 2})
    cem.lm.train(run, tmp_path)
    assert list(tmp_path.rglob("events.out.tfevents*"))


# The commands


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``cem ARGUMENTS`` in this process: its exit code, and what it printed."""
    from cem import cli

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["cem", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, capsys.readouterr()

    return command


def test_the_commands(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(tiny_run().to_yaml())
    code, said = command("train", "small.yaml", "trainer.max_steps=2", "trainer.disable_tqdm=false")
    assert code == 0 and "see runs/small" in said.out and "step 2/2: loss" in said.out
    assert "shards" not in said.err
    result = cem.lm.Result.read("runs/small")
    code, said = command("eval", "runs/small")
    assert code == 0 and f"held out {result.loss:.4f} nats a token" in said.out
    code, said = command("sample", "runs/small", "--prompt", "def ", "--tokens", 3)
    assert code == 0 and said.out.startswith("def ")
    code, said = command("sample", "runs/small", "--prompt", "def ", "--temperature", 0)
    assert code == 0 and said.out.startswith("def ")


def test_the_export_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tiny_run(model={"preset": "tiny", "num_hidden_layers": 1}, trainer={"max_steps": 1})
    cem.lm.train(run, "run")
    code, said = command("export", "run", "alone")
    assert code == 0 and said.out == "wrote alone\n" and said.err == ""
    assert "class PartlyTiedInteraction(nn.Module)" in Path("alone/modeling_cem.py").read_text(
        "utf-8"
    )
    assert Path("alone/tokenizer.json").is_file()


def test_the_commands_say_what_to_mend(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(tiny_run().to_yaml())
    transformers.LlamaConfig().save_pretrained("llama")
    for arguments, message in (
        (("train", "none.yaml"), "cem: there is no run none.yaml"),
        (("train", "small.yaml", "trainer.use_cache=true"), "packed documents see each other"),
        (("train", "small.yaml", "trainer.max_step=2"), "type `trainer.max_steps`"),
        (("eval", "none"), "cem: there is no trained model in none"),
        (("sample", "none"), "cem: there is no trained model in none"),
        (("export", "none", "alone"), "cem: there is no trained model in none"),
        (("export", "llama", "alone"), "cem: llama holds no model of energy layers: got a llama,"),
    ):
        code, said = command(*arguments)
        assert code == 2 and message in said.err and said.err.count("\n") == 1
