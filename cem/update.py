"""Update rules: how a state moves along dE/dh.

A rule has ``init(h) -> state`` and ``update(h, gradient, state, scale=1.0) -> (h, state)``. ``gradient`` times
``scale`` is P dE/dh, which points uphill; the factor comes apart from the tensor so that a rule can fold it into
its step size instead of reading and writing the tensor once more.
"""

from __future__ import annotations

import abc
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Promise(NamedTuple):
    """What an update rule promises of an energy; see :mod:`cem.certificate` for the proofs.

    ``bound`` is the largest step size that descends, None where nothing is promised; ``holds`` says whether the
    present step sizes are allowed by it, ``statement`` says so in sentences.
    """

    bound: float | None
    holds: bool
    statement: str


class AbstractUpdate(nn.Module, abc.ABC):
    """The interface of an update rule. A rule keeps what it remembers between steps in its state."""

    @abc.abstractmethod
    def init(self, h: Tensor):
        """What the rule remembers before the first step, for a state h of shape (..., dim); None for nothing."""

    @abc.abstractmethod
    def update(self, h: Tensor, gradient: Tensor, state, scale: float = 1.0) -> tuple:
        """The next h, shape (..., dim), and what to remember; ``scale * gradient`` points uphill."""

    def promise(self, smoothness: float, *, steps: int, scalar: bool, normed: bool) -> Promise:
        """When a step of this rule cannot raise the energy; nothing, unless a rule says more.

        Args:
            smoothness: no eigenvalue of the Hessian times P, times the slope of a norm in front, is above it; 0 for
                a concave energy.
            steps: how often the rule is applied.
            scalar: P is a multiple of the identity.
            normed: the energy reads the state through a norm.
        """
        del smoothness, steps, scalar, normed
        return Promise(None, False, f"No theorem is known for `{type(self).__name__}`.")


class GradientDescent(AbstractUpdate):
    """h+ = h - step_size * P dE/dh.

    Args:
        step_size: eta, in units of the state per unit of gradient.
        learn: make it a learned number, registered as ``step_size``.

    Raises:
        ValueError: a step size that is not positive: it would climb.

    >>> import torch, cem
    >>> rule = cem.GradientDescent(step_size=0.5)
    >>> rule.update(torch.tensor([1.0]), torch.tensor([1.0]), rule.init(None))[0]
    tensor([0.5000])
    """

    def __init__(self, step_size: float = 1.0, *, learn: bool = False) -> None:
        super().__init__()
        if not step_size > 0:
            raise ValueError(
                f"`GradientDescent` needs a positive step size: got {step_size}; type"
                " `cem.GradientDescent(step_size=1.0)`"
            )
        self.learn = learn
        if learn:
            self.step_size = nn.Parameter(torch.tensor(float(step_size)))
        else:
            self.step_size = float(step_size)

    def init(self, h: Tensor) -> None:
        return None

    def update(
        self, h: Tensor, gradient: Tensor, state: None, scale: float = 1.0
    ) -> tuple[Tensor, None]:
        if self.learn:
            return torch.addcmul(h, self.step_size.to(h.dtype), gradient, value=-scale), state
        return torch.add(h, gradient, alpha=-self.step_size * scale), state

    def promise(self, smoothness: float, *, steps: int, scalar: bool, normed: bool) -> Promise:
        """Every step size up to 2 / smoothness descends; every one at all where the energy is concave."""
        del steps, scalar  # a norm with a P that is not scalar never gets here
        bound = 2.0 / smoothness if smoothness else math.inf
        sizes = torch.as_tensor(self.step_size, dtype=torch.float64).detach().reshape(-1)
        least, most = float(sizes.min()), float(sizes.max())
        holds = least >= 0.0 and most <= bound
        if smoothness:
            said = f"A step descends if its size is at most {bound:.4g}."
        else:
            said = "A step of any size descends"
            said += (
                "."
                if normed
                else ": E(h - eta P g) <= E(h) - eta g.Pg for every eta >= 0, with g = dE/dh."
            )
        shown = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        if holds:
            return Promise(
                bound, True, f"{said} The layer's own step size, {shown}, satisfies this."
            )
        why = "is above it" if least >= 0.0 else "is below 0 or no number"
        return Promise(
            bound,
            False,
            f"{said} The layer's own step size, {shown}, {why}, so nothing is promised.",
        )

    def extra_repr(self) -> str:
        step_size = self.step_size.item() if self.learn else self.step_size
        return f"step_size={step_size:g}{', learn=True' if self.learn else ''}"
