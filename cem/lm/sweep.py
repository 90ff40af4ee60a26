"""Sweep: several sides trained over a grid, with seeds, each run in a folder of its own.

The runs are those of :func:`cem.lm.train`; :mod:`cem.lm.comparison` says what came out.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from .apart import record_failure, train_apart, write
from .run import Run, file_text, parsed, read_yaml, refuse_unknown, set_value

NUMBERS = (
    "loss bits_per_byte parameters flops_per_token steps tokens tokens_per_second mfu peak_memory "
    "seconds device digest"
).split()


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: which side, at which values, with which seed.

    Attributes:
        side: a name of ``sides``.
        values: the label of the value of every name that varies.
        seed: of the run.
    """

    side: str
    values: dict
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder.

        >>> Trial("cem", {"trainer.learning_rate": 3e-3}, 1).name
        'cem,learning_rate=0.003,seed=1'
        """
        pairs = [*self.values.items(), ("seed", self.seed)]
        return ",".join([_plain(self.side), *(f"{_short(k)}={_plain(v)}" for k, v in pairs)])


@dataclass(frozen=True)
class Sweep:
    """A grid of runs, as one YAML file says it.

    Args:
        base: what all runs share, as in the file of a :class:`~cem.lm.run.Run`.
        sides: what is compared, ``{name: changes}``. A change is a dotted name and its value,
            ``model.block.0.rank: 16``; under ``data`` and ``trainer`` only what is said changes,
            and a ``model`` is replaced as a whole.
        vary: the grid. ``{"trainer.learning_rate": [1e-3, 2e-3]}`` are values of a dotted name;
            ``{"gate": {"silu": changes, "gelu": changes}}`` are sets of changes under labels.
        seeds: of every run.
        reference: the side that the others are compared with; the first if it is not said.
        select: None trains the whole grid with every seed. ``"loss"`` (or another number of a
            :class:`~cem.lm.training.Result`) trains the grid with the first seed, and with the other
            seeds only the values at which a side had the least of it: a tuned learning rate for
            each side, say, and then seeds.
        fixed: ``"parameters"`` or ``"flops"``: every side has as many as the reference at the same
            values, within 1 %, by the size that ``scale`` names; see :func:`cem.lm.sizing.equalised`.
        scale: the size that may change for that: a name for all sides, or ``{side: name}``.

    Raises:
        ValueError: a name that nothing reads, or a value of the wrong kind.

    >>> sweep = Sweep(sides={"llama": {"model": "llama-tiny"}, "cem": {"model": "tiny"}}, seeds=[1, 2])
    >>> [trial.name for trial in sweep.trials({})]
    ['llama,seed=1', 'cem,seed=1', 'llama,seed=2', 'cem,seed=2']
    """

    sides: dict
    base: dict = field(default_factory=dict)
    vary: dict = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    reference: str | None = None
    select: str | None = None
    fixed: str | None = None
    scale: str | dict | None = None

    def __post_init__(self):
        for name in ("sides", "base", "vary"):
            if not isinstance(getattr(self, name), dict) or (name == "sides" and not self.sides):
                raise ValueError(
                    f"`{name}` of a sweep holds names and values: got {getattr(self, name)!r}; "
                    f"type `{name}: {{NAME: VALUE}}`"
                )
        for name, values in self.vary.items():
            if not isinstance(values, list | dict) or not values:
                raise ValueError(
                    f"`vary` of a sweep lists the values of `{name}`: got {values!r}; type "
                    f"`{name}: [{values}]`"
                )
        seeds = self.seeds
        listed = isinstance(seeds, list | tuple) and all(type(seed) is int for seed in seeds)
        if not listed or not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(
                f"`seeds` of a sweep are different integers: got {seeds!r}; type `seeds: [0, 1, 2]`"
            )
        object.__setattr__(self, "reference", self.reference or next(iter(self.sides)))
        scaled = self.scale if isinstance(self.scale, dict) else {}
        for where, given in (("reference", [self.reference]), ("scale", scaled)):
            for name in given:
                if name not in self.sides:
                    raise ValueError(
                        f"`{where}` of a sweep names a side: got {name!r}; type one of "
                        f"{', '.join(self.sides)}"
                    )
        for name, known in (
            ("select", ("loss", "bits_per_byte")),
            ("fixed", ("parameters", "flops")),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(
                    f"`{name}` of a sweep is {' or '.join(known)}: got {value!r}; type `{name}: {known[0]}`"
                )
        names = [trial.name for trial in self._grid(self.seeds)]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"two runs of a sweep have one name: got {twice!r} twice; "
                "write the values as {LABEL: {NAME: VALUE}}, or leave one out"
            )
        for trial in self._grid(self.seeds[:1]):
            self._unsized(trial)

    @classmethod
    def from_yaml(cls, text: str, changes: Sequence[str] = ()) -> Sweep:
        """The sweep that a YAML text says, with changes of its base such as ``"trainer.max_steps=20"``.

        Raises:
            ValueError: not YAML, not names and values, or a name that nothing reads.
        """
        said = read_yaml(text, "a sweep")
        if not isinstance(said, dict) or "sides" not in said:
            raise ValueError(
                f"a sweep is written `name: value` and has sides: got {said!r:.60}; "
                "type `sides: {llama: {model: llama-tiny}, cem: {model: tiny}}`"
            )
        for name in said:
            refuse_unknown([name], [f.name for f in fields(cls)], "")
        for change in changes:
            set_value(said.setdefault("base", {}), *parsed(change))
        return cls(**said)

    @classmethod
    def read(cls, path: str | Path, changes: Sequence[str] = ()) -> Sweep:
        """The sweep in a YAML file, or in the folder of a sweep, with changes of its base.

        Raises:
            ValueError: there is no such file, or as :meth:`from_yaml`.
        """
        path = Path(path)
        return cls.from_yaml(
            file_text(path / "sweep.yaml" if path.is_dir() else path, "sweep"), changes
        )

    def to_yaml(self) -> str:
        """The sweep as :meth:`from_yaml` reads it."""
        said = asdict(self) | {"seeds": list(self.seeds)}
        return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)

    def run_of(self, trial: Trial) -> Run:
        """What to train for a trial, sizes made equal where ``fixed`` says so."""
        run = self._unsized(trial)
        if self.fixed is None or trial.side == self.reference:
            return run
        from dataclasses import replace

        from .sizing import equalised

        reference = self._unsized(Trial(self.reference, trial.values, trial.seed))
        size = self.scale.get(trial.side) if isinstance(self.scale, dict) else self.scale
        try:
            model = equalised(run.model, reference.model, run.data, size, self.fixed)
        except ValueError as error:
            raise ValueError(f"side `{trial.side}`: {error}") from error
        return replace(run, model=model)

    def trials(self, rows: Mapping[str, dict]) -> list[Trial]:
        """The runs in their order, as far as it is known which they are.

        Seeds are outside, then values, then sides, so that a sweep that is stopped is balanced.

        Args:
            rows: of the runs that have ended, by their names.
        """
        if self.select is None:
            return self._grid(self.seeds)
        best = {side: self.best(side, rows) for side in self.sides}
        later = [
            Trial(side, best[side], seed)
            for seed in self.seeds[1:]
            for side in self.sides
            if best[side] is not None
        ]
        return self._grid(self.seeds[:1]) + later

    def best(self, side: str, rows: Mapping[str, dict]) -> dict | None:
        """The values that a side is selected at; None as long as some are missing, or if all failed."""
        trials = [trial for trial in self._grid(self.seeds[:1]) if trial.side == side]
        if any(trial.name not in rows for trial in trials):
            return None
        found = [trial for trial in trials if not rows[trial.name]["reason"]]
        if not found:
            return None
        return min(found, key=lambda trial: rows[trial.name][self.select]).values

    def rows(self, out: str | Path) -> dict[str, dict]:
        """A row for every run in the folder that has ended, by its name and in the order of the runs."""
        rows: dict[str, dict] = {}
        for trial in self._grid(self.seeds):
            row = _row(trial, Path(out) / trial.name)
            if row is not None:
                rows[trial.name] = row
        return rows

    def run(self, out: str | Path, *, train: Callable | None = None, wait: float = 2.0) -> dict:
        """Train what is missing; returns :meth:`rows`.

        Several processes may call this with one folder, on one machine or on a file system that
        they share: each takes the next run that none has. A run that was interrupted goes on. One
        that fails leaves its reason in ``failed.json`` and is not tried again; remove the file for
        that. The folder holds sweep.yaml, runs.csv and runs.parquet (where pyarrow is installed),
        and a folder for every run.

        Args:
            out: the folder.
            train: ``(run, folder)``; by default :func:`cem.lm.train` in a process of its own.
            wait: seconds between two looks at runs that other processes have.

        Raises:
            ValueError: a run in the folder is another than the sweep says.
        """
        out = Path(out)
        (out / ".locks").mkdir(parents=True, exist_ok=True)
        for trial in self._grid(self.seeds[:1]):
            self.run_of(trial)
        self._same(out)
        write(out / "sweep.yaml", self.to_yaml())
        while True:
            rows = self.rows(out)
            left = [trial for trial in self.trials(rows) if trial.name not in rows]
            if not left:
                write_table(self, out)
                return rows
            if not any(self._attempt(trial, out, train or train_apart) for trial in left):
                time.sleep(wait)

    def _attempt(self, trial: Trial, out: Path, train: Callable) -> bool:
        """Train one run unless another process has it; whether it has ended."""
        folder = out / trial.name
        try:
            with FileLock(out / ".locks" / f"{trial.name}.lock", timeout=0):
                if _row(trial, folder) is not None:
                    return True
                print(f"{trial.name}", flush=True)
                record_failure(lambda: train(self.run_of(trial), folder), folder)
        except Timeout:
            return False
        write_table(self, out)
        return True

    def _grid(self, seeds: Sequence[int]) -> list[Trial]:
        labels = [list(values) for values in self.vary.values()]
        return [
            Trial(side, dict(zip(self.vary, chosen, strict=True)), seed)
            for seed in seeds
            for chosen in itertools.product(*labels)
            for side in self.sides
        ]

    def _unsized(self, trial: Trial) -> Run:
        said = deepcopy(self.base)
        _change(said, self.sides[trial.side])
        for name, label in trial.values.items():
            values = self.vary[name]
            _change(said, values[label] if isinstance(values, dict) else {name: label})
        refuse_unknown(said, [f.name for f in fields(Run)], "")
        return Run(**said | {"seed": trial.seed})

    def _same(self, out: Path) -> None:
        for trial in self._grid(self.seeds):
            if (out / trial.name / "run.yaml").is_file():
                difference = self.run_of(trial).difference(Run.read(out / trial.name / "run.yaml"))
                if difference is not None:
                    name, mine, theirs = difference
                    raise ValueError(
                        f"{out / trial.name} holds another run: its `{name}` is {theirs!r}, got "
                        f"{mine!r}; name another folder"
                    )


def _row(trial: Trial, folder: Path) -> dict | None:
    """What a run came to; None if it has not ended."""
    row = {"name": trial.name, "side": trial.side, **trial.values, "seed": trial.seed}
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text("utf-8"))
        row |= {name: result[name] for name in NUMBERS}
        versions = folder / "versions.json"
        found = json.loads(versions.read_text("utf-8")) if versions.is_file() else {}
        shown = [
            f"{name} {value}" for name, value in found.items() if name not in ("digest", "data")
        ]
        row |= {"versions": ", ".join(shown), "diverged": not math.isfinite(result["loss"])}
        return row | {"reason": "the loss is not a number" if row["diverged"] else ""}
    if (folder / "failed.json").is_file():
        failed = json.loads((folder / "failed.json").read_text("utf-8"))
        return row | dict.fromkeys(NUMBERS) | {"versions": ""} | failed
    return None


def write_table(sweep: Sweep, out: Path) -> None:
    """Write runs.csv, and runs.parquet where pyarrow is installed: one row for every ended run."""
    with FileLock(out / ".locks" / "runs.lock"):
        rows = list(sweep.rows(out).values())
        if not rows:
            return
        partial = out / ".runs.csv.partial"
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(out / "runs.csv")
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            return
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        for name in sweep.vary:  # a column has one type
            if len({type(value) for value in columns[name]}) > 1 or isinstance(
                columns[name][0], list | dict
            ):
                columns[name] = list(map(str, columns[name]))
        partial = out / ".runs.parquet.partial"
        parquet.write_table(pyarrow.table(columns), partial)
        partial.replace(out / "runs.parquet")


def _change(said: dict, changes: Mapping) -> None:
    """Make the changes of a side or a value: see :class:`Sweep`."""
    for name, value in changes.items():
        if name in ("data", "trainer") and isinstance(value, dict):
            for inner, one in value.items():
                set_value(said, f"{name}.{inner}", one)
        else:
            set_value(said, name, deepcopy(value))


def _short(name: str) -> str:
    return _plain(name.rpartition(".")[2])


def _plain(value) -> str:
    """A value as a part of the name of a folder."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")
