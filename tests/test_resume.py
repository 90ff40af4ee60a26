"""Runs that go on: an interruption changes nothing."""

import functools
import json
import logging
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers
from training_runs import Killed, data, losses, tiny_run

import cem.lm
from cem.lm import Data, training
from cem.lm.callbacks import Clock, Records, read_records
from cem.lm.trainer import PARTIAL, Trainer, checkpoints

pytestmark = pytest.mark.usefixtures("no_pictures")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run with an optimizer that nothing interrupts, and its folder."""

    @functools.cache
    def trained(optimizer):
        steps = {"max_steps": 30, "save_steps": 4, "logging_steps": 3}
        run, out = tiny_run(optimizer=optimizer, trainer=steps), tmp_path_factory.mktemp(optimizer)
        cem.lm.train(run, out)
        return run, out

    return trained


@pytest.mark.parametrize(("optimizer", "step"), [("adamw", 1), ("adamw", 12), ("muon", 5)])
def test_an_interrupted_run_takes_the_same_losses(optimizer, step, straight, tmp_path, monkeypatch):
    assert 8 < len(Data(**data()).prepare().train) // 4 < 20  # 30 steps are some epochs
    run, whole = straight(optimizer)
    last = step

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step >= last:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Clock, "on_step_begin", interrupt)
        for _ in range(2):
            with pytest.raises(Killed):
                cem.lm.train(run, tmp_path)
            last += 13
    result = cem.lm.train(run, tmp_path)
    assert losses(tmp_path) == losses(whole)
    assert result.loss == training.Result.read(whole).loss


def test_a_run_that_goes_on_makes_no_remarks(tmp_path, monkeypatch):
    model = {"preset": "tiny", "hidden_size": 16, "num_hidden_layers": 1}
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
