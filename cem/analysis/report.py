"""A whole model, layer by layer: is it a gradient, of what, and does it descend it?

Legend: B batch, T tokens, D dim.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .antisymmetry import Antisymmetry, antisymmetry
from .sublayers import Sublayer, sublayers
from .tie import Fit, Tie, fit_energy, seen_by

HELD = {"attention": ("k_proj", "v_proj"), "mlp": ("gate_proj",)}


@dataclass(frozen=True)
class Descent:
    """What the update of one layer did to an energy of its tokens, its own or a fitted one.

    Attributes:
        before, after: energies at h and at h + u, at the context and the gates of h, (B, T).
        alignment: the cosine of u and -dE/dh, (B, T): 1 straight down, below 0 uphill.
    """

    before: Tensor
    after: Tensor
    alignment: Tensor

    @property
    def drop(self) -> Tensor:
        """before - after, (B, T)."""
        return self.before - self.after

    @property
    def share_down(self) -> float:
        """The share of tokens whose energy did not rise."""
        return float((self.drop >= 0).double().mean())

    def to_dict(self) -> dict[str, float]:
        return {
            "before": float(self.before.mean()),
            "after": float(self.after.mean()),
            "median_drop": float(self.drop.median()),
            "share_down": self.share_down,
            "alignment": float(self.alignment.nanmean()),
        }


@dataclass(frozen=True)
class LayerReport:
    """One layer of a model.

    Attributes:
        name, kind: as in :class:`~cem.analysis.Sublayer`.
        looks: whether it looks at other tokens.
        frozen: antisymmetry for what the layer reads, context and gates held; None where they cannot be.
        state: the same for the state, through the norm in front; None without a norm.
        token: the state of one token moves, and with it its own key, value and gates.
        tie: how nearly the weights are tied, or None.
        shares: signed shares of the fitted energy, or None.
        error: |u - force| / |u| of the fitted energy, on sequences that it was not fitted to, or None.
        tied: descent on the tied energy as the weights give it, all shares 1; None for energy layers.
        fitted: descent on the fitted energy; of an energy layer on its own.
    """

    name: str
    kind: str
    looks: bool = True
    frozen: Antisymmetry | None = None
    state: Antisymmetry | None = None
    token: Antisymmetry | None = None
    tie: Tie | None = None
    shares: Tensor | None = None
    error: float | None = None
    tied: Descent | None = None
    fitted: Descent | None = None

    def to_dict(self) -> dict:
        found = {"name": self.name, "kind": self.kind}
        for name in ("frozen", "state", "token"):
            if (one := getattr(self, name)) is not None:
                found[name] = {"relative": one.relative, "error": one.error, "exact": one.exact}
                found[name]["reading"] = one.reading
        if self.tie is not None:
            found["tie"] = {"error": self.tie.error, "step": self.tie.step}
            found["tie"]["error_of_step"] = self.tie.error_of_step
            if self.kind == "attention":
                found["tie"] |= {
                    "shares": self.tie.shares.tolist(),
                    "errors": self.tie.errors.tolist(),
                    "nearest": self.tie.nearest.tolist(),
                }
        if self.shares is not None:
            found |= {"error": self.error, "positive": float((self.shares > 0).double().mean())}
            if self.kind == "attention":
                found["shares"] = self.shares.tolist()
        for name in ("tied", "fitted"):
            if (one := getattr(self, name)) is not None:
                found[name] = one.to_dict()
        return found


# Title, what is under it, and the cell of a layer.
COLUMNS = (
    ("layer", "", lambda row: row.name),
    ("antisymmetry", "held", lambda row: _number(row.frozen and row.frozen.relative)),
    ("", "at h", lambda row: _number(row.state and row.state.relative)),
    ("", "token", lambda row: _number(row.token and row.token.relative)),
    ("tie error", "weights", lambda row: _number(row.tie and row.tie.error)),
    ("", "forces", lambda row: _number(row.error)),
    (
        "w > 0",
        "",
        lambda row: _share(None if row.shares is None else (row.shares > 0).double().mean()),
    ),
    (
        "tied energy",
        "cosine",
        lambda row: _number(row.tied and row.tied.alignment.nanmean(), "+.2f"),
    ),
    ("", "down", lambda row: _share(row.tied and row.tied.share_down)),
    (
        "own or fitted",
        "cosine",
        lambda row: _number(row.fitted and row.fitted.alignment.nanmean(), "+.2f"),
    ),
    ("", "down", lambda row: _share(row.fitted and row.fitted.share_down)),
)


def _number(value, form: str = ".3f") -> str:
    if value is None:
        return ""
    return "0" if form == ".3f" and value < 5e-7 else format(float(value), form)


def _share(value) -> str:
    return "" if value is None else f"{float(value):.0%}"


@dataclass(frozen=True)
class Report:
    """What :func:`analyse` found, a :class:`LayerReport` a layer.

    Attributes:
        model: the class of the model.
        layers: in the order of their calls.
        tokens: how many tokens the energies were taken of.
    """

    model: str
    layers: tuple[LayerReport, ...]
    tokens: int

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __getitem__(self, key: int | str) -> LayerReport:
        if isinstance(key, int):
            return self.layers[key]
        for layer in self.layers:
            if layer.name == key:
                return layer
        names = ", ".join(layer.name for layer in self.layers)
        raise KeyError(f"no layer `{key}` in this report: its layers are {names}")

    def table(self) -> str:
        """One line a layer; empty where a figure makes no sense."""
        columns = [[title, under, *map(cell, self.layers)] for title, under, cell in COLUMNS]
        columns = [column for column in columns if any(column[2:])]
        lines = []
        for cells in zip(*columns, strict=True):
            padded = []
            for n, (cell, column) in enumerate(zip(cells, columns, strict=True)):
                width = max(map(len, column))
                padded.append(cell.ljust(width) if n == 0 else cell.rjust(width))
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Everything but the single tokens, ready for JSON."""
        layers = [layer.to_dict() for layer in self.layers]
        return {"model": self.model, "tokens": self.tokens, "layers": layers}

    def plot(self):
        """A figure: antisymmetry, how far weights and forces are from tied, and who goes down."""
        from .pictures import overview

        return overview({self.model: self})

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.txt (the table) and report.png into a folder, and return it."""
        from matplotlib import pyplot as plt

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        (folder / "report.json").write_text(text, "utf-8")
        (folder / "report.txt").write_text(self.table() + "\n", "utf-8")
        figure = self.plot()
        figure.savefig(folder / "report.png", dpi=150)
        plt.close(figure)
        return folder


def analyse(
    model: nn.Module,
    *inputs,
    layers: Sequence[str] = (),
    probes: int = 16,
    tokens: int = 8,
    generator: torch.Generator | None = None,
    **keywords,
) -> Report:
    """How far every layer of a model is from descending an energy, and which: the numbers of this package together.

    Of energy layers: antisymmetry, and the descent on their own energy. Of attention and gated MLPs of Llama and its
    relatives: antisymmetry, the distance of the weights from tied ones, the energy fitted to every second sequence
    (:func:`fit_energy`), and on the others its error and whether the layer's own update descends it. Of any other
    module, by name: antisymmetry.

    Antisymmetry is taken on one sequence, for what a layer reads with context and gates held, for the state through
    the norm with the same held, and for one token at a time with nothing held.

    Args:
        model: in eval mode; in float64 (``model.double()``) for zeros that are zero.
        *inputs, **keywords: what to call it with; several sequences, without padding, at positions 0, 1, ...
        layers: names of submodules to look at instead, each as the update that it returns.
        probes, generator: of the estimator; see :func:`antisymmetry`.
        tokens: how many tokens move, one at a time, where nothing is held.

    Raises:
        ValueError: no layer is found, or called; see :func:`~cem.analysis.sublayers`.

    >>> import torch, cem
    >>> from cem.analysis import analyse
    >>> layer = cem.derive(cem.energies.rotary_interaction, dim=8, heads=2, rank=4, dtype=torch.float64)
    >>> report = analyse(layer, torch.randn(2, 6, 8, dtype=torch.float64))
    >>> report[0].frozen.relative < 1e-12, report[0].fitted.share_down
    (True, 1.0)
    """
    options = {"probes": probes, "generator": generator}
    calls = sublayers(model, *inputs, layers=layers, **keywords)
    rows = tuple(_layer_report(call, tokens, options) for call in calls)
    return Report(type(model).__name__, rows, calls[0].h.shape[:-1].numel())


def energies_along(model: nn.Module, *inputs, **keywords) -> dict[str, Descent]:
    """The descent of every layer of a model on its own energy, or on the one fitted to it, by the layer's name.

    As in :func:`analyse`, energies are fitted to every second sequence and asked on the others.
    """
    found = {}
    for call in sublayers(model, *inputs, **keywords):
        fitted, asked = _halves(call)
        if call.kind == "energy":
            found[call.name] = descent_of(call.module, asked)
        elif (fit := _fit(fitted)) is not None:
            found[call.name] = descent_of(fit.layer, asked)
    return found


def descent_of(layer, call: Sublayer) -> Descent:
    """What the update of a call does to the energies of a layer."""
    h, u, inputs = call.h, call.u, call.inputs
    if call.kind != "energy":
        inputs = {}
        if call.kind == "attention":
            inputs["visible"] = seen_by(call.inputs.get("attention_mask"), h)
    if layer.energy_function.context is not None and inputs.get("context") is None:
        inputs = inputs | {"context": h}
    z = h.clone().requires_grad_()
    with torch.enable_grad():
        before = layer.energy(z, frozen=h, **inputs)
        (slope,) = torch.autograd.grad(before.sum(), z, materialize_grads=True)
    with torch.no_grad():
        after = layer.energy(h + u, frozen=h, **inputs)
    alignment = -(slope * u).sum(-1) / (slope.norm(dim=-1) * u.norm(dim=-1))
    return Descent(before.detach(), after, alignment)


def _halves(call: Sublayer) -> tuple[Sublayer, Sublayer]:
    """Sequences to fit and others to ask; of a single one both are it."""
    if call.h.dim() < 3 or len(call.h) < 2:
        return call, call
    return call.rows(slice(0, None, 2)), call.rows(slice(1, None, 2))


def _fit(call: Sublayer) -> Fit | None:
    if call.kind not in HELD:
        return None
    try:
        return fit_energy(call.module, call.h, norm=call.norm, rotary=call.rotary, **call.inputs)
    except ValueError:  # biases, norms of queries and keys: antisymmetry takes them
        return None


class _Branch(nn.Module):
    """module(norm(h))."""

    def __init__(self, norm: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.norm, self.module = norm, module

    def forward(self, h: Tensor, **inputs):
        return self.module(self.norm(h), **inputs)


def _layer_report(call: Sublayer, tokens: int, options: dict) -> LayerReport:
    fitted, asked = _halves(call)
    one = asked.rows(slice(0, 1)) if asked.h.dim() > 2 else asked
    row = LayerReport(call.name, call.kind, looks=call.kind != "mlp")
    if call.kind == "energy":
        layer, inputs = call.module, options | one.inputs
        row = replace(row, looks=layer.energy_function.context is not None)
        found = {"frozen": antisymmetry(layer, one.h, **inputs)}
        if not isinstance(layer.norm, nn.Identity):
            found["state"] = antisymmetry(layer, one.h, coordinates="state", **inputs)
        if not layer.joint:
            found["token"] = antisymmetry(layer, one.h, reading="token", tokens=tokens, **inputs)
        return replace(row, **found, fitted=descent_of(layer, asked))
    if call.kind == "module":
        options = options | {"residual": call.residual, "tokens": tokens}
        return replace(row, token=antisymmetry(call.module, one.h, **options, **one.inputs))
    row = replace(row, **_antisymmetries(one, tokens, options | one.inputs))
    fit = _fit(fitted)
    if fit is None:
        return row
    found = {"tie": fit.tie, "shares": fit.layer.w.detach().clone().flatten()}
    seen = (
        {}
        if call.kind == "mlp"
        else {"visible": seen_by(asked.inputs.get("attention_mask"), asked.h)}
    )
    with torch.no_grad():
        force = fit.layer(asked.h, **seen) - asked.h
    found["error"] = float((asked.u - force).norm() / asked.u.norm())
    found["fitted"] = descent_of(fit.layer, asked)
    fit.layer.w.fill_(1.0)
    return replace(row, **found, tied=descent_of(fit.layer, asked))


def _antisymmetries(one: Sublayer, tokens: int, options: dict) -> dict[str, Antisymmetry]:
    """Those of attention or an MLP of transformers."""
    held = HELD[one.kind]
    with torch.no_grad():
        g = one.h if one.norm is None else one.norm(one.h)
    found = {"frozen": antisymmetry(one.module, g, hold=held, **options)}
    if one.norm is not None:
        held = tuple(f"module.{name}" for name in held)
        found["state"] = antisymmetry(_Branch(one.norm, one.module), one.h, hold=held, **options)
    if one.kind == "attention":
        found["token"] = antisymmetry(one.module, g, tokens=tokens, **options)
    else:  # a token moves nobody else, so all may move at once
        alone = antisymmetry(one.module, g, reading="frozen", **options)
        found["token"] = replace(alone, reading="token")
    return found
