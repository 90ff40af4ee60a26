"""From a trained model and text to a plan: what ``cem allocate`` and the benchmark share."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cem import rank_plots
from cem.allocation import Heads, Plan, allocate, uniform
from cem.compression import layer_weights, spectra

from .data import Data
from .run import Run
from .throughput import flops_per_token

WAYS = ("weights", "spectra", "schedule", "uniform")


@dataclass(frozen=True)
class Calibration:
    """Windows of text, each read from its beginning.

    Attributes:
        train, held_out: tokens (B, T), of both sides of the data.
        tokenizer: of the data.
    """

    train: Tensor
    held_out: Tensor
    tokenizer: object

    @classmethod
    def of(
        cls, folder: str | Path, source: str | None = None, windows: int = 32, *, seed: int = 0
    ) -> Calibration:
        """Of the data of the run in a folder, or of a source.

        Args:
            folder: of the model.
            source: as in :class:`cem.lm.Data`; the tokenizer is then the one in the folder.
            windows: how many of each side, drawn from the seed.

        Raises:
            ValueError: neither a run nor a source.
        """
        folder = Path(folder)
        if source is not None:
            data = Data(source=source, tokenizer=str(folder), context=128)
        elif (folder / "run.yaml").is_file():
            data = Data(**Run.read(folder / "run.yaml").data)
        else:
            raise ValueError(
                f"{folder} has no run.yaml that names its data: got a model alone; type `--data SOURCE`"
            )
        prepared = data.prepare()
        chance = torch.Generator().manual_seed(seed)

        def draw(side) -> Tensor:
            order = torch.randperm(len(side), generator=chance)[:windows]
            return torch.stack([side[int(n)]["input_ids"] for n in order])

        return cls(draw(prepared.train), draw(prepared.held_out), prepared.tokenizer)


def plan_for(
    model: PreTrainedModel,
    text: Calibration,
    budget: float,
    *,
    by: str = "weights",
    cost: str = "parameters",
    groups: str = "head",
    multiple: int = 1,
    layers: list[Heads] | None = None,
    weights: list[float] | None = None,
) -> tuple[list[Heads], Plan]:
    """The spectra of a model, and a plan by them.

    Args:
        model: a causal language model.
        text: to calibrate on.
        budget: as in :func:`cem.allocation.allocate`; so are ``cost``, ``groups`` and ``multiple``.
        by: ``"weights"``, measured in the loss, ``"spectra"`` alone, ``"schedule"`` or ``"uniform"``.
        layers, weights: where they were measured before.
    """
    layers = layers or spectra(model, text.train, together=groups == "layer")
    options = {
        "cost": cost,
        "groups": groups,
        "multiple": multiple,
        "context": text.train.shape[1],
    }
    if by == "uniform":
        return layers, uniform(budget, layers, **options)
    if by == "schedule":
        bare = [replace(layer, gains=None) for layer in layers]
        return layers, allocate(budget, bare, **options)
    if by == "weights" and weights is None:
        weights = layer_weights(model, text.train)
    weights = weights if by == "weights" else None
    return layers, allocate(budget, layers, weights=weights, **options)


def savings(model: PreTrainedModel, plan: Plan, text: Calibration) -> dict[str, float]:
    """Shares that a plan leaves of parameters and of forward operations a token: of the heads, and of the whole model.

    The operations of the whole are counted as they run on one window, a backward pass being twice a forward pass.
    """
    found = {}
    item = {"input_ids": text.train[0], "labels": text.train[0]}
    whole = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops_per_token(model, item) / 3,
    }
    plan = replace(plan, context=text.train.shape[1])
    for kind, total in whole.items():
        now, full = plan.total(kind), plan.total(kind, full=True)
        found[f"heads_{kind}"] = now / full
        found[f"model_{kind}"] = 1 - (full - now) / total
    return found


def shares(model: PreTrainedModel, plan: Plan, text: Calibration) -> str:
    """The same as a sentence."""
    found = savings(model, plan, text)
    return (
        f"left of the heads: {found['heads_parameters']:.1%} of the parameters, {found['heads_flops']:.1%} of the"
        f" operations; of the whole model: {found['model_parameters']:.1%} and {found['model_flops']:.1%}"
    )


def pictures(layers: list[Heads], plan: Plan) -> dict[str, bytes]:
    """The pictures of a plan as PNG, by their name."""
    return {"plan.png": png(plan.plot()), "spectra.png": png(rank_plots.spectra(layers))}


def png(ax) -> bytes:
    """The figure of some axes as the bytes of a PNG file; the figure is closed."""
    from matplotlib import pyplot as plt

    held = io.BytesIO()
    ax.figure.savefig(held, format="png", dpi=150)
    plt.close(ax.figure)
    return held.getvalue()
