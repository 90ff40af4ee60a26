"""Sweeps: which runs, in which order, and what each leaves behind."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from sweeps import RATES, SIDES, Fake, names

from cem.lm import Sweep
from cem.lm.layers import energy_of
from cem.lm.run import set_value
from cem.lm.tokenizer import byte_tokenizer
from cem.lm.training import configure

ROOT = Path(__file__).resolve().parents[1]


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
    [*(ROOT / "examples").glob("design_space.yaml"), *(ROOT / "benchmarks").glob("[ps]*/*.yaml")],
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
