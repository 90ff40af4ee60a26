"""Several processes: they take the losses that one takes, and one goes on where they stopped."""

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import multiprocessing
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import cem.lm
from cem.lm import Data, pictures, training
from cem.lm.callbacks import read_records
from cem.lm.config import CEMConfig
from cem.lm.model import CEMForCausalLM
from cem.lm.optimizer import Muon, hidden_matrices
from cem.lm.run import Run
from cem.lm.trainer import checkpoints

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2
NAMES = ("step", "loss", "grad_norm", "learning_rate", "held_out_loss", "tokens")
NUMBER = {"step_size": 0.5, "learn": True}
BLOCK = [
    {"energy": "partly_tied_interaction", "heads": 2, "rank": 4, "copies": 4, "learn": ["beta"]}
    | {"update": {"GradientDescent": NUMBER}, "preconditioner": "ScaledIdentity"},
    {"energy": "gated_silu", "hidden": 24, "preconditioner": {"DiagonalPlusLowRank": {"rank": 2}}}
    | {"steps": 2, "update": {"Momentum": NUMBER}},
]
MODEL = {"hidden_size": 16, "num_hidden_layers": 2, "block": BLOCK}
TRAINER = {
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 3,
    "max_steps": 6,
    "disable_tqdm": True,
    "use_cpu": True,
}
# Processes are forked, which a started CUDA does not survive.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="forks processes for a CPU"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Windows of a text, an odd number of them."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(30):
        words = " ".join("abcdefgh"[(number * k) % 7 :] for k in range(1, 6))
        (folder / f"{number}.txt").write_text(f"{number} {words}")
    source, cache = str(folder / "*.txt"), str(folder / "cache")
    data = {"source": source, "cache": cache, "tokenizer": "bytes", "context": 16, "held_out": 0.2}
    return data | {"context": next(c for c in (16, 17, 18, 19, 20) if odd(data | {"context": c}))}


def odd(data):
    return len(Data(**data).prepare().train) // 2 % 2


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "save", lambda out: None)


def tiny_run(data, model=None, **changes):
    trainer = TRAINER | changes.pop("trainer", {})
    model = model or {"preset": "tiny", **MODEL}
    return Run(**{"model": model, "data": data, "trainer": trainer, "trace_steps": 3} | changes)


def joined(rank, function, port, arguments):
    """Call a function as one process of a group."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES}
    where |= {"LOCAL_WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    function(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def together(function, *arguments):
    """Call a function in processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (function, port, arguments)
    multiprocessing.start_processes(joined, arguments, PROCESSES, start_method="fork")


def assert_same_records(out, expected):
    """float32, summed in another order: 1e-5."""
    found, wanted = (read_records(folder / "metrics.jsonl") for folder in (out, expected))
    assert len(found) == len(wanted) > 0
    for line, other in zip(found, wanted, strict=True):
        shown = {name: line[name] for name in NAMES if name in line}
        assert shown == pytest.approx({n: other[n] for n in NAMES if n in other}, abs=1e-5)


def stopped_early(out, at):
    """A copy of a finished run as an interruption would have left it."""
    copied = out.with_name(f"{out.name}-stopped")
    shutil.copytree(out, copied)
    (copied / "result.json").unlink()
    for checkpoint in checkpoints(copied):
        if int(checkpoint.name.removeprefix("checkpoint-")) > at:
            shutil.rmtree(checkpoint)
    return copied


def test_two_processes_take_the_losses_of_one(data, tmp_path):
    one, two, half = tmp_path / "one", tmp_path / "two", {"per_device_train_batch_size": 2}
    cem.lm.train(tiny_run(data), one)
    together(cem.lm.train, tiny_run(data, trainer=half), two)
    assert_same_records(two, one)
    assert training.Result.read(two).processes == 2
    stopped = stopped_early(two, at=3)
    with pytest.raises(ValueError, match="takes 4 sequences: got 3 .* = 3; type `.*batch_size=4`"):
        cem.lm.train(tiny_run(data, trainer={"per_device_train_batch_size": 3}), stopped)
    cem.lm.train(tiny_run(data), stopped)
    assert_same_records(stopped, one)


def test_processes_that_train_alone_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="do not work together: got 2 that were started and 1 on"):
        training.arguments(tiny_run(data, trainer={"use_cpu": False}), tmp_path)


# FSDP, by torch alone: on a CPU the Trainer takes DDP for it.


def batches(count=4):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, 32, (4, 9), generator=draw) for _ in range(count)]


def small_model():
    torch.manual_seed(0)
    return CEMForCausalLM(CEMConfig(vocab_size=32, **MODEL))


def losses(model, optimizer, tokens, rank=0, world=1):
    """The loss of each step, over all processes."""
    found = []
    for batch in tokens:
        share = batch[rank::world]
        loss = model(share, labels=share, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        found.append(loss.item() / world)
    return found


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def muon(model):
    named, hidden = dict(model.named_parameters()), hidden_matrices(model)
    groups = [{"params": [named[name] for name in hidden], "muon": True}]
    return Muon(groups + [{"params": [p for n, p in named.items() if n not in hidden]}], lr=1e-2)


def state(model, optimizer):
    model, optimizer = get_state_dict(model, optimizer)
    return {"model": model, "optimizer": optimizer}


def train_sharded(folder, make):
    dist.init_process_group("gloo")
    model = small_model()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    assert all(type(p.data).__name__ == "DTensor" for p in model.parameters())
    optimizer = make(model)
    found = losses(model, optimizer, batches(), dist.get_rank(), PROCESSES)
    dcp.save(state(model, optimizer), checkpoint_id=folder / "checkpoint")
    cem.trace(model, batches(1)[0], use_cache=False)
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(found))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("make", [adamw, muon])
def test_sharded_models_take_the_losses_of_one_process(make, tmp_path):
    together(train_sharded, tmp_path, make)
    model = small_model()
    optimizer = make(model)
    # Muon's orthogonal steps are bfloat16, summed in another order
    tolerance = {"abs": 1e-5 if make is adamw else 2e-3}
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found == pytest.approx(losses(model, optimizer, batches()), **tolerance)

    again = small_model()
    restarted = make(again)
    held = state(again, restarted)
    dcp.load(held, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    told = {"model_state_dict": held["model"], "optim_state_dict": held["optimizer"]}
    set_state_dict(again, restarted, **told)
    more = batches(8)[4:]
    assert losses(again, restarted, more) == pytest.approx(
        losses(model, optimizer, more), **tolerance
    )


# With torchrun


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_process_stops_all_and_the_run_goes_on(optimizer, data, tmp_path):
    half = {"per_device_train_batch_size": 2, "max_steps": 40, "save_steps": 6}
    run = tiny_run(data, optimizer=optimizer, trainer=half)
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    out = tmp_path / "two"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command = ["-m", "cem", "train", tmp_path / "run.yaml", "--out", out]
    command = [sys.executable, *launcher, *command]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        while process.poll() is None and len(read_records(out / "metrics.jsonl")) < 15:
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert checkpoints(out) and not (out / "result.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("held out") == 1, done.stderr
    whole = copy.deepcopy(run.trainer) | {"per_device_train_batch_size": 4}
    cem.lm.train(tiny_run(data, optimizer=optimizer, trainer=whole), tmp_path / "one")
    if optimizer == "adamw":
        assert_same_records(out, tmp_path / "one")
    first, second = (training.Result.read(folder) for folder in (out, tmp_path / "one"))
    assert first.tokens == second.tokens and first.loss == pytest.approx(second.loss, abs=1e-2)
