"""Update rules: how a state moves along dE/dh.

A rule has ``init(h) -> state`` and ``update(h, gradient, state, scale=1.0, objective=None) -> (h, state)``.
``gradient`` times ``scale`` is P dE/dh, which points uphill; the factor comes apart from the tensor so that a rule can
fold it into its step size instead of reading and writing the tensor once more. It is taken where ``look(h, state)``
says, at h itself unless a rule looks ahead.

Legend: B batch, T tokens, D dim.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import prox


class Promise(NamedTuple):
    """What an update rule promises of an energy; see :mod:`cem.certificate` for the proofs.

    ``bound`` is the largest step size that descends, None where nothing is promised; ``holds`` says whether the
    present step sizes are allowed by it, ``statement`` says so in sentences.
    """

    bound: float | None
    holds: bool
    statement: str


class Objective(Protocol):
    """The energy that a step descends, as a function of the state h (B, T, D), and which step it is.

    Context and gates are those that the step sees. Where a layer has a norm, energies and slopes are those of
    E(norm(h)) and the Hessian is that of E at norm(h), as for the gradient that a rule is given.

    Attributes:
        step: which of the layer's steps this is, counted from 0.
        curvature: ``energy.curvature``, for rules that ask for Hessian products.
    """

    step: int
    curvature: str

    def energy(self, h: Tensor) -> Tensor:
        """The energy of every token, (B, T), without a derivative."""

    def slope(self, h: Tensor, direction: Tensor) -> Tensor:
        """d/da E(h + a direction) at a = 0 for every token, (B, T), without a derivative."""

    def hessian(self, h: Tensor) -> Callable[[Tensor], Tensor]:
        """The linear map v -> d2E/dh2 v of every token, (B, T, D) to (B, T, D)."""


FORMULA = ": E(h - eta P g) <= E(h) - eta g.Pg for every eta >= 0, with g = dE/dh"


class AbstractUpdate(nn.Module, abc.ABC):
    """The interface of an update rule. A rule keeps what it remembers between steps in its state.

    Attributes:
        remembers: whether the state is a tensor like h that may be carried from layer to layer (``memory=``).
        needs: names of what it asks of the objective, ``"energy"`` and ``"hessian"``.
        searches: whether it takes a step only where the energy has not risen, and none otherwise.
    """

    remembers: bool = False
    needs: tuple[str, ...] = ()
    searches: bool = False

    def init(self, h: Tensor):
        """What the rule remembers before the first step, for a state h of shape (..., dim); None for nothing."""
        return None

    def look(self, h: Tensor, state) -> Tensor:
        """Where the gradient is to be taken, shape (..., dim)."""
        return h

    @abc.abstractmethod
    def update(
        self,
        h: Tensor,
        gradient: Tensor,
        state,
        scale: float = 1.0,
        objective: Objective | None = None,
    ) -> tuple:
        """The next h, shape (..., dim), and what to remember; ``scale * gradient`` points uphill."""

    def forward(self, *arguments) -> tuple:
        """:meth:`update`: a layer calls its rule as a module, for hooks that fetch parameters from elsewhere."""
        return self.update(*arguments)

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

    def check(self, energy, steps: int, preconditioner: nn.Module | None) -> None:
        """Refuse, with ``ValueError``, a layer that the rule does not fit; called by ``derive``."""


class Stepping(AbstractUpdate):
    """A rule with step sizes: one number, or one a step, fixed or learned."""

    def __init__(self, step_size: float | Iterable[float], *, learn: bool = False) -> None:
        super().__init__()
        self.per_step = isinstance(step_size, Iterable)
        sizes = tuple(map(float, step_size)) if self.per_step else (float(step_size),)
        name = type(self).__name__
        if not sizes or not all(size > 0 for size in sizes):
            raise ValueError(
                f"`{name}` needs a positive step size: got {step_size}; type `cem.{name}(step_size=1.0)`"
            )
        self.learn = learn
        held = sizes if self.per_step else sizes[0]
        self.step_size = nn.Parameter(torch.tensor(sizes)) if learn else held

    def check(self, energy, steps: int, preconditioner: nn.Module | None) -> None:
        if self.per_step and len(self.step_size) != steps:
            name, count = type(self).__name__, len(self.step_size)
            raise ValueError(
                f"energy `{energy.name}`: `{name}` has one step size a step: got {count} of them and steps={steps};"
                f" type `steps={count}`"
            )

    def size(self, objective: Objective | None) -> float | Tensor:
        """The step size of the present step."""
        if not self.per_step:
            return self.step_size
        return self.step_size[0 if objective is None else objective.step]

    def up_to(self, smoothness: float, formula: str, falls: str = "descends") -> Promise:
        """The promise that steps of size up to 2 / smoothness descend."""
        bound = 2.0 / smoothness if smoothness else math.inf
        sizes = torch.as_tensor(self.step_size, dtype=torch.float64).detach().reshape(-1)
        least, most = float(sizes.min()), float(sizes.max())
        holds = least >= 0.0 and most <= bound
        if smoothness:
            said = f"A step {falls} if its size is at most {bound:.4g}."
        else:
            said = f"A step of any size {falls}{formula}."
        shown = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        if holds:
            said += f" The layer's own step size, {shown}, satisfies this."
        else:
            why = "is above it" if least >= 0.0 else "is below 0 or no number"
            said += f" The layer's own step size, {shown}, {why}, so nothing is promised."
        return Promise(bound, holds, said)

    def along(
        self, h: Tensor, gradient: Tensor, objective: Objective | None, scale: float
    ) -> Tensor:
        """h - step_size * scale * gradient."""
        size = self.size(objective)
        if isinstance(size, Tensor):
            return torch.addcmul(h, size.to(h.dtype), gradient, value=-scale)
        return torch.add(h, gradient, alpha=-size * scale)

    def extra_repr(self) -> str:
        return f"step_size={_shown(self.step_size)}{', learn=True' if self.learn else ''}"


def _shown(value: float | tuple[float, ...] | Tensor) -> str:
    value = value.tolist() if isinstance(value, Tensor) else value
    value = (value,) if isinstance(value, float) else value
    if len(value) == 1:
        return f"{value[0]:g}"
    return f"({', '.join(f'{one:g}' for one in value)})"


class GradientDescent(Stepping):
    """h+ = h - step_size * P dE/dh.

    Args:
        step_size: eta, in units of the state per unit of gradient; or a sequence of them, one a step.
        learn: make it a learned number, or learned numbers, registered as ``step_size``, shape (1,) or (N,).

    Raises:
        ValueError: a step size that is not positive: it would climb.

    >>> import torch, cem
    >>> rule = cem.GradientDescent(step_size=0.5)
    >>> rule.update(torch.tensor([1.0]), torch.tensor([1.0]), rule.init(None))[0]
    tensor([0.5000])
    """

    def __init__(self, step_size: float | Iterable[float] = 1.0, *, learn: bool = False) -> None:
        super().__init__(step_size, learn=learn)

    def update(
        self,
        h: Tensor,
        gradient: Tensor,
        state: None,
        scale: float = 1.0,
        objective: Objective | None = None,
    ) -> tuple[Tensor, None]:
        return self.along(h, gradient, objective, scale), state

    def promise(self, smoothness: float, *, steps: int, scalar: bool, normed: bool) -> Promise:
        """Every step size up to 2 / smoothness descends; every one at all where the energy is concave."""
        del steps, scalar  # a norm with a P that is not scalar never gets here
        return self.up_to(smoothness, "" if normed else FORMULA)


class Momentum(Stepping):
    """Heavy ball: m+ = momentum * m - step_size * P dE/dh, h+ = h + m+, with m = 0 at first.

    On a quadratic with curvatures between mu and L and P = I, step_size = 4 / (sqrt(L) + sqrt(mu))^2 and momentum =
    ((sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)))^2 contract by (sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)) a step,
    the best rate of a first-order method. The energy need not fall in every step.

    Args:
        step_size: eta, or a sequence of them, one a step.
        momentum: the share of the last move that is kept, 0 <= momentum < 1.
        learn: learn both, registered as ``step_size`` and ``momentum``.

    Raises:
        ValueError: a step size that is not positive, or a momentum outside [0, 1).

    The move m may be carried from one layer to the next, which a stack of layers then shares:

    >>> import torch, cem
    >>> from cem.energies import gated
    >>> rule = cem.Momentum(step_size=0.5, momentum=0.9)
    >>> layers = [cem.derive(gated, dim=8, hidden=16, update=rule) for _ in range(3)]
    >>> h = torch.randn(1, 5, 8)
    >>> memory = rule.init(h)
    >>> for layer in layers:
    ...     h, memory = layer(h, memory=memory)
    >>> memory.shape
    torch.Size([1, 5, 8])

    Source: Polyak, Some methods of speeding up the convergence of iteration methods, 1964.
    """

    remembers = True

    def __init__(
        self,
        step_size: float | Iterable[float] = 1.0,
        momentum: float = 0.9,
        *,
        learn: bool = False,
    ) -> None:
        super().__init__(step_size, learn=learn)
        if not 0 <= momentum < 1:
            name = type(self).__name__
            raise ValueError(
                f"`{name}` needs a momentum of at least 0 and below 1: got {momentum}; type"
                f" `cem.{name}(momentum=0.9)`"
            )
        self.momentum = nn.Parameter(torch.tensor([float(momentum)])) if learn else float(momentum)

    def init(self, h: Tensor) -> Tensor:
        """No move yet: zeros like h."""
        return torch.zeros_like(h)

    def kept(self, memory: Tensor) -> Tensor:
        """momentum * m."""
        momentum = self.momentum.to(memory.dtype) if self.learn else self.momentum
        return memory * momentum

    def update(
        self,
        h: Tensor,
        gradient: Tensor,
        state: Tensor,
        scale: float = 1.0,
        objective: Objective | None = None,
    ) -> tuple[Tensor, Tensor]:
        memory = self.along(self.kept(state), gradient, objective, scale)
        return h + memory, memory

    def promise(self, smoothness: float, *, steps: int, scalar: bool, normed: bool) -> Promise:
        """A single step from rest is one of gradient descent; of later ones nothing is promised."""
        if steps > 1:
            name = type(self).__name__
            return Promise(None, False, f"A step of `{name}` after the first may go up.")
        del scalar
        found = self.up_to(smoothness, "" if normed else FORMULA)
        told = "From rest, without a memory of earlier layers, its step is one of gradient descent."
        return found._replace(statement=f"{told} {found.statement}")

    def extra_repr(self) -> str:
        learn = ", learn=True" if self.learn else ""
        step_size, momentum = _shown(self.step_size), _shown(self.momentum)
        return f"step_size={step_size}, momentum={momentum}{learn}"


class Nesterov(Momentum):
    """Momentum with the gradient at the point ahead: m+ = momentum * m - step_size * P dE/dh(h + momentum * m).

    For a convex energy of curvature at most L, and at least mu > 0, step_size = 1/L and momentum = (sqrt(L) -
    sqrt(mu)) / (sqrt(L) + sqrt(mu)) give E - E* at most of order (1 - sqrt(mu/L))^n after n steps, for P = I.

    Arguments, errors and memory as in :class:`Momentum`.

    >>> import torch, cem
    >>> rule = cem.Nesterov(step_size=1.0, momentum=0.5)
    >>> rule.look(torch.tensor([1.0]), torch.tensor([2.0]))
    tensor([2.])

    Source: Nesterov, Lectures on Convex Optimization, 2018, section 2.2.1, constant step scheme III.
    """

    def look(self, h: Tensor, state: Tensor) -> Tensor:
        return h + self.kept(state)


class Proximal(Stepping):
    """Proximal gradient: h+ = prox(h - step_size * P dE/dh, step_size).

    It descends E + r, where ``prox`` is the proximal map of r: ISTA for a least-squares energy and l1. For a convex E
    with curvature at most L and P = I, E + r falls for step sizes up to 1/L (and below 2/L the states converge);
    its fixed points are the minimisers of E + r. P scales the gradient and not the prox: with P = p I the fixed
    points are those of E + r/p.

    Args:
        step_size: eta, or a sequence of them, one a step.
        prox: a map of :mod:`cem.prox`, or any callable or module (x, step_size) -> x that acts on each token alone.
        learn: learn the step size, registered as ``step_size``.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: a prox that cannot be called.

    >>> import torch, cem
    >>> rule = cem.Proximal(step_size=0.5, prox=cem.prox.l1(1.0))
    >>> rule.update(torch.tensor([2.0, 0.2]), torch.tensor([1.0, -1.0]), None)[0]
    tensor([1.0000, 0.2000])

    Source: Beck and Teboulle, A Fast Iterative Shrinkage-Thresholding Algorithm, 2009, section 2.
    """

    def __init__(
        self,
        step_size: float | Iterable[float],
        prox: Callable[[Tensor, float | Tensor], Tensor],
        *,
        learn: bool = False,
    ) -> None:
        super().__init__(step_size, learn=learn)
        if not callable(prox):
            raise TypeError(
                f"`Proximal` takes a callable (x, step_size) -> x: got {prox!r}; type `cem.prox.l1(0.1)`"
            )
        self.prox = prox

    def update(
        self,
        h: Tensor,
        gradient: Tensor,
        state: None,
        scale: float = 1.0,
        objective: Objective | None = None,
    ) -> tuple[Tensor, None]:
        size = self.size(objective)
        if isinstance(size, Tensor):
            size = size.to(h.dtype)
        return self.prox(self.along(h, gradient, objective, scale), size), state

    def promise(self, smoothness: float, *, steps: int, scalar: bool, normed: bool) -> Promise:
        """E + r falls for every step size up to 2 / smoothness, with r convex."""
        del steps
        if not isinstance(self.prox, prox.l1 | prox.nonnegative_l1 | prox.box):
            return Promise(None, False, "The prox is not known to be that of a convex function.")
        if not scalar or normed:
            why = "behind a norm" if normed else "unless P is a multiple of the identity"
            return Promise(None, False, f"Nothing is promised of a proximal step {why}.")
        falls = "does not raise E + r, with r the function of the prox over the scale of P,"
        return self.up_to(smoothness, "", falls)

    def extra_repr(self) -> str:
        own = "" if isinstance(self.prox, nn.Module) else f", prox={self.prox}"
        return super().extra_repr() + own
