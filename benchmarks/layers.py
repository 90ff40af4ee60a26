"""Time the derived layers: ``python -m benchmarks.layers``; README.md says what and how."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from . import report
from .measures import SECTIONS
from .settings import Settings


def run(
    settings: Settings, command: str = "", quiet: bool = False, sections: Mapping = SECTIONS
) -> dict:
    """Measure the sections that are asked for; returns everything about the run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        rows = _rows(settings, quiet, sections)
    finally:
        torch.set_num_threads(threads)
    return report.as_dict(rows, settings, command)


def _rows(settings: Settings, quiet: bool, sections: Mapping) -> list[report.Row]:
    rows: list[report.Row] = []
    for section in settings.sections:
        for row in sections[section](settings):
            row = row if settings.bars else replace(row, most=None, least=None)
            rows.append(row)
            if not quiet:
                what, measured, bar, verdict, *_ = row.cells
                print(f"{what}: {measured} {bar} {verdict}".rstrip(), file=sys.stderr, flush=True)
    return rows


def arguments(argv: list[str] | None, program: str, sections: Mapping) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--compile", action="store_true", help="compile both sides")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=704, help="hidden size of the gated MLP")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15.0, help="time for each comparison")
    parser.add_argument("--only", nargs="+", choices=tuple(sections), default=tuple(sections))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--out", type=Path, nargs="+", default=(), help="FILE.json or FILE.md")
    told = "put the tables of benchmarks/results into benchmarks/README.md"
    parser.add_argument("--readme", action="store_true", help=told)
    return parser.parse_args(argv)


def _allocator() -> list[str]:
    """The variables of glibc's allocator that are set, as one types them before a command."""
    return [f"{name}={value}" for name, value in os.environ.items() if name.startswith("MALLOC_")]


def main(
    argv: list[str] | None = None, program: str = "benchmarks.layers", sections: Mapping = SECTIONS
) -> dict | None:
    asked = arguments(argv, program, sections)
    if asked.readme and not asked.out:
        print(f"{report.readme()} run(s) in {report.README.relative_to(report.ROOT)}")
        return None
    settings = Settings(
        device=asked.device,
        dtype=asked.dtype,
        compile=asked.compile,
        threads=asked.threads,
        seed=asked.seed,
        batch=asked.batch,
        hidden=asked.hidden,
        seconds=asked.seconds,
    )
    if asked.quick:
        settings = settings.quick()
    settings = replace(settings, sections=tuple(asked.only))
    words = sys.argv[1:] if argv is None else argv
    command = " ".join((*_allocator(), shlex.join(["python", "-m", program, *words])))
    found = run(settings, command, sections=sections)
    print(report.heading(found), report.text(report.rows_of(found)), sep="\n\n")
    for path in asked.out:
        report.save(found, path)
    if asked.readme:
        report.readme()
    return found


if __name__ == "__main__":
    main()
