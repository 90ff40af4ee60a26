"""The light step that every token takes.

Legend: D dim, M bottleneck.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Adapter(nn.Module):
    """A small MLP as a branch, A(u), zero at the start.

        untied   A(u) = W_up relu(W_down u)               W_up = 0 at the start; no potential
        tied     A(u) = -W_down^T (c * relu(W_down u))    c = 0 at the start; A = -dE/du with
                 E(u) = sum_m c_m relu(W_down,m . u)^2 / 2

    The tied adapter is the plain energy of the gallery with a gain on every unit, and half of the parameters. Either
    learns from the first step: at W_up = 0 or c = 0 these have a derivative, and W_down has one from the second on.

    Args:
        dim: the width D.
        bottleneck: M; 64 is usual.
        tie: the tied form.

    >>> adapter = Adapter(16, 4, tie=True)
    >>> adapter(torch.randn(5, 16)).abs().max().item(), adapter.energy(torch.randn(5, 16)).shape
    (0.0, torch.Size([5]))

    Source: Houlsby et al., arXiv:1902.00751; Lei et al., Conditional Adapters, arXiv:2304.04947.
    """

    def __init__(self, dim: int, bottleneck: int, tie: bool = False) -> None:
        super().__init__()
        self.dim, self.bottleneck, self.tie = dim, bottleneck, tie
        self.down = nn.Parameter(torch.empty(bottleneck, dim))
        shape = (bottleneck,) if tie else (dim, bottleneck)
        self.register_parameter("gain" if tie else "up", nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down, std=self.dim**-0.5)
        nn.init.zeros_(self.gain if self.tie else self.up)

    def forward(self, u: Tensor) -> Tensor:
        """A(u), shape (..., D)."""
        hidden = torch.relu(F.linear(u, self.down))
        if self.tie:
            return -(hidden * self.gain) @ self.down
        return F.linear(hidden, self.up)

    def energy(self, u: Tensor) -> Tensor:
        """E(u), shape (...), with A = -dE/du; ``ValueError`` for an untied adapter, which has none."""
        if not self.tie:
            raise ValueError(
                "an untied adapter has no energy: W_up and W_down are independent, so the Jacobian of its step is not"
                f" symmetric; type `Adapter({self.dim}, {self.bottleneck}, tie=True)`"
            )
        return (self.gain * torch.relu(F.linear(u, self.down)).square()).sum(-1) / 2

    def extra_repr(self) -> str:
        return f"dim={self.dim}, bottleneck={self.bottleneck}{', tie=True' if self.tie else ''}"
