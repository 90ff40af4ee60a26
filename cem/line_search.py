"""Backtracking line search: for every token, the first of a falling sequence of step sizes that lowers its energy."""

from __future__ import annotations

import torch
from torch import Tensor

from .update import AbstractUpdate, Objective


class LineSearch(AbstractUpdate):
    """h+ = h - a P dE/dh with, for every token, the largest a of start, start shrink, start shrink^2, ... for which

        E(h - a P dE/dh) <= E(h) - slope a <dE/dh, P dE/dh>     (Armijo)

    at the context and the gates of the step. A token for which none of ``tries`` sizes does it stays where it is, so
    no energy rises in a step, whatever the energy is. Where there is a norm, E and its slope are those of E(norm(h)).

    It is for analysis and inference: a try costs one pass over the scores, and a backward pass takes the step sizes
    as constants. It leaves the loop when every token is served, which reads data; under ``torch.compile`` it makes
    all tries instead, with the same result.

    Args:
        start: the first step size.
        shrink: the factor between two tries, above 0 and below 1.
        slope: the share of the first-order fall that is asked for, at least 0 and below 1.
        tries: how many step sizes are tried.

    Raises:
        ValueError: a number outside of its range.

    >>> import torch, cem
    >>> @cem.energy(h="dim")
    ... def steep(h):
    ...     return 4.0 * (h * h).sum()
    >>> layer = cem.derive(steep, dim=2, update=cem.LineSearch(start=1.0))
    >>> layer(torch.ones(1, 2)).tolist()  # (1 - 8 a) h: a = 1, 1/2 and 1/4 do not lower it, 1/8 does
    [[0.0, 0.0]]

    Source: Nocedal and Wright, Numerical Optimization, 2006, algorithm 3.1.
    """

    needs = ("energy",)
    searches = True

    def __init__(
        self, start: float = 1.0, shrink: float = 0.5, slope: float = 1e-4, tries: int = 20
    ) -> None:
        super().__init__()
        if not start > 0 or not 0 < shrink < 1 or not 0 <= slope < 1 or tries < 1:
            raise ValueError(
                "`LineSearch` needs start > 0, 0 < shrink < 1, 0 <= slope < 1 and a try: got"
                f" start={start}, shrink={shrink}, slope={slope}, tries={tries}; type"
                " `cem.LineSearch(start=1.0, shrink=0.5, slope=1e-4, tries=20)`"
            )
        self.start, self.shrink, self.slope, self.tries = start, shrink, slope, tries

    def update(
        self,
        h: Tensor,
        gradient: Tensor,
        state: None,
        scale: float = 1.0,
        objective: Objective | None = None,
    ) -> tuple[Tensor, None]:
        direction = -scale * gradient
        with torch.no_grad():
            size = self.sizes(h, direction, objective)
        return h + size.unsqueeze(-1) * direction, state

    def sizes(self, h: Tensor, direction: Tensor, objective: Objective) -> Tensor:
        """The step size of every token, (B, T); 0 where none was found."""
        energy = objective.energy(h)
        fall = -self.slope * objective.slope(h, direction).clamp_max(0.0)
        size, found = torch.full_like(energy, self.start), torch.zeros_like(energy)
        for _ in range(self.tries):
            lower = objective.energy(h + size.unsqueeze(-1) * direction) <= energy - size * fall
            found = torch.where((found == 0) & lower, size, found)
            if not torch.compiler.is_compiling() and bool((found > 0).all()):
                break
            size = size * self.shrink
        return found

    def extra_repr(self) -> str:
        return f"start={self.start:g}, shrink={self.shrink:g}, slope={self.slope:g}, tries={self.tries}"
