"""Pictures of an energy trace: the descent per layer, per token, in a plane of the state, by step.

Every function takes the result of `cem.trace(model, x)`, draws on `ax` (by default on a new figure)
and returns the axes, so that pictures combine: `plt.subplots(1, 2, layout="constrained")` leaves
room for labels and colour bars. The global style is left as it is. Energies are per token,
dimensionless, lower is better, at the fixed context that `trace.context` states. A *drop* is
before - after: positive is downhill. Values that are not finite (masked tokens) are left out.

Shapes: B batch, T tokens, D dim, N steps, P points.
"""

import math
import os

import matplotlib
import numpy as np
import torch
from matplotlib import colors, patheffects, ticker
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

__all__ = ["curve", "descent", "landscape", "tokens"]

_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_UPHILL = "#D55E00"  # the one colour of Okabe and Ito kept for steps that go up
_SMALL = 8
_STYLE = {
    "figure.dpi": 150,
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), _SMALL),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.7),
    **{"legend.frameon": False, "legend.handlelength": 1.4},
    **{"lines.linewidth": 1.3, "lines.markersize": 4},
}


def _axes(ax, width, height):
    if ax is None:
        ax = plt.subplots(figsize=(width, height), layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=_SMALL)  # ticks are made when drawn, after the style has gone
    return ax


def _colorbar(ax, mappable, label, **options):
    """A colour bar as high as the axes, whatever their aspect."""
    bar = ax.figure.colorbar(mappable, cax=ax.inset_axes([1.03, 0, 0.04, 1]), **options)
    bar.set_label(label)
    bar.ax.tick_params(labelsize=_SMALL)
    bar.outline.set_linewidth(0.5)


def _array(tensor):
    return tensor.detach().double().cpu().numpy()


def _drops(trace, function):
    """The energy drops of each layer, a list of arrays (N, B, T)."""
    problem = None
    if len(trace) == 0:
        problem = "an energy layer: got an empty trace; make one with `cem.derive(energy)`"
    elif any(layer.after is None for layer in trace):
        problem = "the energies after each step: got a trace made with after=False; "
        problem += "type `cem.trace(model, x)`"
    if problem:
        raise ValueError(f"`{function}` needs {problem}")
    return [_array(layer.before) - _array(layer.after) for layer in trace]


def _summary(values, quantiles):
    """Median, low and high quantile over the tokens: (N, B, T) -> three arrays (N,)."""
    kept = [step[np.isfinite(step)] for step in values]
    return np.array([np.quantile(x if x.size else np.nan, (0.5, *quantiles)) for x in kept]).T


def _names(trace):
    return [layer.name or layer.energy_name for layer in trace]


def _labels(names):
    """Short names: the parts that all layers share go, long names lose their middle."""
    names = [name.split(".") for name in names]
    shared = min(len(os.path.commonprefix(names)), min(map(len, names)) - 1)
    names = [name[shared:] for name in names]
    if len(set(map(len, names))) == 1:  # what stands between a number and a name
        kept = [i for i, parts in enumerate(zip(*names, strict=True)) if len(set(parts)) > 1]
        names = [[name[i] for i in kept or [-1]] for name in names]
    short = [".".join(name) for name in names]
    return [name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}" for name in short]


