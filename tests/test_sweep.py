"""Sweeps: which runs, in which order, by several processes at once, and what comes out."""

import csv
import itertools
import json
import math
import multiprocessing
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from filelock import FileLock

from benchmarks.parity import __main__ as parity
from cem import cli
from cem.lm import Sweep, comparison, pictures, sizing, training
from cem.lm.apart import train_apart
from cem.lm.callbacks import read_records
from cem.lm.comparison import bootstrap
from cem.lm.layers import energy_of
from cem.lm.presets import preset
from cem.lm.run import Run, set_value
from cem.lm.sweep import Trial
from cem.lm.tokenizer import byte_tokenizer
from cem.lm.training import configure

ROOT = Path(__file__).resolve().parents[1]
SIDES = {"llama": {"model": "llama-tiny"}, "cem": {"model": "tiny"}}
RATES = {"trainer.learning_rate": [0.001, 0.002, 0.004]}
RESULT = {
    "loss": 2.0,
    "bits_per_byte": 2.9,
    "parameters": 1000,
    "steps": 10,
    "tokens": 640,
    "tokens_per_second": 100.0,
    "flops_per_token": 6000.0,
    "mfu": 0.1,
    "peak_memory": 2**20,
    "seconds": 6.4,
    "device": "cpu",
    "processes": 1,
    "digest": "abc",
}


class Fake:
    """Trains nothing: the loss is a function of the run, and what was called is kept."""

    def __init__(self, loss=lambda run: 2.0 + 0.01 * run.seed):
        self.loss, self.runs = loss, []

    def __call__(self, run, out):
        self.runs.append(run)
        loss = self.loss(run)
        out.mkdir(parents=True, exist_ok=True)
        (out / "run.yaml").write_text(run.to_yaml())
        lines = [{"step": s, "tokens": 64 * s, "seconds": s, "loss": loss + 5 / s} for s in (2, 6)]
        lines += [line | {"held_out_loss": line["loss"]} for line in lines]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (out / "versions.json").write_text('{"torch": "2", "digest": "abc", "data": {}}')
        result = RESULT | {"loss": loss, "seed": run.seed}
        if run.model == "tiny":
            result |= {"parameters": 1500, "tokens_per_second": 80.0}
        (out / "result.json").write_text(json.dumps(result))


def names(sweep, rows=None):
    return [trial.name for trial in sweep.trials(rows or {})]


# What a sweep says


def test_seeds_are_outside_and_sides_inside():
    sweep = Sweep(sides=SIDES, vary={"trainer.learning_rate": [1e-3, 2e-3]}, seeds=[3, 4])
    assert names(sweep) == [
        f"{side},learning_rate={rate},seed={seed}"
        for seed in (3, 4)
        for rate in ("0.001", "0.002")
        for side in ("llama", "cem")
    ]


def test_changes_of_sides_and_values():
    base = {"model": "tiny", "trainer": {"max_steps": 7, "warmup_steps": 2}, "data": {"context": 8}}
    blocks = [{"energy": "rotary_interaction", "steps": 1}, {"energy": "gated_silu"}]
    sides = {
        "a": {"trainer": {"warmup_steps": 3}, "data.context": 16},
        "b": {"model": {"preset": "tiny", "block": blocks}},
    }
    vary = {"trainer.learning_rate": [0.5], "optimum": {"muon": {"optimizer": "muon"}}}
    sweep = Sweep(base=base, sides=sides, vary=vary)
    a, b = (sweep.run_of(trial) for trial in sweep.trials({}))
    assert a.trainer["max_steps"] == b.trainer["max_steps"] == 7
    assert (a.trainer["warmup_steps"], b.trainer["warmup_steps"]) == (3, 2)
    assert (a.data, b.data) == ({"context": 16}, {"context": 8})
    assert a.model == "tiny" and b.model["block"] == blocks
    assert a.optimizer == b.optimizer == "muon" and b.trainer["learning_rate"] == 0.5
    assert names(sweep)[0] == "a,learning_rate=0.5,optimum=muon,seed=0"
    deeper = replace(
        sweep, sides={"b": sides["b"]}, reference="b", vary={"model.block.0.steps": [1, 2]}
    )
    runs = [deeper.run_of(trial) for trial in deeper.trials({})]
    assert [run.model["block"][0]["steps"] for run in runs] == [1, 2]
    assert sides["b"]["model"]["block"] == blocks and blocks[0]["steps"] == 1


