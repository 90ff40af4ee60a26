"""Rows of measurements as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import sympy
import torch

from .memory import ROOT
from .settings import Settings
from .timing import Pair

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COLUMNS = ("what", "measured", "bar", "", "spread", "ratio of medians", "CPU time", "medians")


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        section: the heading that it stands under.
        what: what was measured.
        value: the figure that is compared with the bar.
        unit: ``"x"`` for a ratio, ``"ms"``, ``"s"`` or ``""``.
        most, least: the bar; both for a figure that must lie between, neither for one without a bar.
        spread, ratio_of_medians, cpu, medians: as text, for the table.
        detail: everything behind the figure.
    """

    section: str
    what: str
    value: float
    unit: str = "x"
    most: float | None = None
    least: float | None = None
    spread: str = ""
    ratio_of_medians: str = ""
    cpu: str = ""
    medians: str = ""
    detail: dict = field(default_factory=dict)

    @property
    def bar(self) -> str:
        if self.most is not None and self.most == self.least:
            return f"= {self.most:g}{self._suffix}"
        if self.most is not None and self.least is not None:
            return f"{self.least:.4g} to {self.most:.4g}{self._suffix}"
        if self.most is not None:
            return f"<= {self.most:g}{self._suffix}"
        return f">= {self.least:g}{self._suffix}" if self.least is not None else ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar."""
        if self.most is None and self.least is None:
            return None
        above = self.least is None or self.value >= self.least
        return above and (self.most is None or self.value <= self.most)

    @property
    def _suffix(self) -> str:
        return self.unit if self.unit in ("x", "") else f" {self.unit}"

    @property
    def cells(self) -> tuple[str, ...]:
        number = f"{self.value:.3f}" if self.unit != "ms" else f"{self.value:.1f}"
        verdict = {True: "met", False: "missed", None: ""}[self.met]
        measured = f"{number}{self._suffix}"
        return (
            self.what,
            measured,
            self.bar,
            verdict,
            self.spread,
            self.ratio_of_medians,
            self.cpu,
            self.medians,
        )


def milliseconds(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def of_pair(
    section: str,
    what: str,
    pair: Pair,
    most: float | None = None,
    least: float | None = None,
) -> Row:
    """A row for the median of the ratios of the rounds."""
    low, high = pair.quartiles
    first, second = pair.medians
    return Row(
        section,
        what,
        pair.median_ratio,
        most=most,
        least=least,
        spread=f"{low:.3f} to {high:.3f}, n={len(pair.first)}",
        ratio_of_medians=f"{pair.ratio_of_medians:.3f}x",
        cpu="" if pair.cpu_ratio is None else f"{pair.cpu_ratio:.3f}x",
        medians=f"{milliseconds(first)} / {milliseconds(second)}",
        detail=asdict(pair),
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(settings: Settings) -> dict:
    """What the figures depend on beside the code."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    on_gpu = settings.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(settings.device) if on_gpu else "cpu",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32 if on_gpu else None,
        "sympy": sympy.__version__,
        "commit": commit or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def as_dict(rows: list[Row], settings: Settings, command: str) -> dict:
    """Everything about a run, ready for JSON."""
    found = [asdict(row) | {"bar": row.bar, "met": row.met} for row in rows]
    where = machine(settings)
    return {"command": command, "machine": where, "settings": asdict(settings), "rows": found}


def rows_of(run: dict) -> list[Row]:
    known = Row.__dataclass_fields__
    return [Row(**{key: row[key] for key in known}) for row in run["rows"]]


def _sections(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.section, []).append(row)
    return found


def text(rows: list[Row]) -> str:
    """An aligned table, one heading a section."""
    lines = [COLUMNS, *(row.cells for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(COLUMNS))]

    def aligned(cells):
        return "  ".join(cell.ljust(n) for cell, n in zip(cells, widths, strict=True)).rstrip()

    out = []
    for section, members in _sections(rows).items():
        out += [section, aligned(COLUMNS), *(aligned(row.cells) for row in members), ""]
    return "\n".join(out)


def heading(run: dict) -> str:
    """The machine and the command in a few lines."""
    where, asked = run["machine"], run["settings"]
    device = where["device"] if where["device"] != "cpu" else f"{where['cpu']} ({where['vectors']})"
    versions = f"torch {where['torch']}, Python {where['python']}, SymPy {where['sympy']}"
    sizes = ", ".join(f"{key} {asked[key]}" for key in ("batch", "dim", "heads", "rank", "hidden"))
    return (
        f"{device}; {where['cores']} cores, {asked['threads']} thread(s), load {where['load']}\n"
        f"{versions}; {asked['dtype']}{', compiled' if asked['compile'] else ''};"
        f" {sizes}; seed {asked['seed']}\n"
        f"{run['command']}; commit {where['commit']}; {where['date']}"
    )


def markdown(run: dict) -> str:
    """The same as Markdown tables."""
    out = ["```", heading(run), "```", ""]
    for section, rows in _sections(rows_of(run)).items():
        titles = [title or "verdict" for title in COLUMNS]
        out += [f"**{section}**", "", "| " + " | ".join(titles) + " |"]
        out.append("| --- " * len(titles) + "|")
        out += ["| " + " | ".join(row.cells) + " |" for row in rows]
        out.append("")
    return "\n".join(out)


def save(run: dict, path: Path) -> None:
    """Write a run as JSON, or as Markdown where the name ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = markdown(run) if path.suffix == ".md" else json.dumps(run, indent=1) + "\n"
    path.write_text(body, "utf-8")


def readme(results: Path = RESULTS, target: Path = README) -> int:
    """Put the tables of every saved run into the README; returns how many there were."""
    runs = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*.json"))]
    before, rest = target.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    body = "\n".join(map(markdown, runs)) or "No run has been saved yet.\n"
    target.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{after}", "utf-8")
    return len(runs)
