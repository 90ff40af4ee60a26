"""What is compared: each derived layer with its hand-written twin on the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cem
from cem import energies
from cem.energies import diagonal_plus_low_rank, gated, interaction, rotary_interaction

from .handwritten import DiagonalAttention, RotaryAttention, TiedAttention, TiedGatedMLP
from .settings import Settings


@dataclass(frozen=True)
class Case:
    """A derived layer and how to write the same by hand."""

    name: str
    twin: str
    derive: Callable[..., cem.EnergyLayer]
    write: Callable[[cem.EnergyLayer], nn.Module]


def interaction_layer(settings: Settings, **options) -> cem.EnergyLayer:
    sizes = {"dim": settings.dim, "heads": settings.heads, "rank": settings.rank}
    return cem.derive(interaction, **sizes, **options)


def gated_layer(settings: Settings, **options) -> cem.EnergyLayer:
    return cem.derive(gated, dim=settings.dim, hidden=settings.hidden, **options)


def diagonal_layer(settings: Settings, **options) -> cem.EnergyLayer:
    sizes = {"dim": settings.dim, "heads": settings.heads, "rank": settings.rank}
    layer = cem.derive(diagonal_plus_low_rank, **sizes, **options)
    with torch.no_grad():
        layer.lam.normal_(std=0.5)  # a diagonal starts at zero, which would hide a wrong one
    return layer


def rotary_layer(settings: Settings, **options) -> cem.EnergyLayer:
    sizes = {"dim": settings.dim, "heads": settings.heads, "rank": settings.rank}
    return cem.derive(rotary_interaction, **sizes, **options)


CASES = (
    Case(
        "interaction",
        "tied attention",
        interaction_layer,
        lambda layer: TiedAttention(layer.Q, layer.K, layer.scalars["beta"]),
    ),
    Case(
        "diagonal plus low rank",
        "attention on concatenated features",
        diagonal_layer,
        lambda layer: DiagonalAttention(layer.Q, layer.K, layer.lam, layer.scalars["beta"]),
    ),
    Case(
        "gated",
        "tied gated MLP",
        gated_layer,
        lambda layer: TiedGatedMLP(layer.U, layer.G),
    ),
)


ROTARY = Case(
    "rotary interaction",
    "rotary tied attention",
    rotary_layer,
    lambda layer: RotaryAttention(layer.Q, layer.K, layer.scalars["beta"], 8192),
)


class AutogradOfEnergy(nn.Module):
    """The layer as automatic differentiation of its energies, all tokens at once.

    The energies are written out over all pairs of tokens; the context is held fixed and training
    gradients flow through it.
    """

    def __init__(self, layer: cem.EnergyLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            state = h.view_as(h) if training and h.requires_grad else h.detach().requires_grad_()
            energy = self.layer.energy(state, context=h, frozen=h).sum()
            (gradient,) = torch.autograd.grad(energy, state, create_graph=training)
        return h - gradient


def interaction_as(kind: str, settings: Settings) -> nn.Module:
    """The interaction layer: in closed form, as autograd of all tokens, or of one, mapped.

    Another kind is the name of an energy of the gallery with the same sizes, in closed form.
    """
    if kind in energies.__all__:
        sizes = {"dim": settings.dim, "heads": settings.heads, "rank": settings.rank}
        return cem.derive(getattr(energies, kind), lowering="fused", **sizes)
    if kind == "vmap":
        return interaction_layer(settings, lowering="autograd")
    layer = interaction_layer(settings, lowering="fused")
    return AutogradOfEnergy(layer) if kind == "autograd" else layer


def backward(module: nn.Module, h: Tensor, weights: Tensor, **seen: Tensor) -> tuple[Tensor, ...]:
    """The gradients of ``(module(h, **seen) * weights).sum()`` for h and every parameter, in that order."""
    return torch.autograd.grad(module(h, **seen), [h, *module.parameters()], weights)


def largest_difference(case: Case, settings: Settings) -> float:
    """Largest difference, in float64, of the output and of every gradient of the two sides.

    The difference of each tensor is relative to its largest entry.
    """
    layer = case.derive(settings).to(settings.device, torch.float64)
    written = case.write(copy.deepcopy(layer))
    names = [name for name, _ in layer.named_parameters()]
    twins = dict(written.named_parameters())
    if set(names) != set(twins):
        raise ValueError(f"`{case.name}` and its twin differ in parameters: {names}, {list(twins)}")
    shape = (2, 33, settings.dim)
    h, weights = (torch.randn(shape, device=settings.device, dtype=torch.float64) for _ in range(2))
    h.requires_grad_()
    one, other = layer(h), written(h)
    ours = [one, *torch.autograd.grad(one, [h, *layer.parameters()], weights)]
    theirs = [other, *torch.autograd.grad(other, [h, *(twins[n] for n in names)], weights)]
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
