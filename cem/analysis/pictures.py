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
    """A figure with a column a model, by its title: antisymmetry, ties, and the share of tokens that go down.

    Layers stand from left to right; blue ones look at other tokens, orange ones do not. Above, |J - J^T| / |J| with
    the context and the gates held (dots) and with nothing held but the other tokens (rings). In the middle the cosine
    of what is written and what is read, for every head, and of hidden units from the 10 % to the 90 % quantile; of an
    energy layer it is 1. Below, the share of tokens whose energy does not rise: of the tied energy as the weights give
    it (rings), and of the layer's own or the fitted one (dots).

    >>> import torch, cem
    >>> layer = cem.derive(cem.energies.interaction, dim=8, heads=2, rank=4)
    >>> report = cem.analysis.analyse(layer, torch.randn(2, 6, 8))
    >>> len(overview({"one layer": report}).axes)
    3
    """
    lengths = [max(len(report), 3) for report in reports.values()]
    figure, grid = plt.subplots(
        3,
        len(lengths),
        figsize=(0.9 + sum(0.35 + 0.24 * n for n in lengths) + 1.5, 6.4),
        layout="constrained",
        sharex="col",
        sharey="row",
        squeeze=False,
        width_ratios=lengths,
    )
    for column, (title, report) in zip(grid.T, reports.items(), strict=True):
        for ax in column:
            plot._axes(ax, 0, 0)
        _antisymmetry(column[0], report)
        _ties(column[1], report)
        _down(column[2], report)
        column[0].set_title(title, loc="left")
        labels = plot._labels([row.name for row in report])
        column[2].set_xticks(
            range(len(report)), labels, rotation=60, ha="right", rotation_mode="anchor"
        )
        column[2].set_xlim(-0.6, len(report) - 0.4)
    grid[0, 0].set_ylabel("antisymmetry\n$|J - J^T|\\,/\\,|J|$")
    grid[1, 0].set_ylabel("cosine of written\nand read weights")
    grid[2, 0].set_ylabel("tokens whose\nenergy falls")
    grid[0, 0].set_ylim(-0.06, 1.62)
    grid[1, 0].set_ylim(-1.08, 1.08)
    grid[2, 0].set_ylim(-0.05, 1.05)
    grid[2, 0].yaxis.set_major_formatter(PercentFormatter(1.0))
    right = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    grid[0, -1].legend(handles=_marks("context held", "nothing held"), **right)
    kinds = [
        _mark(color=color, label=label)
        for color, label in ((_LOOKS, "looks back"), (_ALONE, "does not"))
    ]
    grid[1, -1].legend(handles=kinds, **right)
    grid[2, -1].legend(
        handles=_marks("own or fitted\nenergy", "tied energy,\nas it stands"), **right
    )
    return figure


def _mark(**options) -> Line2D:
    return Line2D([], [], marker="o", linestyle="", **options)


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
            ax.plot(x, value, "o", color=color, markersize=4, zorder=4, clip_on=False)


def _antisymmetry(ax, report) -> None:
    ax.axhline(math.sqrt(2), color="0.6", linewidth=0.8, linestyle="--", zorder=1)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    note = {"fontsize": 7, "color": "0.45", "xycoords": ax.get_yaxis_transform(), "ha": "right"}
    note |= {"textcoords": "offset points", "va": "bottom"}
    ax.annotate("random matrix", (1, math.sqrt(2)), (0, 4), **note)
    ax.annotate("gradient", (1, 0), (0, 4), **note)
    _both(
        ax,
        report,
        lambda row: row.frozen and row.frozen.relative,
        lambda row: row.token and row.token.relative,
    )


def _ties(ax, report) -> None:
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    for x, row in enumerate(report):
        color = _color(row)
        if row.kind == "energy":
            ax.plot(x, 1.0, "o", color=color, markersize=4, zorder=4)
        if row.tie is None:
            continue
        errors, shares = row.tie.errors.double().numpy(), row.tie.shares.double().numpy()
        cosines = np.sign(shares) * np.sqrt(np.clip(1 - errors**2, 0, 1))
        if row.kind == "attention":
            apart = np.linspace(-0.2, 0.2, len(cosines)) if len(cosines) > 1 else np.zeros(1)
            ax.plot(x + apart, cosines, "o", color=color, markersize=3, alpha=0.8, zorder=4)
        else:
            low, middle, high = np.quantile(cosines, (0.1, 0.5, 0.9))
            ax.vlines(x, low, high, color=color, alpha=0.4, linewidth=4, zorder=2)
            ax.plot(x, middle, "o", color=color, markersize=4, zorder=4)


def _down(ax, report) -> None:
    ax.axhline(0.5, color="0.6", linewidth=0.8, linestyle="--", zorder=1)
    _both(
        ax,
        report,
        lambda row: row.fitted and row.fitted.share_down,
        lambda row: row.tied and row.tied.share_down,
    )
