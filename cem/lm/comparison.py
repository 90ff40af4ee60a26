"""What a sweep came to: means over seeds, differences to the reference, a table and two pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from .callbacks import read_records
from .sweep import Sweep

RESAMPLES = 10_000
_TITLES = (
    "side",
    "seeds",
    "loss, nats a token",
    "difference to {reference}",
    "bits a byte",
    "parameters",
    "FLOPs a token",
    "tokens/s",
    "MFU",
    "peak memory",
    "hours",
)


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap 95 % interval, which is not a number for a single value."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.text(4)

    def text(self, digits: int, sign: str = "") -> str:
        """The mean and, where there is one, the interval."""
        mean = f"{self.mean:{sign}.{digits}f}"
        if math.isnan(self.low):
            return mean
        return f"{mean} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    """The mean of some values and the 2.5 % and 97.5 % quantiles of the means of their resamples.

    All n^n resamples of n values are taken where that is at most ``resamples``, so for up to 5
    values the interval is exact; for more it takes that many at random, always the same. It sees no
    further than the values, so with few it is too narrow; of 2 or 3 it is their whole range.

    >>> bootstrap([1.0, 2.0])
    Interval(mean=1.5, low=1.0, high=2.0)
    >>> print(bootstrap([2.0]))
    2.0000
    """
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return Interval(float(values.mean()) if n else math.nan, math.nan, math.nan)
    if n**n <= resamples:
        chosen = np.indices((n,) * n).reshape(n, -1).T
    else:
        chosen = np.random.default_rng(0).integers(0, n, (resamples, n))
    low, high = np.quantile(values[chosen].mean(1), (0.025, 0.975), method="inverted_cdf")
    return Interval(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Group:
    """The runs of one side at the same values, which differ in their seeds.

    Attributes:
        rows: of the runs that have a loss, by their seeds.
        failed: the rows of those that have none.
    """

    side: str
    values: dict
    rows: dict[int, dict]
    failed: list[dict]

    @property
    def label(self) -> str:
        """``cem, learning_rate 0.002``."""
        shown = (f"{name.rpartition('.')[2]} {value}" for name, value in self.values.items())
        return ", ".join([self.side, *shown])

    def mean(self, name: str) -> float:
        """The mean of a number over the seeds."""
        return float(np.mean([row[name] for row in self.rows.values()]))

    def interval(self, name: str = "loss") -> Interval:
        """The mean of a number over the seeds, with its interval."""
        return bootstrap([row[name] for row in self.rows.values()])

    def difference(self, reference: Group, name: str = "loss") -> Interval:
        """The mean difference to another group over the seeds that both have, with its interval."""
        both = [seed for seed in self.rows if seed in reference.rows]
        return bootstrap([self.rows[s][name] - reference.rows[s][name] for s in both])


def groups(sweep: Sweep, rows: Mapping[str, dict]) -> list[Group]:
    """The groups that are compared: with ``select`` each side at its best values, otherwise all.

    Args:
        sweep, rows: as :meth:`Sweep.rows` gives them.
    """
    found: dict[tuple, Group] = {}
    for trial in sweep.trials(rows):
        if sweep.select and trial.values != sweep.best(trial.side, rows):
            continue
        key = (trial.side, *map(str, trial.values.values()))
        group = found.setdefault(key, Group(trial.side, trial.values, {}, []))
        row = rows.get(trial.name)
        if row is not None and row["reason"]:
            group.failed.append(row)
        elif row is not None:
            group.rows[trial.seed] = row
    return list(found.values())


def beside_of(sweep: Sweep, found: Sequence[Group]) -> Callable[[Group], Group | None]:
    """Which group of the reference another one is compared with: that at the same values, or the selected one."""
    reference = {
        str(group.values): group for group in found if group.side == sweep.reference and group.rows
    }
    chosen = next(iter(reference.values()), None)

    def beside(group: Group) -> Group | None:
        if group.side == sweep.reference:
            return None
        return chosen if sweep.select else reference.get(str(group.values))

    return beside


def table(sweep: Sweep, rows: Mapping[str, dict]) -> tuple[list[str], list[list[str]]]:
    """The titles and the cells of the comparison, a line for each group."""
    found = groups(sweep, rows)
    beside, peaks, lines = beside_of(sweep, found), _peaks(rows), []
    for group in found:
        failed = f", {len(group.failed)} failed" if group.failed else ""
        line = [group.label, f"{len(group.rows)}{failed}"]
        if group.rows:
            other = beside(group)
            line += [
                group.interval().text(4),
                "" if other is None else group.difference(other).text(4, "+"),
                f"{group.mean('bits_per_byte'):.4f}",
                f"{group.mean('parameters'):,.0f}",
                _engineering(group.mean("flops_per_token")),
                f"{group.mean('tokens_per_second'):,.0f}",
                f"{np.mean([_work(row) / peaks.get(row['device'], np.inf) for row in group.rows.values()]):.0%}",
                f"{group.mean('peak_memory') / 2**20:,.0f} MiB",
                f"{group.mean('seconds') / 3600:.3g}",
            ]
        lines.append(line + [""] * (len(_TITLES) - len(line)))
    return [title.format(reference=sweep.reference) for title in _TITLES], lines


def _work(row: Mapping) -> float:
    """Operations a second."""
    return row["tokens_per_second"] * row["flops_per_token"]


def _peaks(rows: Mapping[str, dict]) -> dict[str, float]:
    """The peak of every device: the largest that a run on it found, for other work on a machine hides a part of it."""
    peaks: dict[str, float] = {}
    for row in rows.values():
        if not row["reason"] and row["mfu"]:
            device = row["device"]
            peaks[device] = max(peaks.get(device, 0.0), _work(row) / row["mfu"])
    return peaks


def selection(sweep: Sweep, rows: Mapping[str, dict]) -> tuple[list[str], list[list[str]]]:
    """The titles and the cells of what was selected: a line for each side, a column for each value."""
    first = sweep.seeds[0]
    trials = [trial for trial in sweep.trials({}) if trial.seed == first]
    columns = list(dict.fromkeys(_shown(trial.values) for trial in trials))
    cells = {(trial.side, _shown(trial.values)): rows.get(trial.name) for trial in trials}
    lines = []
    for side in sweep.sides:
        best = sweep.best(side, rows)
        line = [side]
        for column in columns:
            row = cells[side, column]
            if row is None:
                text = ""
            elif row["reason"]:
                text = "diverged" if row["diverged"] else "failed"
            else:
                text = f"{row[sweep.select]:.4f}"
                text += " *" if best is not None and _shown(best) == column else ""
            line.append(text)
        lines.append(line)
    return [f"{sweep.select} at seed {first}", *columns], lines


def failures(rows: Mapping[str, dict]) -> list[str]:
    """A line for each run that failed, with its reason."""
    return [f"{name}: {row['reason']}" for name, row in rows.items() if row["reason"]]


def text(sweep: Sweep, rows: Mapping[str, dict], markdown: bool = False) -> str:
    """The comparison for the terminal or as Markdown.

    Means are over seeds, in brackets a bootstrap 95 % interval; the difference is seed by seed.
    """
    parts = [_aligned(*table(sweep, rows), markdown)]
    if sweep.select and sweep.vary:
        parts.append(_aligned(*selection(sweep, rows), markdown))
    failed = failures(rows)
    if failed:
        parts.append("\n".join(f"- {line}" if markdown else line for line in failed))
    devices = sorted({f"{r['device']}, {r['versions']}" for r in rows.values() if not r["reason"]})
    data = sorted({r["digest"] for r in rows.values() if not r["reason"]})
    if devices:
        parts.append(f"{'; '.join(devices)}; data {', '.join(data)}")
    return "\n\n".join(parts)


def compare(sweep: Sweep, rows: Mapping[str, dict], out: str | Path) -> str:
    """:func:`text`; pictures are drawn into the folder of the sweep.

    differences.png is always drawn; pareto.png, curves.png, gradients.png and, where energies were recorded,
    descents.png where there are no more than 14 sides, which a legend can still tell apart.
    """
    from . import pictures

    found = [group for group in groups(sweep, rows) if group.rows]
    drawn = {}
    if any(map(beside_of(sweep, found), found)):
        drawn["differences"] = pictures.differences(found, beside_of(sweep, found)).figure
    if found and len({group.side for group in found}) <= 14:
        names = [row["name"] for group in found for row in group.rows.values()]
        metrics, energies = (
            {name: read_records(Path(out) / name / f"{file}.jsonl") for name in names}
            for file in ("metrics", "energies")
        )
        drawn["pareto"] = pictures.pareto(found)
        drawn["curves"] = pictures.curves(found, metrics).figure
        if any("grad_norm" in line for lines in metrics.values() for line in lines):
            drawn["gradients"] = pictures.gradients(found, metrics).figure
        if any(energies.values()):
            drawn["descents"] = pictures.descents(found, energies)
    for name, figure in drawn.items():
        figure.savefig(Path(out) / f"{name}.png", dpi=150)
        matplotlib.pyplot.close(figure)
    return text(sweep, rows)


def _shown(values: dict) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in values.items())


def _engineering(value: float) -> str:
    return matplotlib.ticker.EngFormatter(places=2, sep="")(value)


def _aligned(titles: list[str], lines: list[list[str]], markdown: bool) -> str:
    if markdown:
        rule = ["---", *["---:"] * (len(titles) - 1)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (titles, rule, *lines))
    widths = [max(len(line[i]) for line in (titles, *lines)) for i in range(len(titles))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (titles, *lines)
    )
