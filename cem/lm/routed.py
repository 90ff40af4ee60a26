"""A part of a block for a share of the tokens, from its description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import cem
from cem.routing.rows import stages_of

OPTIONS = ("bottleneck", "capacity", "causal", "context", "eps", "tie", "weight")
CAUSAL = ("threshold", "predictor")
BOTTLENECK = 64


def routed(layer: nn.Module, options: Mapping[str, Any], dim: int, eps: float) -> cem.Routed:
    """A layer, or a stack, behind a router that does not look ahead.

    The keys of ``options`` are ``capacity``, the share, which must be given; ``bottleneck``, the units of the adapter
    of all tokens, 64 if missing, and none where it is 0; ``tie``, whether that is an energy; and ``context``,
    ``weight`` and ``eps`` as in :class:`cem.Routed`. ``causal`` is

    - ``"threshold"``, if missing: the best share of the tokens up to each one, in training as in use;
    - ``"predictor"``: in training the best of the whole sequence, in use those that a linear predictor says. The loss
      of :class:`~cem.lm.model.CEMForCausalLM` trains it; the held-out loss is that of the predicted choice.

    A fixed threshold is no option here: it comes from states, and nothing is learned before.

    Args:
        layer: the layer, or an ``nn.Sequential``.
        options: the mapping.
        dim: the width of the state.
        eps: of the norm through which router and adapter read the state.

    Raises:
        ValueError: an unknown key or a bad value, no share.

    >>> layer = cem.derive(cem.energies.interaction, dim=8, heads=2, rank=4)
    >>> routed(layer, {"capacity": 0.5, "bottleneck": 0}, 8, 1e-6).router.capacity
    0.5
    """
    if not isinstance(options, Mapping) or "capacity" not in options:
        raise ValueError(
            f"`routed` is a mapping with a share of the tokens: got {options!r}; type `routed: {{capacity: 0.33}}`"
        )
    for key in options:
        if key not in OPTIONS:
            raise ValueError(f"`routed` has the keys {list(OPTIONS)}: got {key!r}; leave it out")
    own = {"causal": CAUSAL[0], **options}
    if own["causal"] not in CAUSAL:
        raise ValueError(
            f"`causal` of a routed part is one of {list(CAUSAL)}: got {own['causal']!r}; type `causal: threshold`"
        )
    width, tie = own.pop("bottleneck", BOTTLENECK), own.pop("tie", False)
    adapter = cem.Adapter(dim, width, tie) if width else None
    norm = nn.RMSNorm(dim, eps=eps)
    return cem.Routed(layer, float(own.pop("capacity")), adapter, norm=norm, **own)


def router_losses(part: nn.Module) -> list[Tensor]:
    """What trains the predictor of a part, if it has one: the cross entropy of its last call in training.

    Raises:
        ValueError: the call left no graph, as in a reentrant checkpoint.
    """
    if not isinstance(part, cem.Routed) or part.router.causal != "predictor":
        return []
    loss, learns = part.router.loss, part.router.predictor.weight.requires_grad
    if learns and torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "the predictor of a router does not learn in reentrant checkpoints: got one; type"
            ' `gradient_checkpointing_kwargs={"use_reentrant": False}`'
        )
    return [loss]


def layers_of(part: nn.Module) -> list[nn.Module]:
    """The layers of a part: itself, or what stands behind its router."""
    return stages_of(part.layer) if isinstance(part, cem.Routed) else [part]


def seen_by(part: cem.Routed, view, cached: bool) -> dict:
    """What a routed part is called with, from a :class:`~cem.lm.view.View`: padding is not chosen."""
    if cached and view.pairs:
        raise ValueError(
            "a router compares a token with all earlier ones, whoever may see them: got a mask for every pair with a"
            " cache; type `use_cache=False`"
        )
    found = {"visible": view.visible if view.real is None and not cached else view.real}
    if any(layer.energy_function.has_positions for layer in layers_of(part)) and not view.counted:
        found["positions"] = view.positions
    return found
