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
from cem.compression import losses, spectra

from .data import Data
from .run import Run
from .throughput import flops_per_token

WAYS = ("loss", "spectra", "schedule", "uniform")


@dataclass(frozen=True)
class Calibration:
    """Windows of text, each read from its beginning.

    Attributes:
        train, held_out: tokens (B, T), of both sides of the data.
        others: of the training side too, and not among ``train``.
        tokenizer: of the data.
    """

    train: Tensor
    others: Tensor
    held_out: Tensor
    tokenizer: object

    @classmethod
    def of(
        cls,
        folder: str | Path,
        source: str | None = None,
        windows: int = 32,
        *,
        held_out: int | None = None,
        seed: int = 0,
    ) -> Calibration:
        """Of the data of the run in a folder, or of a source.

        Args:
            folder: of the model.
            source: as in :class:`cem.lm.Data`; the tokenizer is then the one in the folder.
            windows: how many of each, drawn from the seed.
            held_out: how many of the other side, where not as many.

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

        def draw(side, count: int) -> Tensor:
            order = torch.randperm(len(side), generator=chance)[:count]
            return torch.stack([side[int(n)]["input_ids"] for n in order])

        if len(prepared.train) < 2:
            raise ValueError(
                f"the data of {folder} are fitted to and measured on different windows: got {len(prepared.train)} of"
                " the training side; give more text"
            )
        train, others = draw(prepared.train, 2 * windows).chunk(2)
        return cls(train, others, draw(prepared.held_out, held_out or windows), prepared.tokenizer)


def plan_for(
    model: PreTrainedModel,
    text: Calibration,
    budget: float,
    *,
    by: str = "loss",
    cost: str = "parameters",
    groups: str = "head",
    multiple: int = 1,
    steps: int = 40,
    layers: list[Heads] | None = None,
) -> tuple[list[Heads], Plan]:
    """The heads of a model with their gains, and a plan by them.

    Args:
        model: a causal language model.
        text: to calibrate on.
        budget: as in :func:`cem.allocation.allocate`; so are ``cost``, ``groups`` and ``multiple``.
        by: ``"loss"`` (:func:`cem.compression.losses`), ``"spectra"``, ``"schedule"`` or ``"uniform"``.
        steps: of the fit that the plan is made for.
        layers: where they were measured before.
    """
    together = groups == "layer"
    if layers is None and by == "loss":
        layers = losses(model, text.train, text.others, together=together, steps=steps)
    layers = layers or spectra(model, text.train, together=together)
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
    return layers, allocate(budget, layers, **options)


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
    return {"plan.png": png(plan.plot()), "gains.png": png(rank_plots.gains(layers))}


def png(ax) -> bytes:
    """The figure of some axes as the bytes of a PNG file; the figure is closed."""
    from matplotlib import pyplot as plt

    held = io.BytesIO()
    ax.figure.savefig(held, format="png", dpi=150)
    plt.close(ax.figure)
    return held.getvalue()