def _linear_threshold(values):
    """Where a symmetric log scale turns linear (a power of ten); None if a linear scale will do."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if sizes.size == 0 or sizes.max() < 50 * np.quantile(sizes, 0.2):
        return None
    return 10.0 ** math.floor(math.log10(max(np.quantile(sizes, 0.05), sizes.max() * 1e-4)))


def _ticks(ax, axis, places, labels):
    """Writes labels at places, turned and thinned so that they do not touch."""
    inches = (ax.bbox.width if axis == "x" else ax.bbox.height) / ax.figure.dpi
    every = math.ceil(len(labels) * 0.16 / inches)
    every += every % 2 == 0  # an odd stride shows both kinds where attention and MLP alternate
    places, labels = places[::every], labels[::every]
    (ax.set_xticks if axis == "x" else ax.set_yticks)(places, labels)
    if axis == "x" and sum(len(label) + 1 for label in labels) * 0.075 > inches:
        plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")


def _spread(quantiles):
    """What dots and bars are, for the label of an axis."""
    low, high = quantiles
    return f"median, bar from {low:.0%} to {high:.0%}"


@matplotlib.rc_context(_STYLE)
def descent(trace, *, ax=None, quantiles=(0.1, 0.9)):
    """Draws the energy drop of each layer and step: median (dot) and quantiles (bar) over tokens.

    The drop is E(before) - E(after) at a fixed context, from `before` and `after` of shape
    (N, B, T). Layers and steps stand in the order of computation, colours tell the energies apart,
    and a median below zero, an uphill step, is a red-orange triangle. The scale is symmetric
    logarithmic where the medians span orders of magnitude. `quantiles` are fractions from 0 to 1.

    Raises `ValueError` for a trace without layers or without the energies after each step.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> before = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> layer = SimpleNamespace(name="mlp", energy_name="gated", before=before, after=before / 2)
    >>> trace = type("Trace", (list,), {"context": "fixed, as before the update"})([layer])
    >>> ax = descent(trace)
    >>> ax.lines[-1].get_ydata().tolist()
    [1.0]
    """
    drops = _drops(trace, "descent")
    recursive = any(len(drop) > 1 for drop in drops)
    kinds = list(dict.fromkeys(layer.energy_name for layer in trace))
    shades = {kind: _COLORS[i % len(_COLORS)] for i, kind in enumerate(kinds)}
    starts = np.cumsum([0, *(len(drop) + 0.8 * recursive for drop in drops)])
    ax = _axes(ax, min(7.0, max(3.9, 1.6 + 0.2 * starts[-1])), 2.7)
    ax.axhline(0, color="0.2", linewidth=0.8, zorder=1)
    handles = [Line2D([], [], color=shades[kind], marker="o", label=kind) for kind in kinds]
    summaries = [_summary(drop, quantiles) for drop in drops]
    for layer, (median, low, high), start in zip(trace, summaries, starts[:-1], strict=True):
        x, color = start + np.arange(len(median)), shades[layer.energy_name]
        up = median < 0
        ax.vlines(x, low, high, color=color, alpha=0.35, linewidth=3.5, zorder=2)
        ax.plot(x[up], median[up], "v", color=_UPHILL, markersize=7, zorder=4)
        ax.plot(x, median, "-o", color=color, lw=0.9, markevery=list(np.flatnonzero(~up)), zorder=3)
    medians = np.concatenate([median for median, _, _ in summaries])
    if (medians < 0).any():
        handles.append(Line2D([], [], color=_UPHILL, marker="v", linestyle="", label="uphill"))
    threshold = _linear_threshold(medians)
    if threshold is not None:
        ax.set_yscale("symlog", linthresh=threshold)
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.set_xlim(-0.8, starts[-1] - 0.2 - 0.8 * recursive)
    middles = starts[:-1] + [(len(drop) - 1) / 2 for drop in drops]
    _ticks(ax, "x", middles, _labels(_names(trace)))
    what = "layers and their steps" if recursive else "layers"
    ax.set_xlabel(f"{what} in order of computation\ncontext: {trace.context}")
    ax.set_ylabel(f"energy drop per token\n{_spread(quantiles)}")
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0.2)
    return ax


@matplotlib.rc_context(_STYLE)
def curve(trace, *, ax=None, quantiles=(0.1, 0.9)):
    """Draws how the energy of each layer falls from step to step: the median over tokens.

    The height at step n is the sum over k <= n of E(after step k) - E(before step k), from `before`
    and `after` of shape (N, B, T); with gates that stay fixed that is E(h_n) - E(h_0). The bars on
    the right are the `quantiles` (fractions from 0 to 1) after the last step; colours run from dark
    (first layer) to light (last).

    Raises `ValueError` for a trace without layers or without the energies after each step.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> before = torch.tensor([4.0, 2.0]).view(2, 1, 1)
    >>> layer = SimpleNamespace(name="mlp", energy_name="gated", before=before, after=before / 2)
    >>> trace = type("Trace", (list,), {"context": "fixed, as before the update"})([layer])
    >>> ax = curve(trace)
    >>> ax.lines[-1].get_ydata().tolist()
    [0.0, -2.0, -3.0]
    """
    drops = _drops(trace, "curve")
    last, count = max(map(len, drops)), len(drops)
    ax = _axes(ax, 3.9, 2.7)
    ax.axhline(0, color="0.2", linewidth=0.8, zorder=1)
    shades = matplotlib.colormaps["cividis"](np.linspace(0, 0.9, count))
    for i, (label, drop, color) in enumerate(
        zip(_labels(_names(trace)), drops, shades, strict=True)
    ):
        change = np.cumsum(np.concatenate([0 * drop[:1], -drop]), axis=0)  # (N + 1, B, T)
        median, low, high = _summary(change, quantiles)
        right = last * (1.05 + 0.15 * (i + 0.5) / count)
        ax.vlines(right, low[-1], high[-1], color=color, alpha=0.5, lw=min(3.5, 24 / count))
        shown = label if i % math.ceil(count / 10) == 0 else None
        ax.plot(median, "-o", color=color, markersize=3, label=shown)
    ax.set_xticks(np.arange(0, last + 1, math.ceil(last / 8)))
    ax.set_xlabel(f"step\ncontext: {trace.context}")
    ax.set_ylabel(f"energy change per token\n{_spread(quantiles)}")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


@matplotlib.rc_context(_STYLE)
def tokens(trace, *, ax=None, batch=0, text=None):
    """Draws a heat map of the energy drop: layers and steps downwards, tokens from left to right.

    The drop is E(before) - E(after) at a fixed context, from `before` and `after` of shape
    (N, B, T), for sequence `batch`. Blue is downhill, red uphill, grey a masked token. The colours
    are symmetric about zero, end at the 98 % quantile of |drop| and are logarithmic where the
    layers span orders of magnitude. `text`, T strings, is written below as far as it fits.

    Raises `ValueError` for a trace without layers or without the energies after each step, for
    layers of different lengths, and for a `text` that is not T long.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> before = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> layer = SimpleNamespace(name="mlp", energy_name="gated", before=before, after=before / 2)
    >>> trace = type("Trace", (list,), {"context": "fixed, as before the update"})([layer])
    >>> ax = tokens(trace, text=["an", "energy", "falls"])
    >>> ax.images[0].get_array().tolist()
    [[0.5, 1.0, 1.5]]
    """
    drops = _drops(trace, "tokens")
    size = drops[0].shape[-1]
    lengths, problem = {drop.shape[-1] for drop in drops}, None
    if len(lengths) > 1:
        problem = f"layers of one length: got {sorted(lengths)} tokens; use `cem.plot.descent`"
    elif text is not None and len(text) != size:
        problem = f"a string for each token: got {len(text)} for {size}; leave out `text=`"
    if problem:
        raise ValueError(f"`tokens` needs {problem}")
    rows = np.ma.masked_invalid(np.concatenate([drop[:, batch] for drop in drops]))  # (rows, T)
    edges = np.cumsum([0, *(len(drop) for drop in drops)]) - 0.5
    ax = _axes(ax, *np.clip([1.9 + 0.08 * size, 1.1 + 0.17 * len(rows)], [3.4, 2.5], 7.0))
    sizes = np.abs(rows.compressed())
    limit = (np.quantile(sizes, 0.98) or sizes.max()) if sizes.any() else 1.0
    threshold = _linear_threshold(np.ma.median(rows, axis=1).filled(np.nan))
    norm, marks = colors.Normalize(-limit, limit), None
    if threshold is not None and threshold < limit:
        norm = colors.SymLogNorm(threshold, vmin=-limit, vmax=limit)
        powers = np.arange(math.floor(math.log10(limit)), math.log10(threshold) - 0.5, -1)
        powers = 10.0 ** powers[:: math.ceil(len(powers) / 3)]
        marks = [*-powers, 0, *powers[::-1]]
    cmap = matplotlib.colormaps["RdBu"].with_extremes(bad="0.8")
    image = ax.imshow(rows, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
    ax.hlines(edges[1:-1], -0.5, size - 0.5, color="white", linewidth=1)
    ax.spines[:].set_visible(False)
    extend = "both" if (sizes > limit).any() else "neither"
    _colorbar(ax, image, "energy drop per token", extend=extend, ticks=marks)
    _ticks(ax, "y", (edges[:-1] + edges[1:]) / 2, _labels(_names(trace)))
    if text is None:
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    else:
        words = [str(word).replace("\n", "\\n").replace("$", r"\$") for word in text]
        _ticks(ax, "x", range(size), words)
    ax.set_xlabel(f"token\ncontext: {trace.context}")
    return ax


def _plane(path, energies):
    """Two orthonormal directions, an array (2, D), and what the second one is; see `landscape`."""
    moved = _array(path - path[0])  # (N + 1, D)
    lengths = np.linalg.norm(moved, axis=-1)
    far = -1 if lengths[-1] > 1e-6 * lengths.max() else lengths.argmax()  # a closed path
    first = moved[far] / lengths[far]
    rest = moved - np.outer(moved @ first, first)
    _, spread, directions = np.linalg.svd(rest, full_matrices=False)
    second, name = directions[0], "where the path bends"
    if spread[0] < 1e-3 * lengths.max():  # a straight path
        step = 0.1 * lengths.max()
        offsets = step * torch.eye(path.shape[-1], dtype=path.dtype, device=path.device)
        gradient = (energies(path[-1] + offsets) - energies(path[-1] - offsets)) / (2 * step)
        second, name = (gradient @ first) * first - gradient, "downhill at the end"
        if not np.linalg.norm(second) > 1e-4 * np.linalg.norm(gradient):
            second, name = np.random.default_rng(0).standard_normal(len(first)), "at random"
    elif (rest @ second).sum() < 0:  # the sign of a principal component is arbitrary
        second = -second
    second = second - (second @ first) * first
    return np.stack([first, second / np.linalg.norm(second)]), name


@matplotlib.rc_context(_STYLE)
def landscape(trace, *, layer=0, batch=0, token=-1, ax=None, resolution=61):
    """Draws the energy of one token in a plane of its state, with the path of the steps on it.

    The plane is h_0 + u e_1 + v e_2, with h the state as the energy sees it, of `states` of shape
    (N + 1, B, T, D), and the context fixed. e_1 points from the first state to the last. e_2 is
    orthogonal to it: the principal component of the rest of the path; if the path is straight (one
    step, say), downhill at its end (central differences over the D coordinates), which shows what
    is left to gain; if that vanishes too, a direction at random, always the same. States between
    the first and the last are projected on the plane. `layer` is a number or a name, `token` may
    count from the end, and resolution^2 energies are computed.

    Raises `ValueError` if the trace kept no states, if they have one coordinate, or if the token
    did not move (a masked token, or a first token that sees nothing).

    >>> import torch
    >>> from types import SimpleNamespace
    >>> states = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.5, 0.0]]).view(2, 1, 1, 3)
    >>> bowl = lambda points, *, batch=0, token=-1: points.square().sum(-1) / 2
    >>> layer = SimpleNamespace(name="mlp", energy_name="bowl", states=states, energy_at=bowl)
    >>> ax = landscape([layer], resolution=11)
    >>> ax.get_legend().get_texts()[1].get_text()
    'end, E = 0.625'
    """
    chosen = trace[layer]
    title = chosen.name or chosen.energy_name
    problem, path = None, chosen.states
    if path is None:
        problem = "the states: got a trace made with states=False; "
        problem += "type `cem.trace(model, x, states=True)`"
    elif path.shape[-1] < 2:
        problem = "two coordinates: got a state of dim 1; type `cem.plot.descent(trace)`"
    else:
        path = path[:, batch, token].detach()  # (N + 1, D)
        if not path.isfinite().all() or (path == path[0]).all():
            problem = f"a token that moves: got token {token} of batch {batch}, at rest or masked; "
            problem += "choose another `token=`"
    if problem:
        raise ValueError(f"`landscape` of layer `{title}` needs {problem}")

    def energies(points):  # (P, D) -> (P,), in pieces, so that a long context fits in memory
        with torch.no_grad():
            pieces = [chosen.energy_at(p, batch=batch, token=token) for p in points.split(1024)]
        return _array(torch.cat(pieces))

    plane, across = _plane(path, energies)
    steps = _array(path - path[0]) @ plane.T  # (N + 1, 2)
    low, high = steps.min(0), steps.max(0)
    half = 0.8 * (high - low).max()
    side = np.linspace(-half, half, resolution)
    u, v = np.meshgrid((low[0] + high[0]) / 2 + side, (low[1] + high[1]) / 2 + side)
    grid = path[0] + torch.as_tensor(np.stack([u.ravel(), v.ravel()], -1) @ plane).to(path)
    energy = energies(grid).reshape(u.shape)
    ax = _axes(ax, 4.3, 3.2)
    levels = ticker.MaxNLocator(24).tick_values(np.nanmin(energy), np.nanmax(energy))
    filled = ax.contourf(u, v, energy, levels=levels, cmap="cividis")
    ax.contour(u, v, energy, levels=levels, colors="w", linewidths=0.3, linestyles="-", alpha=0.5)
    halo = [patheffects.withStroke(linewidth=2.8, foreground="black")]
    ax.plot(*steps.T, color="white", path_effects=halo)
    arrow = {"arrowstyle": "-|>,head_width=0.2,head_length=0.65", "shrinkA": 0, "shrinkB": 0}
    arrow |= {"color": "white", "path_effects": halo}
    for tail, tip in zip(steps[:-1], steps[1:], strict=True):
        if np.linalg.norm(tip - tail) > 0.2 * half:
            ax.annotate("", tail + 0.62 * (tip - tail), tail, arrowprops=arrow)
    ax.plot(*steps[1:-1].T, "o", color="white", markeredgecolor="black", markersize=4, zorder=4)
    ring = {"markersize": 7, "markeredgecolor": "white", "path_effects": halo, "zorder": 4}
    for i, name, face in ((0, "start", "0.15"), (-1, "end", "white")):
        label = f"{name}, E = {energies(path[[i]])[0]:.4g}".replace("-", "−")
        ax.plot(*steps[i], "o", markerfacecolor=face, markeredgewidth=1.5, label=label, **ring)
    ax.set_aspect("equal")
    ax.set_xlabel("displacement along the step" + "s" * (len(steps) > 2) + ", in units of h")
    ax.set_ylabel(f"displacement across:\n{across}")
    ax.set_title(f"{title}, token {token % chosen.states.shape[2]}", loc="left")
    _colorbar(ax, filled, "energy of the token, context fixed")
    ax.legend(facecolor="0.25", frameon=True, labelcolor="white", framealpha=0.6, edgecolor="none")
    return ax