def test_a_sweep_is_a_file_with_changes_of_its_base(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("sides: {a: {model: tiny}}\nseeds: [1, 2]\n")
    sweep = Sweep.read(file, ["trainer.max_steps=3"])
    assert sweep.base == {"trainer": {"max_steps": 3}} and sweep.reference == "a"
    assert Sweep.from_yaml(sweep.to_yaml()) == sweep


@pytest.mark.parametrize(
    "file",
    [*(ROOT / "examples").glob("design_space.yaml"), *(ROOT / "benchmarks/parity").glob("*.yaml")],
    ids=lambda path: path.stem,
)
def test_the_sweeps_of_the_repository_can_be_read(file):
    tokenizer = byte_tokenizer()
    sweep = Sweep.read(file)
    for model in {json.dumps(sweep.run_of(trial).model) for trial in sweep.trials({})}:
        config = configure(json.loads(model), tokenizer)
        parts = [part for block in getattr(config, "blocks", []) for part in block]
        assert all(energy_of(part, "here") for part in parts if "energy" in part)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "a sweep is written `name: value` and has sides: got .*type `sides: {llama"),
        ("base: {}", "a sweep is written `name: value` and has sides"),
        ("sides: {a: {}}\nvari: {}", "no `vari`: got that name; type `vary`"),
        ("sides: {}", "`sides` of a sweep holds names and values: got {}; type `sides: {NAME"),
        ("sides: {a: {}}\nvary: {seed: 3}", "lists the values of `seed`: got 3; .*`seed: \\[3\\]`"),
        ("sides: {a: {}}\nseeds: 3", "`seeds` of a sweep are different integers: got 3; type"),
        ("sides: {a: {}}\nseeds: [1, 1]", "`seeds` of a sweep are different integers: got .1, 1"),
        ("sides: {a: {}}\nseeds: [x]", "`seeds` of a sweep are different integers: got .'x'"),
        ("sides: {a: {}}\nreference: b", "`reference` of a sweep names a side: got 'b'; .* a$"),
        ("sides: {a: {}}\nscale: {b: hidden}", "`scale` of a sweep names a side: got 'b'"),
        ("sides: {a: {}}\nselect: best", "is loss or bits_per_byte: got 'best'; type `select: los"),
        ("sides: {a: {}}\nfixed: size", "is parameters or flops: got 'size'; type `fixed: param"),
        ("sides: {a: {}}\nvary: {threads: [1, 1]}", "two runs of a sweep have one name: got 'a,th"),
        ("sides: {a: {moodel: 3}}", "a run has no `moodel`: got that name; type `model`"),
        ("sides: {a: {model.block.0.rank: 3}}\nbase: {model: {block: []}}", "has 0 parts, counted"),
        ("sides: {a: [", "a sweep is not YAML"),
    ],
)
def test_mistakes_in_a_sweep(text, message):
    with pytest.raises(ValueError, match=message):
        Sweep.from_yaml(text)


def test_a_sweep_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no sweep .*none.yaml: got that path"):
        Sweep.read(tmp_path / "none.yaml")


def test_a_part_of_a_list_is_counted_from_0():
    said = {"a": [1, 2]}
    with pytest.raises(ValueError, match="`a` in `a.2=3` has 2 parts, counted from 0: got '2'"):
        set_value(said, "a.2", 3)
    set_value(said, "a.1", 3)
    assert said == {"a": [1, 3]}


# What it trains


