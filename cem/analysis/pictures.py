"""The picture of a report, or of several side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from .. import plot

_LOOKS, _ALONE = plot._COLORS[:2]


@matplotlib.rc_context(plot._STYLE)
def overview(reports: Mapping):
    """A figure with a column a model, by its title: antisymmetry, ties, and who goes down.

    Layers stand from left to right; blue ones look at other tokens, orange ones do not. From above:

    - |J - J^T| / |J| with the context and the gates held (dots) and with the other tokens held (rings);
    - the cosine of what is written and what is read, for every head, and of hidden units from the 10 % to the 90 %
      quantile; not of energy layers;
    - the cosine of update and -dE/dh, mean over tokens, for the layer's own or fitted energy (dots) and for the tied
      energy as the weights give it (rings);
    - the share of tokens whose energy does not rise, likewise.

    >>> import torch, cem
    >>> layer = cem.derive(cem.energies.interaction, dim=8, heads=2, rank=4)
    >>> report = cem.analysis.analyse(layer, torch.randn(2, 6, 8))
    >>> len(overview({"one layer": report}).axes)
    3
    """
    lengths = [max(len(report), 3) for report in reports.values()]
    tied = any(row.tie is not None for report in reports.values() for row in report)
    panels = [panel for panel in _PANELS if tied or panel[0] is not _ties]
    figure, grid = plt.subplots(
        len(panels),
        len(lengths),
        figsize=(2.4 + sum(0.35 + 0.24 * n for n in lengths), 1.2 + 1.6 * len(panels)),
        layout="constrained",
        sharex="col",
        sharey="row",
        squeeze=False,
        width_ratios=lengths,
    )
    for column, (title, report) in zip(grid.T, reports.items(), strict=True):
        for ax, (draw, *_) in zip(column, panels, strict=True):
            plot._axes(ax, 0, 0)
            draw(ax, report)
        column[0].set_title(title, loc="left")
        labels = plot._labels([row.name for row in report])
        turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        column[-1].set_xticks(range(len(report)), labels, **turned)
        column[-1].set_xlim(-0.6, len(report) - 0.4)
    for row, (_, label, limits, legend) in zip(grid, panels, strict=True):
        row[0].set_ylabel(label)
        row[0].set_ylim(limits)
        row[-1].legend(handles=legend, loc="center left", bbox_to_anchor=(1.02, 0.5))
    grid[-1, 0].yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _mark(**options) -> Line2D:
    return Line2D([], [], **{"marker": "o", "linestyle": ""} | options)


def _marks(dots: str, rings: str) -> list[Line2D]:
    return [
        _mark(color="0.3", label=dots),
        _mark(color="0.3", markerfacecolor="none", label=rings),
    ]


def _color(row) -> str:
    return _LOOKS if row.looks else _ALONE


def _both(ax, report, dots, rings) -> None:
    """Two figures a layer; rings are larger, so that both are seen where they agree."""
    for x, row in enumerate(report):
        color = _color(row)
        if (value := rings(row)) is not None:
            ax.plot(x, value, "o", color=color, markerfacecolor="none", markersize=7, zorder=3)
        if (value := dots(row)) is not None:
            ax.plot(x, value, "o", color=color, markersize=4, zorder=4)


def _line(ax, height: float, style: str = "-", said: str = "") -> None:
    ax.axhline(height, color="0.6", linewidth=0.8, linestyle=style, zorder=1)
    where = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
    ax.annotate(said, (1, height), (0, 6), fontsize=7, color="0.45", ha="right", **where)


def _antisymmetry(ax, report) -> None:
    _line(ax, math.sqrt(2), "--", "random matrix")
    _line(ax, 0, said="gradient")
    _both(
        ax,
        report,
        lambda row: row.frozen and row.frozen.relative,
        lambda row: row.token and row.token.relative,
    )


def _ties(ax, report) -> None:
    _line(ax, 0)
    if all(row.tie is None for row in report):
        middle = {"ha": "center", "va": "center", "transform": ax.transAxes}
        ax.text(0.5, 0.7, "not compared", fontsize=7, color="0.45", **middle)
    for x, row in enumerate(report):
        if row.tie is None:
            continue
        color = _color(row)
        errors, shares = row.tie.errors.double().numpy(), row.tie.shares.double().numpy()
        cosines = np.sign(shares) * np.sqrt(np.clip(1 - errors**2, 0, 1))
        if row.kind == "attention":
            apart = np.linspace(-0.2, 0.2, len(cosines)) if len(cosines) > 1 else np.zeros(1)
            ax.plot(x + apart, cosines, "o", color=color, markersize=3, alpha=0.8, zorder=4)
        else:
            low, middle, high = np.quantile(cosines, (0.1, 0.5, 0.9))
            ax.vlines(x, low, high, color=color, alpha=0.4, linewidth=4, zorder=2)
            ax.plot(x, middle, "o", color=color, markersize=4, zorder=4)


def _alignment(ax, report) -> None:
    _line(ax, 0)
    _both(
        ax,
        report,
        lambda row: row.fitted and float(row.fitted.alignment.nanmean()),
        lambda row: row.tied and float(row.tied.alignment.nanmean()),
    )


def _down(ax, report) -> None:
    _line(ax, 0.5, "--")
    _both(
        ax,
        report,
        lambda row: row.fitted and row.fitted.share_down,
        lambda row: row.tied and row.tied.share_down,
    )


# What is drawn, the name of its axis, the limits, and what dots and rings are.
_PANELS = (
    (
        _antisymmetry,
        "antisymmetry\n$|J - J^T|\\,/\\,|J|$",
        (-0.08, 1.68),
        [
            *_marks("context, gates held", "other tokens held"),
            _mark(color=_LOOKS, label="looks at tokens", linestyle="-", marker=""),
            _mark(color=_ALONE, label="does not", linestyle="-", marker=""),
        ],
    ),
    (
        _ties,
        "cosine of written\nand read weights",
        (-1.1, 1.1),
        [_mark(color=_LOOKS, label="a head"), _mark(color=_ALONE, label="hidden units")],
    ),
    (
        _alignment,
        "cosine of update\nand $-dE/dh$",
        (-1.1, 1.1),
        _marks("own or fitted energy", "tied energy as it stands"),
    ),
    (
        _down,
        "tokens whose\nenergy falls",
        (-0.06, 1.06),
        _marks("own or fitted energy", "tied energy as it stands"),
    ),
)
