"""Protocols: a folder of sweeps, with a README that says what is asked and, between markers, what the runs say."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from cem.lm.comparison import compare, text
from cem.lm.sweep import Sweep

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def publish(name: str, sweep: Sweep, out: Path, results: Path, readme: Path) -> str:
    """Write the table, the pictures and the report of a sweep into ``results`` and into the README.

    The README then holds, between the markers, the reports of all protocols that have results.
    Returns the report for the terminal.
    """
    rows = sweep.rows(out)
    said = compare(sweep, rows, out)
    results.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "runs.csv", results / f"{name}.csv")
    pictures = []
    for picture in ("differences", "pareto", "curves", "gradients", "descents"):
        if (out / f"{picture}.png").is_file():
            shutil.copyfile(out / f"{picture}.png", results / f"{name}-{picture}.png")
            pictures.append(f"![{picture} of {name}](results/{name}-{picture}.png)")
    ended = (
        f"{len(rows)} runs have ended, of {len(sweep.trials(rows))} that are known to be needed."
    )
    parts = [f"### {name}", ended, text(sweep, rows, markdown=True), *pictures]
    (results / f"{name}.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    reports = [path.read_text("utf-8") for path in sorted(results.glob("*.md"))]
    before, rest = readme.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    body = "\n".join(reports)
    readme.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{after}", "utf-8")
    return said


def main(here: Path, argv: list[str] | None = None) -> None:
    """The command of a folder: train what is missing of each of its sweeps, then publish it."""
    known = sorted(path.stem for path in here.glob("*.yaml"))
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{here.name}")
    parser.add_argument("name", nargs="+", choices=known, help="of the YAML files")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / here.name, help="folder of the runs"
    )
    parser.add_argument(
        "--report", action="store_true", help="train nothing, publish what there is"
    )
    given = parser.parse_args(argv)
    for name in given.name:
        sweep, out = Sweep.read(here / f"{name}.yaml"), given.out / name
        if not given.report:
            sweep.run(out)
        print(publish(name, sweep, out, here / "results", here / "README.md"))
