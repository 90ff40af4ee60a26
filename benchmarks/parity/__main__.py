"""Run a protocol of README.md: ``python -m benchmarks.parity cpu``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from cem.lm.comparison import compare, text
from cem.lm.sweep import Sweep

HERE = Path(__file__).parent
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
    for picture in ("pareto", "curves"):
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


def main(argv: list[str] | None = None) -> None:
    """Train what is missing of each protocol, then publish it."""
    known = sorted(path.stem for path in HERE.glob("*.yaml"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("name", nargs="*", choices=known, default="cpu", help="of the YAML files")
    parser.add_argument("--out", type=Path, default=Path("runs/parity"), help="folder of the runs")
    parser.add_argument(
        "--report", action="store_true", help="train nothing, publish what there is"
    )
    given = parser.parse_args(argv)
    for name in [given.name] if isinstance(given.name, str) else given.name:
        sweep, out = Sweep.read(HERE / f"{name}.yaml"), given.out / name
        if not given.report:
            sweep.run(out)
        print(publish(name, sweep, out, HERE / "results", HERE / "README.md"))


if __name__ == "__main__":
    main()
