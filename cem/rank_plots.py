"""Pictures of ranks: the heads of a plan, gains by head and layer, the error against rank and length.

Every function draws on `ax` (by default on a new figure) and returns the axes, in the style of `cem.plot`.

Legend: L layers, H heads, R ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import colormaps, colors
from matplotlib.ticker import MaxNLocator

from .plot import _COLORS, _SMALL, _STYLE, _axes, _colorbar, _labels

__all__ = ["gains", "heads", "saturation"]


def short(names: Sequence[str]) -> list[str]:
    """What differs between the names of layers.

    >>> short(["model.layers.0.self_attn", "model.layers.1.self_attn"])
    ['0', '1']
    """
    return _labels(list(names)) if len(names) > 1 else [os.path.basename(names[0])]


@matplotlib.rc_context(_STYLE)
def heads(ranks: Sequence[Sequence[int]], full: Sequence[int], *, names=None, ax=None):
    """Draw the rank of every head, one bar a layer with its widest head below; the outline is the full rank.

    Args:
        ranks: of the heads of each layer.
        full: rank of a head of each layer before.
        names: of the layers.
    """
    ax = _axes(ax, 1.6 + 0.42 * len(ranks), 3.0)
    top = max(full)
    shade = colors.Normalize(0, top)
    cmap = colormaps["YlGnBu"]
    for layer, (row, most) in enumerate(zip(ranks, full, strict=True)):
        bottom = 0
        for rank in sorted(row, reverse=True):
            if rank:
                color = cmap(0.2 + 0.7 * shade(rank))
                ax.bar(layer, rank, 0.72, bottom, color=color, edgecolor="white", linewidth=0.8)
            bottom += rank
        outline = {"fill": False, "edgecolor": "0.55", "linewidth": 0.8, "linestyle": (0, (3, 2))}
        ax.bar(layer, most * len(row), 0.72, **outline)
    ax.set_xticks(range(len(ranks)), short(names or [str(n) for n in range(len(ranks))]))
    ax.set_xlabel("layer")
    ax.set_ylabel("rank, one block a head")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    mappable = matplotlib.cm.ScalarMappable(
        colors.Normalize(0, top), colors.ListedColormap(cmap(np.linspace(0.2, 0.9, 128)))
    )
    _colorbar(ax, mappable, "rank of a head")
    return ax


@matplotlib.rc_context(_STYLE)
def gains(layers, *, ax=None):
    """Draw the share of its gain that each rank of a head leaves out, the heads of a layer in one colour.

    Args:
        layers: :class:`cem.allotment.Heads` with gains.
    """
    ax = _axes(ax, 4.4, 3.0)
    cmap = colormaps["viridis"]
    names = short([layer.name for layer in layers])
    for index, (layer, name) in enumerate(zip(layers, names, strict=True)):
        color = cmap(0.05 + 0.85 * index / max(len(layers) - 1, 1))
        for head, row in enumerate(layer.gains):
            row = np.asarray(row)
            left = np.append(row[::-1].cumsum()[::-1], 0.0) / max(row.sum(), 1e-300)
            kept = left > 1e-5
            places = layer.step * np.arange(len(left))
            label = f"layer {name}" if head == 0 and len(layers) <= 12 else None
            ax.plot(places[kept], left[kept], color=color, alpha=0.8, label=label, linewidth=1.0)
    ax.set_yscale("log")
    ax.set_xlim(0)
    ax.set_xlabel("rank of a head")
    ax.set_ylabel("share of the gain left out")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(layers) <= 12:
        ax.legend(loc="upper right", ncols=1 + len(layers) // 7)
    return ax


@matplotlib.rc_context(_STYLE)
def saturation(table: Mapping[int, Mapping[int, float]], what: str, *, log: bool = False, ax=None):
    """Draw an error of attention weights against the rank, one curve a length.

    Args:
        table: length -> rank -> error.
        what: label of the errors.
        log: whether the errors stand on a logarithmic scale.
    """
    ax = _axes(ax, 3.6, 2.8)
    cmap = colormaps["viridis"]
    for index, (length, row) in enumerate(table.items()):
        color = cmap(0.05 + 0.85 * index / max(len(table) - 1, 1))
        places = sorted(row)
        ax.plot(places, [row[r] for r in places], "o-", color=color, label=f"{length:,} tokens")
    ax.set_xlabel("rank of a head")
    ax.set_ylabel(what)
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(0)
    ax.legend()
    return ax


@matplotlib.rc_context(_STYLE)
def increases(table: Mapping[str, Mapping[float, float]], *, ax=None):
    """Draw how much a loss grows against the share of the rank that is kept, one curve a way to allocate it.

    Args:
        table: name -> share -> nats.
    """
    ax = _axes(ax, 4.0, 3.0)
    for color, (name, row) in zip(_COLORS, table.items(), strict=False):
        places = sorted(row)
        ax.plot(places, [row[share] for share in places], "o-", color=color, label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    shares = sorted({share for row in table.values() for share in row})
    ax.set_xticks(shares, [f"1/{round(1 / share)}" for share in shares])
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.set_xlabel("share of the rank")
    ax.set_ylabel("loss increase, nats a token")
    ax.tick_params(labelsize=_SMALL)
    ax.legend()
    return ax
