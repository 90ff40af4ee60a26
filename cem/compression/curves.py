"""What each step of a head's rank is worth, from its loss at a few ranks.

Between ranks, and from the last one measured to the step before the full rank, the logarithm of the loss is linear in
the rank; at the full rank the loss is 0. Where steps are worth more later than earlier they count their mean: gains are
the falls of the lower convex hull, so that a plan that always takes the largest gain next is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Of the full rank, where a loss is measured beside rank 0; most of it falls early."""
NOTHING = 1e-12
"""Nats below which a loss is rounding."""


def measured(full: int, step: int = 1) -> tuple[int, ...]:
    """The ranks at which losses are measured.

    >>> measured(32, 2), measured(4, 2), measured(1)
    ((0, 4, 8, 12, 16, 24), (0, 2), (0,))
    """
    near = (step * round(share * full / step) for share in SHARES)
    return tuple(sorted({0, *(min(max(rank, step), full - step) for rank in near)}))


def worth(
    ranks: Sequence[int], losses: Sequence[float], full: int, step: int = 1
) -> tuple[float, ...]:
    """What each step up to the full rank is worth, never less than the next; their sum is the loss at rank 0.

    Args:
        ranks: where the losses are known, 0 first, all below the full rank.
        losses: at these ranks.
        full, step: of the rank.

    >>> [round(gain, 6) for gain in worth((0, 1, 3), (8.0, 4.0, 1.0), 5)]
    [4.0, 2.0, 1.0, 0.5, 0.5]
    """
    places = np.arange(0, full, step)
    logs = np.log(np.maximum(losses, NOTHING))
    slope = (logs[-1] - logs[-2]) / (ranks[-1] - ranks[-2]) if len(ranks) > 1 else 0.0
    beyond = min(slope, 0.0) * np.maximum(places - ranks[-1], 0)
    curve = np.append(np.exp(np.interp(places, ranks, logs) + beyond), 0.0)
    pools: list[tuple[float, int]] = []
    for fall in -np.diff(curve):
        total, count = float(fall), 1
        while pools and pools[-1][0] * count <= total * pools[-1][1]:
            more, others = pools.pop()
            total, count = total + more, count + others
        pools.append((total, count))
    return tuple(total / count for total, count in pools for _ in range(count))
