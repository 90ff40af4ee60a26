"""Proximal maps for :class:`cem.Proximal`: prox(x) = argmin_z |z - x|^2 / 2 + step_size r(z), for a simple r.

Each is called as ``prox(x, step_size)`` with x of shape (..., dim) and works coordinate by coordinate. Any callable or
module of that form is one.

Source: Parikh and Boyd, Proximal Algorithms, 2014, sections 6.5.2 (l1) and 6.2.4 (box).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class l1:
    """Soft thresholding, for r(z) = weight |z|_1: x moves to 0 by step_size * weight and stops there.

    >>> import torch, cem
    >>> cem.prox.l1(2.0)(torch.tensor([-3.0, 0.5, 1.5]), 0.5)
    tensor([-2.0000,  0.0000,  0.5000])
    """

    weight: float

    def __post_init__(self) -> None:
        _check_weight(self)

    def __call__(self, x: Tensor, step_size: float | Tensor) -> Tensor:
        reach = step_size * self.weight
        return x - torch.clamp(x, -reach, reach)


@dataclass(frozen=True)
class nonnegative_l1:
    """relu(x - step_size * weight), for r(z) = weight sum z where z >= 0, infinite elsewhere.

    >>> import torch, cem
    >>> cem.prox.nonnegative_l1(2.0)(torch.tensor([-3.0, 0.5, 1.5]), 0.5)
    tensor([0.0000, 0.0000, 0.5000])
    """

    weight: float

    def __post_init__(self) -> None:
        _check_weight(self)

    def __call__(self, x: Tensor, step_size: float | Tensor) -> Tensor:
        return torch.relu(x - step_size * self.weight)


@dataclass(frozen=True)
class box:
    """Clamping, for r(z) = 0 where low <= z <= high, infinite elsewhere: projected descent.

    >>> import torch, cem
    >>> cem.prox.box(-1.0, 1.0)(torch.tensor([-3.0, 0.5, 1.5]), 0.5)
    tensor([-1.0000,  0.5000,  1.0000])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(
                f"`box` needs low <= high: got {self.low} and {self.high}; type `cem.prox.box(-1.0, 1.0)`"
            )

    def __call__(self, x: Tensor, step_size: float | Tensor) -> Tensor:
        return torch.clamp(x, self.low, self.high)


def _check_weight(prox: l1 | nonnegative_l1) -> None:
    if not prox.weight >= 0:
        name = type(prox).__name__
        raise ValueError(
            f"`{name}` needs a weight that is not negative: got {prox.weight}; type `cem.prox.{name}(0.1)`"
        )
