"""Pictures of a training run: how the loss fell, and how the layers learned to descend."""

from __future__ import annotations

import itertools
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
    labels = plot._labels(drops)
    every, size = -(-len(drops) // 10), 2.5 if len(drops) <= 10 else 0
    for i, (name, color) in enumerate(zip(drops, shades, strict=True)):
        steps, heights = np.array(sorted(drops[name].items())).T
        label = labels[i] if i % every == 0 else None
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


def _side_styles(groups) -> dict[str, dict]:
    """A colour for each side, and a mark where the colours begin again."""
    sides = list(dict.fromkeys(group.side for group in groups))
    shades = [color for color in plot._COLORS if color != "#F0E442"] + [plot._UPHILL]
    return {
        side: {"color": shades[i % len(shades)], "marker": "osD^v"[i // len(shades) % 5]}
        for i, side in enumerate(sides)
    }


def front(points) -> list[tuple[float, float]]:
    """The points (x, y) that no other is below or beside to the left of, from left to right.

    >>> front([(3, 1), (1, 3), (2, 4), (2, 2)])
    [(1, 3), (2, 2), (3, 1)]
    """
    kept = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


@matplotlib.rc_context(plot._STYLE)
def pareto(groups):
    """Draws held-out loss against parameters, training FLOPs a token, and measured time a token.

    A large mark is the mean over the seeds of a side (at the same values) with its bootstrap 95 %
    interval, small dots are the seeds, and the grey line joins the means that no other mean beats
    in both.

    Args:
        groups: see :func:`cem.lm.comparison.groups`.

    Returns:
        the figure.
    """
    figure, axes = matplotlib.pyplot.subplots(
        1, 3, figsize=(9.6, 3.3), sharey=True, layout="constrained"
    )
    styles = _side_styles(groups)
    panels = (
        ("parameters", lambda row: row["parameters"], ""),
        ("training FLOPs a token", lambda row: row["flops_per_token"], ""),
        ("measured time a token", lambda row: 1 / row["tokens_per_second"], "s"),
    )
    for ax, (title, cost, unit) in zip(axes, panels, strict=True):
        plot._axes(ax, 0, 0)
        means = []
        for group in groups:
            style, rows = styles[group.side], list(group.rows.values())
            x = float(np.exp(np.mean([np.log(cost(row)) for row in rows])))
            loss = group.interval()
            means.append((x, loss.mean))
            ax.plot(
                [cost(row) for row in rows],
                [row["loss"] for row in rows],
                ".",
                color=style["color"],
                alpha=0.45,
                markersize=4,
                markeredgewidth=0,
                zorder=3,
            )
            ax.vlines(x, loss.low, loss.high, color=style["color"], lw=1.2, zorder=4)
            ax.plot(
                x,
                loss.mean,
                linestyle="",
                markersize=6.5,
                markeredgecolor="white",
                markeredgewidth=0.7,
                label=group.side,
                zorder=5,
                **style,
            )
        ax.plot(*zip(*front(means), strict=True), color="0.7", lw=1.0, zorder=1)
        ax.set_xscale("log")
        ax.set_xlabel(title)
        _few_ticks(ax, unit)
        ax.grid(axis="y", color="0.92", linewidth=0.6)
        ax.set_axisbelow(True)
    axes[0].set_ylabel("held-out loss, nats per token")
    handles, labels = axes[0].get_legend_handles_labels()
    shown = dict(zip(reversed(labels), reversed(handles), strict=True))
    shown = {side: shown[side] for side in styles}
    figure.legend(shown.values(), shown.keys(), loc="outside right center")
    return figure


@matplotlib.rc_context(plot._STYLE)
def differences(groups, reference, *, ax=None):
    """Draws by how much each side differs from the reference in held-out loss, the best one on top.

    A mark is the mean difference seed by seed, with its bootstrap 95 % interval; it is hollow where there is one
    seed. What is below the reference is blue, what is above it red-orange.

    Args:
        groups: see :func:`cem.lm.comparison.groups`.
        reference: the group that a group is compared with, or None, see :func:`cem.lm.comparison.beside_of`.
    """
    rows = []
    for group in groups:
        beside = reference(group)
        if beside is not None:
            found = group.difference(beside)
            if not np.isnan(found.mean):
                rows.append((found, group.label))
    rows.sort(key=lambda row: -row[0].mean)
    ax = plot._axes(ax, 5.6, 0.6 + 0.19 * max(3, len(rows)))
    ax.axvline(0, color="0.2", linewidth=0.8, zorder=1)
    for height, (found, _) in enumerate(rows):
        color = plot._COLORS[0] if found.mean < 0 else plot._UPHILL
        alone = np.isnan(found.low)
        ax.hlines(height, found.low, found.high, color=color, lw=1.2, zorder=3)
        face = "white" if alone else color
        ax.plot(
            found.mean, height, "o", color=color, markersize=4.5, markerfacecolor=face, zorder=4
        )
    ax.set_yticks(range(len(rows)), [label for _, label in rows])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
    ax.grid(axis="both", color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel("difference in held-out loss\nnats per token")
    return ax


def _few_ticks(ax, unit: str) -> None:
    """Three to five round numbers on a logarithmic axis, however little it spans."""
    low, high = ax.get_xlim()
    if high / low < 1.05:
        middle = (low * high) ** 0.5
        low, high = middle / 1.05, middle * 1.05
        ax.set_xlim(low, high)
    if high / low < 30:
        ticks = matplotlib.ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        ax.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
        ax.set_xlim(low, high)
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(unit, sep="\N{THIN SPACE}"))


@matplotlib.rc_context(plot._STYLE)
def curves(groups, lines, *, ax=None):
    """Draws the held-out loss of each side over the tokens trained on: the mean and the range of the seeds.

    Where runs were evaluated at the end only, the lines are the training loss, in a dozen means each,
    and the mark at the end is the held-out loss. The first fifth is cut off where it is higher.

    Args:
        groups: see :func:`cem.lm.comparison.groups`.
        lines: of metrics.jsonl, by the names of the runs.
    """
    ax = plot._axes(ax, 5.4, 3.2)
    styles = _side_styles(groups)
    evaluated = all(
        sum("held_out_loss" in line for line in lines[row["name"]]) > 1
        for group in groups
        for row in group.rows.values()
    )
    name, shown, tops = ("held_out_loss" if evaluated else "loss"), {}, []
    for group in groups:
        style = styles[group.side]
        seeds = [_points(lines[row["name"]], name) for row in group.rows.values()]
        tokens = sorted(set.intersection(*(set(points) for points in seeds)))
        if not tokens:
            continue
        values = np.array([[points[count] for count in tokens] for points in seeds])  # (seeds, P)
        if not evaluated:
            tokens, values = _thinned(tokens, values)
        mean = values.mean(0)
        tops.append(mean[len(mean) // 5])
        ax.fill_between(
            tokens, values.min(0), values.max(0), color=style["color"], alpha=0.15, lw=0
        )
        kind = "-" if style["marker"] == "o" else "--"
        mark = style | ({"markersize": 3} if evaluated else {"marker": ""})
        shown[group.side] = ax.plot(tokens, mean, kind, **mark)[0]
        if not evaluated:
            end = np.mean([row["tokens"] for row in group.rows.values()])
            ax.plot(
                end, group.mean("loss"), markersize=5, markeredgecolor="white", zorder=5, **style
            )
    if tops:  # the beginning, where all fall alike, would take most of the height
        ax.set_ylim(top=max(tops))
    ax.set_xlabel("tokens")
    ax.set_ylabel(
        "held-out loss, nats per token"
        if evaluated
        else "training loss (line), held-out (mark)\nnats per token"
    )
    ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    ax.legend(shown.values(), shown.keys(), loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


@matplotlib.rc_context(plot._STYLE)
def gradients(groups, lines, *, ax=None):
    """Draws the norm of the gradient of each side, before it is clipped: the mean and the range of the seeds.

    Args:
        groups: see :func:`cem.lm.comparison.groups`.
        lines: of metrics.jsonl, by the names of the runs.
    """
    ax = plot._axes(ax, 5.4, 3.2)
    styles = _side_styles(groups)
    for group in groups:
        seeds = [_points(lines[row["name"]], "grad_norm") for row in group.rows.values()]
        tokens = sorted(set.intersection(*(set(points) for points in seeds)))
        if not tokens:
            continue
        style = styles[group.side]
        tokens, values = _thinned(tokens, np.array([[one[n] for n in tokens] for one in seeds]))
        low, high = values.min(0), values.max(0)
        ax.fill_between(tokens, low, high, color=style["color"], alpha=0.15, lw=0)
        kind = "-" if style["marker"] == "o" else "--"
        ax.plot(tokens, values.mean(0), kind, color=style["color"], label=group.side)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tokens")
    ax.set_ylabel("norm of the gradient")
    ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


@matplotlib.rc_context(plot._STYLE)
def descents(groups, lines):
    """Draws :func:`descent` of each side that recorded energies, at its first seed; returns the figure.

    Args:
        groups: see :func:`cem.lm.comparison.groups`.
        lines: of energies.jsonl, by the names of the runs.
    """
    runs = {group.side: lines[next(iter(group.rows.values()))["name"]] for group in groups}
    runs = {side: found for side, found in runs.items() if found}
    height = -(-len(runs) // 2)
    size = (10.4, 2.7 * height)
    figure, axes = matplotlib.pyplot.subplots(
        height, 2, figsize=size, layout="constrained", squeeze=False
    )
    for ax, (side, found) in zip(axes.flat, runs.items(), strict=False):
        descent(found, ax=ax).set_title(side)
    for ax in axes.flat[len(runs) :]:
        ax.remove()
    return figure


def _points(lines, name: str) -> dict[int, float]:
    return {line["tokens"]: line[name] for line in lines if name in line}


def _thinned(tokens, values, count: int = 12):
    """Means over consecutive logs, placed at the last token of each."""
    parts = np.array_split(np.arange(len(tokens)), min(count, len(tokens)))
    means = np.stack([values[:, part].mean(1) for part in parts], 1)
    return [tokens[part[-1]] for part in parts], means