def test_every_run_has_a_folder_and_a_row(tmp_path):
    sweep, fake = Sweep(sides=SIDES, vary=RATES, seeds=[1, 2]), Fake()
    rows = sweep.run(tmp_path, train=fake)
    assert list(rows) == names(sweep) and len(fake.runs) == 12
    with (tmp_path / "runs.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == names(sweep)
    assert table[1]["side"] == "cem" and table[1]["parameters"] == "1500"
    assert (table[0]["trainer.learning_rate"], table[0]["seed"]) == ("0.001", "1")
    assert table[0]["versions"] == "torch 2" and table[0]["reason"] == ""
    assert Sweep.read(tmp_path) == sweep
    sweep.run(tmp_path, train=fake)
    assert len(fake.runs) == 12, "a finished sweep trains nothing"


def test_the_parquet_table_is_that_of_the_csv(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    mixed = {"trainer.lr_scheduler_type": ["cosine"], "model": ["tiny", {"preset": "tiny"}]}
    rows = Sweep(sides={"a": {}}, vary=mixed).run(tmp_path, train=Fake())
    table = parquet.read_table(tmp_path / "runs.parquet").to_pylist()
    assert [row["loss"] for row in table] == [row["loss"] for row in rows.values()]


def test_the_best_value_of_each_side_gets_the_seeds(tmp_path):
    best = {"llama-tiny": 0.004, "tiny": 0.002}

    def loss(run):
        return 2 + abs(math.log(run.trainer["learning_rate"] / best[run.model])) + 0.01 * run.seed

    sweep, fake = Sweep(sides=SIDES, vary=RATES, seeds=[5, 1, 2], select="loss"), Fake(loss)
    assert len(names(sweep)) == 6, "the second stage is not known before the first has ended"
    rows = sweep.run(tmp_path, train=fake)
    later = [(run.model, run.trainer["learning_rate"], run.seed) for run in fake.runs[6:]]
    assert {run.seed for run in fake.runs[:6]} == {5}
    assert later == [(m, best[m], seed) for seed in (1, 2) for m in ("llama-tiny", "tiny")]
    assert sorted(names(sweep, rows)) == sorted(rows) and len(rows) == 10
    assert sweep.best("cem", rows) == {"trainer.learning_rate": 0.002}


def test_a_failed_run_is_a_row(tmp_path, capsys):
    def loss(run):
        if run.trainer["learning_rate"] == 0.004:
            raise FloatingPointError("training diverged:\n got nan")
        if run.model == "tiny":
            raise RuntimeError("no memory")
        return math.nan if run.trainer["learning_rate"] == 0.002 else 2.0

    sweep, fake = Sweep(sides=SIDES, vary=RATES, seeds=[1, 2], select="loss"), Fake(loss)
    rows = sweep.run(tmp_path, train=fake)
    found = {name: (row["diverged"], row["reason"]) for name, row in rows.items()}
    assert found == {
        "llama,learning_rate=0.001,seed=1": (False, ""),
        "cem,learning_rate=0.001,seed=1": (False, "RuntimeError: no memory"),
        "llama,learning_rate=0.002,seed=1": (True, "the loss is not a number"),
        "cem,learning_rate=0.002,seed=1": (False, "RuntimeError: no memory"),
        "llama,learning_rate=0.004,seed=1": (True, "training diverged: got nan"),
        "cem,learning_rate=0.004,seed=1": (True, "training diverged: got nan"),
        "llama,learning_rate=0.001,seed=2": (False, ""),
    }
    sweep.run(tmp_path, train=fake)
    assert len(fake.runs) == 7, "what failed is not tried again"
    (tmp_path / "cem,learning_rate=0.001,seed=1" / "failed.json").unlink()
    sweep.run(tmp_path, train=Fake())
    assert not sweep.rows(tmp_path)["cem,learning_rate=0.001,seed=1"]["reason"]


def test_a_folder_holds_one_sweep(tmp_path):
    Sweep(sides=SIDES).run(tmp_path, train=Fake())
    other = Sweep(sides=SIDES, base={"trainer": {"max_steps": 3}})
    with pytest.raises(ValueError, match="llama,seed=0 holds another run: its `trainer.max_steps`"):
        other.run(tmp_path, train=Fake())
    more = Sweep(sides=SIDES | {"half": {"model": "half-tiny"}}, seeds=[0, 1])
    fake = Fake()
    more.run(tmp_path, train=fake)
    assert len(fake.runs) == 4, "sides and seeds may be added"


# Several processes, and those that are killed

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


TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def tiny_run(folder, **trainer):
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"{number} " + "words " * (number % 5 + 3))
    data = {"source": str(folder / "*.txt"), "tokenizer": "bytes", "context": 16, "held_out": 0.2}
    given = {"max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "no"}
    data["cache"] = str(folder / "cache")
    return Run(model=TINY, data=data, trainer=given | {"disable_tqdm": True} | trainer)


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own(tmp_path):
    train_apart(tiny_run(tmp_path), tmp_path / "out")
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
    run = tiny_run(tmp_path, max_steps=50, learning_rate=1e30, logging_steps=1, warmup_steps=0)
    with pytest.raises(FloatingPointError, match="training diverged: got the loss nan at step .;"):
        training.train(run, tmp_path / "out")


# Sizes


@pytest.mark.parametrize("target", [1.0, 103.0, 459.0, 7000.0])
def test_the_nearest_size_is_the_nearest(target):
    for count in (lambda n: 100 + 7 * n, lambda n: n * n + 3.0, lambda n: 5.0 * n):
        best = sizing.nearest_size(count, 9, target)
        assert abs(count(best) - target) == min(abs(count(n) - target) for n in range(1, 1500))


def test_a_multiple_of_8_stays_one():
    assert sizing.nearest_size(lambda n: 7.0 * n, 16, 7.0 * 795) == 792
    assert sizing.nearest_size(lambda n: 7.0 * n, 16, 7.0 * 50) == 50, "48 is more than 1 % away"


@pytest.mark.parametrize("kind", ["parameters", "flops"])
def test_sides_are_made_equal(tmp_path, kind):
    data = tiny_run(tmp_path).data
    sides = {"llama": {"model": "llama-tiny"}, "cem": {"model": "half-tiny"}}
    sweep = Sweep(base={"data": data}, sides=sides, fixed=kind, scale="hidden")
    llama, cem = (sweep.run_of(trial) for trial in sweep.trials({}))
    assert llama.model == "llama-tiny" and cem.model["block"][1]["hidden"] != 352
    ratio = sizing.count(cem.model, data, kind) / sizing.count(llama.model, data, kind)
    assert ratio == pytest.approx(1, abs=0.01)


def test_sides_that_cannot_be_made_equal(tmp_path):
    sides = {"llama": {"model": "llama-tiny"}, "cem": {"model": "half-tiny"}}
    sweep = Sweep(base={"data": tiny_run(tmp_path).data}, sides=sides, fixed="parameters")
    with pytest.raises(ValueError, match="side `cem`: a side does not have the .* times as many;"):
        sweep.run_of(sweep.trials({})[1])
    with pytest.raises(ValueError, match="side `cem`: no part of the model says a size `hedden`"):
        replace(sweep, scale="hedden").run_of(sweep.trials({})[1])
    with pytest.raises(ValueError, match="`num_hidden_layers` cannot make the .* equal within 1%"):
        replace(sweep, scale="num_hidden_layers").run_of(sweep.trials({})[1])


def test_equal_sides_stay_as_they_are(tmp_path):
    data = tiny_run(tmp_path).data
    sweep = Sweep(base={"data": data}, sides=SIDES, fixed="parameters")
    assert sweep.run_of(sweep.trials({})[1]).model == "tiny"


def test_where_a_size_stands():
    config = preset("tiny")
    assert sizing.places(config, "block.0.rank") == ["block.0.rank"]
    assert sizing.places(config, "nothing") == []
    config.layers = [config.block, config.block]
    assert sizing.places(config, "heads") == ["layers.0.0.heads", "layers.1.0.heads"]
    assert sizing.resized("tiny", config, "heads", 3)["layers"][1][0]["heads"] == 3


# What came out


def test_the_bootstrap_of_known_numbers():
    """Of 4 values all 256 resamples count; of many the interval is that of the normal."""
    found = bootstrap([0.0, 1.0, 3.0, 9.0])
    means = sorted(sum(c) / 4 for c in itertools.product([0.0, 1.0, 3.0, 9.0], repeat=4))
    assert (found.mean, found.low, found.high) == (3.25, means[6], means[249])
    assert sum(mean <= found.low for mean in means) >= 0.025 * 256 > 6
    three = bootstrap([3.0, 0.0, 9.0])
    assert (three.mean, three.low, three.high) == (4.0, 0.0, 9.0)
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    error = 1.96 * values.std(correction=0).item() / 20
    many = bootstrap(values.tolist())
    assert many == bootstrap(values.tolist())
    # the quantiles of 10,000 resamples are off by a few per cent
    assert many.high - many.mean == pytest.approx(error, rel=0.08)
    assert many.mean - many.low == pytest.approx(error, rel=0.08)
    assert math.isnan(bootstrap([1.0]).low) and bootstrap([1.0]).text(2) == "1.00"


def swept(out, **changes):
    def loss(run):
        rate = run.trainer["learning_rate"]
        if rate == 0.004 and run.model == "tiny":
            raise FloatingPointError("training diverged")
        return 2 + 0.1 * run.seed + 10 * rate + (0.05 + 0.01 * run.seed) * (run.model == "tiny")

    sweep = Sweep(**{"sides": SIDES, "vary": RATES, "seeds": [1, 2, 3], "select": "loss"} | changes)
    return sweep, sweep.run(out, train=Fake(loss))


def test_the_difference_is_taken_seed_by_seed(tmp_path):
    sweep, rows = swept(tmp_path)
    llama, cem = comparison.groups(sweep, rows)
    assert (llama.label, cem.label) == ("llama, learning_rate 0.001", "cem, learning_rate 0.001")
    assert llama.interval().mean == pytest.approx(2.21, abs=1e-12)
    difference = cem.difference(llama)
    assert difference.mean == pytest.approx(0.07, abs=1e-12)
    assert (difference.low, difference.high) == pytest.approx((0.06, 0.08), abs=1e-12)
    del llama.rows[2]
    assert cem.difference(llama).mean == pytest.approx(0.07, abs=1e-12)


def test_the_report_says_what_was_compared_selected_and_lost(tmp_path):
    sweep, rows = swept(tmp_path)
    said = comparison.compare(sweep, rows, tmp_path)
    for piece in (
        "+0.0700 [+0.0600, +0.0800]",
        "difference to llama",
        "2.2100 [2.1100, 2.3100]",
        "1,500",
        "6.00k",
        "1 MiB",
    ):
        assert piece in said
    [chosen] = [
        line.split() for line in said.splitlines() if line.startswith("cem   ") and "*" in line
    ]
    assert chosen == ["cem", "2.1700", "*", "2.1800", "diverged"]
    assert "cem,learning_rate=0.004,seed=1: training diverged" in said
    assert "cpu, torch 2; data abc" in said
    for name in ("pareto", "curves"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    page = comparison.text(sweep, rows, markdown=True)
    assert "| cem, learning_rate 0.001 | 3 | 2.2800 [" in page and "| --- | ---: |" in page


def test_a_grid_is_compared_value_by_value(tmp_path):
    sweep, rows = swept(tmp_path, select=None, seeds=[1])
    titles, lines = comparison.table(sweep, rows)
    assert [line[0] for line in lines[:2]] == [
        "llama, learning_rate 0.001",
        "cem, learning_rate 0.001",
    ]
    column = titles.index("difference to llama")
    assert [line[column] for line in lines] == ["", "+0.0600", "", "+0.0600", "", ""]
    assert lines[-1][1] == "0, 1 failed"


def test_a_report_of_a_sweep_that_has_only_begun(tmp_path):
    sweep = Sweep(sides=SIDES, select="loss", vary=RATES)
    assert "loss at seed 0" in comparison.compare(sweep, {}, tmp_path)


def test_pictures_of_what_was_compared(tmp_path):
    sweep, rows = swept(tmp_path, select=None)
    found = [group for group in comparison.groups(sweep, rows) if group.rows]
    lines = {name: read_records(tmp_path / name / "metrics.jsonl") for name in rows}
    figure = pictures.pareto(found)
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "parameters",
        "training FLOPs a token",
        "measured time a token",
    ]
    front = figure.axes[0].lines[-1]
    assert front.get_xdata().tolist() == pytest.approx([1000]), "the smaller model is better too"
    ax = pictures.curves(found, lines)
    assert ax.get_ylabel().startswith("held-out loss") and len(ax.lines) == len(found)
    assert ax.lines[0].get_xdata().tolist() == [128, 384]
    for records in lines.values():
        records[:] = [line for line in records if "held_out_loss" not in line or line["step"] == 6]
    ax = pictures.curves(found, lines)
    assert ax.get_ylabel().startswith("training loss") and len(ax.lines) == 2 * len(found)


def test_the_command_reports(tmp_path, monkeypatch, capsys):
    swept(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cem", "sweep", "--report", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code and "difference to llama" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["cem", "sweep"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and "got neither; type `cem sweep SWEEP.yaml`" in said


def test_results_are_published_between_the_markers(tmp_path):
    sweep, _ = swept(tmp_path / "runs")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{parity.BEGIN}old{parity.END}\nafter\n")
    for name in ("one", "two"):
        parity.publish(name, sweep, tmp_path / "runs", results, readme)
    page = readme.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert page.count("### one") == page.count("### two") == 1
    assert "10 runs have ended, of 10" in page and (results / "two-pareto.png").is_file()
    assert (results / "one.csv").read_text() == (tmp_path / "runs" / "runs.csv").read_text()
