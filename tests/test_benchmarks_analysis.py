"""The benchmark of the analysis: it trains what is missing, and keeps what it found."""

import json

import pytest

from benchmarks import analysis


@pytest.mark.long
def test_the_benchmark_trains_and_saves(tmp_path, monkeypatch):
    sides = {
        "drawn": ("llama", 0.003, False),
        "trained": ("both", 0.006, True),
    }
    monkeypatch.setattr(analysis, "SIDES", sides)
    monkeypatch.setattr(analysis, "DRAWN", ("drawn", "trained"))
    for n in range(30):
        (tmp_path / f"note{n}.txt").write_text(f"This is note {n}. " * 40)
    changes = [f"data.source={tmp_path}/*.txt", f"data.cache={tmp_path}", "data.context=16"]
    changes += ["data.megabytes=null", "trainer.max_steps=1", "trace_steps=0"]
    found = analysis.measure(tmp_path / "runs", 1, 2, changes)
    assert [len(report) for report in found.values()] == [8, 8]
    assert found["drawn"][0].frozen.relative > 1 > 1e-12 > found["trained"][0].frozen.relative
    analysis.save(found, tmp_path / "out", "python -m benchmarks.analysis", {"seed": 1})
    kept = json.loads((tmp_path / "out" / "analysis.json").read_text("utf-8"))
    assert kept["reports"]["drawn"] == found["drawn"].to_dict()
    assert "seed 1" in (tmp_path / "out" / "analysis.md").read_text("utf-8")
    assert (tmp_path / "out" / "analysis.png").is_file()
