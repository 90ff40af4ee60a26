"""Sweeps by several processes at once, and by those that are killed."""

import multiprocessing
import time

import pytest

pytest.importorskip("transformers")

from filelock import FileLock
from sweeps import RATES, SIDES, Fake
from training_runs import tiny_run

from cem.lm import Sweep, training
from cem.lm.apart import train_apart
from cem.lm.run import Run
from cem.lm.sweep import Trial

FORK = multiprocessing.get_context("fork")


def worker(out, slow, counts):
    """A process that sweeps, every run for so long; it counts the runs that it trained."""

    def train(run, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "begun").open("a") as file:
            file.write("x")
        time.sleep(slow)
        fake(run, folder)

    def work():
        Sweep(sides=SIDES, vary=RATES, seeds=[1]).run(out, train=train, wait=0.05)
        counts.put(len(fake.runs))

    fake = Fake()
    process = FORK.Process(target=work)
    process.start()
    return process


def begun(out):
    return {path.parent.name: len(path.read_text()) for path in out.glob("*/begun")}


def test_two_processes_share_a_sweep_and_a_killed_one_is_taken_up(tmp_path):
    counts = FORK.SimpleQueue()
    killed = worker(tmp_path, 100, counts)
    while not begun(tmp_path):
        assert killed.is_alive()
        time.sleep(0.05)
    [first] = begun(tmp_path)
    both = [worker(tmp_path, 0.3, counts) for _ in range(2)]
    while len(begun(tmp_path)) < 3:
        time.sleep(0.05)
    assert begun(tmp_path)[first] == 1, "the others leave it what it has"
    killed.kill()
    for process in (killed, *both):
        process.join()
    found = [counts.get(), counts.get()]
    assert sum(found) == 6 and min(found) > 0
    assert sorted(begun(tmp_path).values()) == [1, 1, 1, 1, 1, 2] and begun(tmp_path)[first] == 2


def test_a_run_that_another_process_has_is_left_to_it(tmp_path):
    sweep, fake = Sweep(sides=SIDES), Fake()
    locks = tmp_path / ".locks"
    locks.mkdir()
    assert not sweep.rows(tmp_path)
    with FileLock(locks / "llama,seed=0.lock"):
        assert not sweep._attempt(Trial("llama", {}, 0), tmp_path, fake)
        assert sweep._attempt(Trial("cem", {}, 0), tmp_path, fake)
    assert [run.model for run in fake.runs] == ["tiny"]


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own(tmp_path):
    train_apart(tiny_run(trainer={"max_steps": 2}), tmp_path / "out")
    result = training.Result.read(tmp_path / "out")
    assert result.steps == 2 and 0 < result.peak_memory < 2**30


def test_a_process_that_is_killed_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("cem.lm.apart._COMMAND", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match="the process that trained it ended with exit code -9"):
        train_apart(Run(), tmp_path)


@pytest.mark.slow
def test_a_process_ends_with_its_parent(tmp_path, monkeypatch):
    """The child would sleep for minutes; it ends because the pipe of its killed parent closes."""
    file, end = tmp_path / "begun", tmp_path / "end"
    code = f"""
import os, pathlib, time
from cem.lm import apart
leave = os._exit
os._exit = lambda code: (pathlib.Path({str(end)!r}).touch(), leave(code))
apart._received()
pathlib.Path({str(file)!r}).touch()
time.sleep(300)
"""
    monkeypatch.setattr("cem.lm.apart._COMMAND", code)
    parent = FORK.Process(target=train_apart, args=(Run(), tmp_path / "out"))
    parent.start()
    while not file.is_file():
        assert parent.is_alive()
        time.sleep(0.05)
    parent.kill()
    parent.join()
    until = time.monotonic() + 60
    while not end.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    assert end.is_file()


def test_a_diverged_training_ends_at_once(tmp_path):
    run = tiny_run(trainer={"max_steps": 50, "learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(FloatingPointError, match="training diverged: got the loss nan at step .;"):
        training.train(run, tmp_path / "out")
