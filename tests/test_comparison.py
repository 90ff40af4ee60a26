"""What comes out of a sweep: intervals, differences, tables, pictures."""

import itertools
import math
import sys

import pytest
import torch

pytest.importorskip("transformers")

from sweeps import RATES, SIDES, Fake

from benchmarks import protocol
from cem import cli
from cem.lm import Sweep, comparison, pictures
from cem.lm.callbacks import read_records
from cem.lm.comparison import bootstrap


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


def test_utilisation_is_of_the_largest_peak_that_was_found(tmp_path):
    sweep = Sweep(base={}, sides=SIDES)
    rows = sweep.run(tmp_path, train=Fake())
    one, other = rows.values()
    one |= {"tokens_per_second": 100.0, "flops_per_token": 10.0, "mfu": 1.25}  # a peak of 800
    other |= {"tokens_per_second": 100.0, "flops_per_token": 10.0, "mfu": 0.5}  # and of 2,000
    titles, lines = comparison.table(sweep, rows)
    assert [line[titles.index("MFU")] for line in lines] == ["50%", "50%"]


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


def test_pictures_of_gradients_and_energies_along_the_runs(tmp_path):
    sweep, rows = swept(tmp_path, select=None)
    found = [group for group in comparison.groups(sweep, rows) if group.rows]
    line = {"layer": "layers.0", "energy": "gated", "before": 2.0, "after": 0.5}
    norms, energies = {}, {}
    for name in rows:
        norms[name] = [{"tokens": n, "grad_norm": 8.0 / n} for n in (2, 4)]
        energies[name] = [] if "llama" in name else [line | {"step": 0}, line | {"step": 5}]
    ax = pictures.gradients(found, norms)
    assert len(ax.lines) == len(found) and ax.lines[0].get_ydata().tolist() == [4.0, 2.0]
    figure = pictures.descents(found, energies)
    assert [ax.get_title() for ax in figure.axes] == ["cem"]
    assert figure.axes[0].lines[1].get_ydata().tolist() == [1.5, 1.5]


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


def test_differences_are_marks_with_intervals_the_best_on_top(tmp_path):
    sweep, rows = swept(tmp_path, sides=SIDES | {"best": {"model": "llama-25m"}}, seeds=[1, 2])
    found = comparison.groups(sweep, rows)
    for row in found[2].rows.values():
        row["loss"] -= 0.5
    del found[2].rows[2]
    ax = pictures.differences(found, comparison.beside_of(sweep, found))
    assert [label.get_text().partition(",")[0] for label in ax.get_yticklabels()] == ["cem", "best"]
    marks = [line for line in ax.lines if line.get_marker() == "o"]
    assert [mark.get_xdata()[0] for mark in marks] == pytest.approx([0.065, -0.5], abs=1e-12)
    assert [mark.get_markerfacecolor() == "white" for mark in marks] == [False, True]
    assert marks[0].get_color() != marks[1].get_color()
    [(low, high)] = ax.collections[0].get_segments()
    assert (low[0], high[0]) == pytest.approx((0.06, 0.07), abs=1e-12)


def test_many_sides_have_no_legend_to_tell_them_apart(tmp_path):
    sides = {f"side{n}": {"model": "tiny", "trace_steps": n} for n in range(15)}
    sweep, rows = swept(tmp_path, sides=sides, vary={}, select=None, seeds=[1])
    comparison.compare(sweep, rows, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"differences.png"}


def test_results_are_published_between_the_markers(tmp_path):
    sweep, _ = swept(tmp_path / "runs")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{protocol.BEGIN}old{protocol.END}\nafter\n")
    for name in ("one", "two"):
        protocol.publish(name, sweep, tmp_path / "runs", results, readme)
    page = readme.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert page.count("### one") == page.count("### two") == 1
    assert "10 runs have ended, of 10" in page and (results / "two-pareto.png").is_file()
    assert (results / "one.csv").read_text() == (tmp_path / "runs" / "runs.csv").read_text()
