"""Growth: a small model is trained, grown twice and trained on, beside the large one from scratch.

    python -m benchmarks.growth

trains on the bytes of Python's standard library, and writes benchmarks/results/growth/run.json and run.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np

from cem import plot
from cem.lm import Run, train
from cem.lm.callbacks import read_records

from .report import RESULTS, machine
from .settings import Settings

WIDTH, LAYERS, RANK = 96, 3, 24
SIZES = ({"heads": 2, "hidden": 88}, {"heads": 3, "hidden": 176}, {"heads": 4, "hidden": 264})
SIDES = ("grown", "large from scratch")
JUMP = 1e-4
"""The bar: the largest change of the held-out loss at a growth, in nats a token."""


def run_of(sizes: dict, steps: int, settings: argparse.Namespace, grow: dict | None = None) -> Run:
    """A run of so many steps; without ``grow`` of a new model of these sizes."""
    heads, hidden = sizes["heads"], sizes["hidden"]
    attention = {"energy": "partly_tied_interaction", "heads": heads, "rank": RANK, "copies": RANK}
    block = [attention, {"energy": "partly_tied_gated", "hidden": hidden}]
    return Run(
        model={
            "preset": "tiny",
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "initializer_range": WIDTH**-0.5,
            "block": [part | {"init": {"w": 0.0}} for part in block],
        },
        data={"source": settings.source, "tokenizer": "bytes", "megabytes": 1, "context": 128}
        | {"held_out": 0.02 if settings.source == "stdlib" else 0.2},
        trainer={
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "learning_rate": 6e-3,
            "warmup_steps": 0.05,
            "logging_steps": 10,
            "eval_strategy": "no",
            "eval_on_start": True,
            "save_steps": steps,
            "disable_tqdm": True,
        },
        trace_steps=0,
        seed=settings.seed,
        grow=grow,
    )


def trained(settings: argparse.Namespace, folder: Path) -> dict:
    """All runs: by side, the stages with their results and their lines of metrics."""
    steps, sides = settings.steps, {}

    def stage(name: str, run: Run) -> dict:
        out = folder / name
        result = train(run, out)
        print(f"{name}: held out {result.loss:.4f} after {result.steps} steps", flush=True)
        lines = read_records(out / "metrics.jsonl")
        return {"out": name, **asdict(result), "grow": run.grow, "lines": lines}

    stages = [stage("grown-0", run_of(SIZES[0], steps, settings))]
    for number, sizes in enumerate(SIZES[1:], 1):
        grow = {"from": str(folder / f"grown-{number - 1}"), "rule": settings.rule, **sizes}
        stages.append(stage(f"grown-{number}", run_of(sizes, steps, settings, grow)))
    sides[SIDES[0]] = stages
    total = steps * len(SIZES)
    sides[SIDES[1]] = [stage("large", run_of(SIZES[-1], total, settings))]
    return sides


def curve(stages: list[dict], name: str) -> np.ndarray:
    """Cumulative tokens, cumulative operations of training and the loss of that name, (3, N)."""
    points, tokens, work = [], 0, 0.0
    for stage in stages:
        for line in stage["lines"]:
            if name in line:
                here = line["tokens"]
                points.append((tokens + here, work + here * stage["flops_per_token"], line[name]))
        tokens, work = tokens + stage["tokens"], work + stage["tokens"] * stage["flops_per_token"]
    return np.array(points).reshape(-1, 3).T


def jumps(stages: list[dict]) -> list[float]:
    """The change of the held-out loss at each growth, in nats a token."""
    first = [next(x["held_out_loss"] for x in s["lines"] if "held_out_loss" in x) for s in stages]
    return [after - before["loss"] for before, after in zip(stages, first[1:], strict=False)]


@matplotlib.rc_context(plot._STYLE)
def draw(sides: dict, path: Path) -> None:
    """The losses over tokens and over the operations of training."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.0), layout="constrained", sharey=True)
    for axis, ax in enumerate(axes):
        for side, color in zip(SIDES, (0, 3), strict=True):
            color = plot._COLORS[color]
            found = curve(sides[side], "loss")
            ax.plot(found[axis], found[2], color=color, linewidth=1.2, label=side)
            dots = curve(sides[side], "held_out_loss")[:, 1:]
            ax.plot(dots[axis], dots[2], "o", color=color)
        for end in np.cumsum(
            [s["tokens"] * (s["flops_per_token"] ** axis) for s in sides[SIDES[0]]]
        )[:-1]:
            ax.axvline(end, color="0.8", linewidth=0.8, zorder=0)
        ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes[0].set_ylim(top=1.02 * curve(sides[SIDES[1]], "loss")[2][1])
    axes[0].set_xlabel("tokens")
    axes[1].set_xlabel("operations of training")
    axes[0].set_ylabel("loss, nats per token")
    axes[1].legend()
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser("benchmarks.growth", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "growth" / "run.json")
    parser.add_argument("--steps", type=int, default=80, help="of each of three stages")
    parser.add_argument("--rule", default="frozen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", default="stdlib", help="of the text, as in a run")
    settings = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        sides = trained(settings, Path(folder))
        for stages in sides.values():
            for stage in stages:
                if stage["grow"]:
                    stage["grow"] = {k: v for k, v in stage["grow"].items() if k != "from"}
    found = {
        "command": " ".join(
            ["python -m benchmarks.growth", *(sys.argv[1:] if argv is None else argv)]
        ),
        "machine": machine(Settings()),
        "seed": settings.seed,
        "jumps": jumps(sides[SIDES[0]]),
        "bar": JUMP,
        "sides": sides,
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    draw(sides, settings.out.with_suffix(".png"))
    for before, after, jump in zip(SIZES[:-1], SIZES[1:], found["jumps"], strict=True):
        print(f"{before} -> {after}: the held-out loss changes by {jump:+.1e} (bar {JUMP:g})")
    return found


if __name__ == "__main__":
    main()
