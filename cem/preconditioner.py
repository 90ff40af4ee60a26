"""Preconditioners: positive semi-definite linear maps P of the gradient, the identity at the start.

Legend: D dim.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ONE = math.log(math.e - 1.0)
"""softplus of this is 1."""


class AbstractPreconditioner(nn.Module, abc.ABC):
    """The interface of a preconditioner: a positive semi-definite matrix P (D, D), never formed.

    Attributes:
        definite: positive semi-definite by construction, whatever was learned; what descent rests on.
        scalar: a multiple of the identity; what descent behind a norm rests on.
    """

    definite = False
    scalar = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abc.abstractmethod
    def forward(self, gradient: Tensor) -> Tensor:
        """P times the gradient, shape (..., D)."""

    def dense(self) -> Tensor:
        """The matrix P, shape (D, D), for tests and pictures."""
        like = next(self.parameters(), torch.empty(()))
        return self(torch.eye(self.dim, dtype=like.dtype, device=like.device)).T

    def largest_eigenvalue(self) -> float:
        """The largest eigenvalue of P, rounded up; inf where P is not finite."""
        P = self.dense().detach().double()
        if not P.isfinite().all():
            return math.inf
        return float(torch.linalg.eigvalsh(P)[-1]) * (1 + 1e-9)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class ScaledIdentity(AbstractPreconditioner):
    """P = softplus(d) I with one learned number d; softplus(d) = 1 at the start.

    >>> import cem
    >>> cem.ScaledIdentity(2).dense().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    definite = True
    scalar = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.d = nn.Parameter(torch.tensor(_ONE))

    def forward(self, gradient: Tensor) -> Tensor:
        return gradient * F.softplus(self.d).to(gradient.dtype)


class Diagonal(AbstractPreconditioner):
    """P = diag(softplus(d)) with a learned vector d (D,); the identity at the start.

    >>> import cem
    >>> cem.Diagonal(2).dense().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    definite = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.d = nn.Parameter(torch.full((dim,), _ONE))

    def forward(self, gradient: Tensor) -> Tensor:
        return gradient * F.softplus(self.d).to(gradient.dtype)
