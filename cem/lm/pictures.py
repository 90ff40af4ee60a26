"""Pictures of a training run: how the loss fell, and how the layers learned to descend."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import matplotlib
import numpy as np

from .. import plot
from .callbacks import read_records

_KINDS = ("-o", "--s", ":^", "-.D")


@matplotlib.rc_context(plot._STYLE)
def loss(lines, *, ax=None):
    """Draws the training loss (line) and the held-out loss (dots) over the tokens trained on.

    Args:
        lines: what metrics.jsonl holds.

    >>> lines = [{"step": 1, "tokens": 64, "loss": 5.0}, {"step": 2, "tokens": 128, "loss": 4.0}]
    >>> loss(lines).lines[0].get_ydata().tolist()
    [5.0, 4.0]
    """
    ax = plot._axes(ax, 3.9, 2.7)
    for name, label, style in (
        ("loss", "training", dict(color=plot._COLORS[4], linewidth=1.0)),
        ("held_out_loss", "held out", dict(color=plot._COLORS[0], marker="o")),
    ):
        points = [(line["tokens"], line[name]) for line in lines if name in line]
        ax.plot(*np.array(points).reshape(-1, 2).T, label=label, **style)
    ax.set_xlabel("tokens")
    ax.set_ylabel("loss, nats per token")
    ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    ax.legend()
    return ax


@matplotlib.rc_context(plot._STYLE)
def descent(lines, *, ax=None):
    """Draws how far each layer lowers its energy, over the steps of training.

    The height is the mean over tokens of E(before) - E(after), all descent steps of a layer together,
    at a fixed context. Colours run from dark (first layer) to light (last), the kinds of line tell
    the energies apart, and a layer that goes uphill has a triangle in red-orange.

    Args:
        lines: what energies.jsonl holds.

    >>> line = {"step": 0, "layer": "layers.0", "energy": "gated", "before": 2.0, "after": 0.5}
    >>> descent([line, line | {"step": 5, "after": 0.0}]).lines[1].get_ydata().tolist()
    [1.5, 2.0]
    """
    drops: dict[str, dict[int, float]] = {}
    energies = {line["layer"]: line["energy"] for line in lines}
    kinds = dict(zip(dict.fromkeys(energies.values()), itertools.cycle(_KINDS), strict=False))
    for line in lines:
        steps = drops.setdefault(line["layer"], {})
        steps[line["step"]] = steps.get(line["step"], 0.0) + line["before"] - line["after"]
    ax = plot._axes(ax, 5.2, 2.7)
    ax.axhline(0, color="0.2", linewidth=0.8, zorder=1)
    shades = matplotlib.colormaps["cividis"](np.linspace(0, 0.9, len(drops)))
    names = [name.split(".") for name in drops]
    shared = min(len(os.path.commonprefix(names)), min(map(len, names)) - 1)
    every, size = -(-len(drops) // 10), 2.5 if len(drops) <= 10 else 0
    for i, (name, color) in enumerate(zip(drops, shades, strict=True)):
        steps, heights = np.array(sorted(drops[name].items())).T
        label = ".".join(names[i][shared:]).replace(".parts", "") if i % every == 0 else None
        ax.plot(steps, heights, kinds[energies[name]], color=color, markersize=size, label=label)
        up = heights < 0
        ax.plot(steps[up], heights[up], "v", color=plot._UPHILL, markersize=4)
    everything = np.array([height for steps in drops.values() for height in steps.values()])
    threshold = plot._linear_threshold(everything)
    if threshold is not None:
        ax.set_yscale("symlog", linthresh=threshold)
    ax.set_xlabel("training step")
    ax.set_ylabel("energy drop per token\nmean, context fixed")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def save(out: str | Path) -> None:
    """Writes loss.png, and energies.png if energies were recorded, into the folder of a run."""
    for name, draw in (("metrics", loss), ("energies", descent)):
        lines = read_records(Path(out) / f"{name}.jsonl")
        if lines:
            figure = draw(lines).figure
            target = "loss" if name == "metrics" else name
            figure.savefig(Path(out) / f"{target}.png", dpi=150)
            matplotlib.pyplot.close(figure)
