"""Whether a routed step is the gradient of one number, and that number.

With weights lam = grad v, v(s) = max s . lam + eps H(lam), and scores that are the energies, the chain rule gives

    d v(E_1(x_1), ..., E_T(x_T)) / d x_i = lam_i dE_i/dx_i:

the conditional step is itself a step down a smooth sum of the k largest energies.

Legend: B batch, T tokens, D dim, K chosen tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..language.symbols import Frozen
from ..layer import EnergyLayer
from ..update import GradientDescent
from .adapter import Adapter
from .rows import Given, looks, stages_of
from .top_k import soft_top_k_sum


class Potential(NamedTuple):
    """Whether a step is the gradient of one number V, and why.

    ``kind`` is ``"exact"`` where y - x = -dV/dx with V a function of all states together, so that the Jacobian of the
    step is symmetric; ``"frozen-context"`` where that holds while what the tokens see, gates and weights stay at the
    values they have at the input; else ``"none"``. It is about the values of a step: the derivative of a
    straight-through weight is another on purpose.
    """

    kind: str
    reason: str


def potential_of(routed) -> Potential:
    """See :attr:`cem.Routed.potential`."""
    why = _no_gradient_step(stages_of(routed.layer)) or _no_light_gradient(routed)
    if why:
        return Potential("none", why)
    (layer,), energy = stages_of(routed.layer), stages_of(routed.layer)[0].energy_function
    if looks(layer):
        return Potential("frozen-context", f"energy `{energy.name}` holds its context fixed")
    if energy.expression is None or energy.expression.atoms(Frozen):
        return Potential("frozen-context", f"energy `{energy.name}` may hold gates fixed")
    if routed.scored != "energy":
        return Potential(
            "frozen-context", "the weights depend on states through other scores than the energies"
        )
    if routed.router.causal:
        return Potential(
            "frozen-context",
            "the weight of a token depends on earlier tokens and not on later ones",
        )
    if routed.weight == "soft":
        return Potential(
            "frozen-context",
            "tokens that are not chosen have weights too: weight='dense' is exact",
        )
    if routed.weight == "dense":
        return Potential(
            "exact", "the weights are the gradient of a smooth sum of the k largest energies"
        )
    return Potential(
        "exact",
        "the step is the gradient of the sum of the k largest energies, where no two are equal",
    )


def _no_gradient_step(stages: list[nn.Module]) -> str | None:
    """Why a layer is not a single gradient step, or None."""
    if len(stages) != 1 or not isinstance(stages[0], EnergyLayer):
        return "several layers, or one without an energy, are not one gradient step"
    layer = stages[0]
    if layer.steps != 1 or type(layer.update) is not GradientDescent:
        return f"{layer.steps} step(s) of {type(layer.update).__name__} are not one gradient step"
    if layer.preconditioner is not None or type(layer.norm) is not nn.Identity:
        return "a preconditioner or a norm stands between the gradient and the step"
    if layer.moving:
        return "tokens move as the context of others"
    return None


def _no_light_gradient(routed) -> str | None:
    """Why the adapter is not a gradient step, or None."""
    adapter = routed.adapter
    if adapter is None:
        return None
    if not (isinstance(adapter, Adapter) and adapter.tie):
        return "the adapter is not tied, so its Jacobian is not symmetric"
    if type(routed.norm) is not nn.Identity:
        return "the adapter reads states through a norm; `norm=torch.nn.Identity()` makes it a gradient step"
    return None


def energy_of(routed, h: Tensor, at: Tensor, given: Given) -> Tensor:
    """See :meth:`cem.Routed.energy`."""
    kind, reason = potential_of(routed)
    if kind == "none":
        raise ValueError(f"this step has no potential: {reason}")
    shape, (layer,) = h.shape, stages_of(routed.layer)
    h, at = (z.reshape(-1, *shape[-2:]) for z in (h, at))
    if (
        kind == "exact"
        or routed.scored == "energy"
        and routed.weight != "soft"
        and not routed.router.causal
    ):
        energies = _energies(routed, layer, h, at, given.rows())
        k = routed.router.kept(given.real, h.shape[1])
        if routed.weight == "dense":
            value = soft_top_k_sum(energies, k, routed.router.eps, mask=given.real)
        else:
            own = (
                energies.detach()
                if given.real is None
                else energies.detach().masked_fill(~given.real, -torch.inf)
            )
            rank = own.argsort(-1, descending=True).argsort(-1)
            value = energies.masked_fill(rank >= torch.as_tensor(k)[..., None], 0).sum(-1)
    else:
        u = routed.norm(at)
        scores = routed.scores(at, u, given)
        choice = routed.choose(scores, u, given.real)
        energies = _energies(routed, layer, h, at, given.rows(choice))
        weight = choice.weight
        if routed.weight == "straight_through":
            weight = torch.ones_like(weight) if choice.present is None else choice.present
        value = (weight.to(energies.dtype) * energies).sum(-1)
    value = value * layer.update.size(None)
    if routed.adapter is not None:
        value = value + routed.adapter.energy(h).sum(-1)
    return value.reshape(shape[:-2])


def _energies(routed, layer: EnergyLayer, h: Tensor, at: Tensor, rows) -> Tensor:
    """Energies (B, K) of rows of h where all that they see, and their gates, are taken at other states."""
    selected = routed.context == "selected"
    inputs = rows.inputs(layer, at, selected)
    if looks(layer) and inputs.get("context") is None:
        inputs["context"] = rows.take(at)
        if layer.reader.placed:
            inputs["positions"] = inputs["context_positions"] = rows.along(rows.places(at))
    return layer.energy(rows.take(h), frozen=rows.take(at), **inputs)
