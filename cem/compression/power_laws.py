"""How the error of attention weights falls with the rank of a head, and what the length of the context does to it.

For one form W and its best approximations of lower rank, over contexts of several lengths, two errors that behave
differently:

    total variation   1/2 sum_s |p_s - p'_s|     what moves the average of values; it does not fall with the length
    largest weight    max_s |p_s - p'_s|         every weight is O(1 / length) where scores are bounded, so this falls

Diminishing returns in the rank are those of the spectrum. "Long contexts need no rank" is true of single weights only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .forms import Forms
from .truncation import cut


@dataclass(frozen=True)
class Saturation:
    """Errors by length and rank, means over queries.

    Attributes:
        tv: length -> rank -> total variation.
        largest: length -> rank -> the largest change of one weight.
    """

    tv: dict[int, dict[int, float]]
    largest: dict[int, dict[int, float]]

    def plot(self, *, axes=None):
        """Draw both errors against the rank, one curve a length. Returns the pair of axes."""
        from matplotlib import pyplot as plt

        from ..rank_plots import saturation

        if axes is None:
            _, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), layout="constrained")
        saturation(self.tv, "total variation of the weights", ax=axes[0])
        saturation(self.largest, "largest change of a weight", log=True, ax=axes[1])
        return axes


def power_law(
    dim: int, decay: float, spread: float = 1.0, *, rank: int | None = None, seed: int = 0
) -> Forms:
    """One random form whose singular values fall as i^-decay, with scores of a given standard deviation.

    The deviation is that of standard normal inputs.
    """
    chance = torch.Generator().manual_seed(seed)
    rank = rank or dim
    left, right = (
        torch.linalg.qr(torch.randn(dim, rank, generator=chance, dtype=torch.float64))[0].T
        for _ in range(2)
    )
    values = torch.arange(1, rank + 1, dtype=torch.float64) ** -decay
    values = spread * values / values.norm()
    return Forms((values[:, None] * left)[None, None], right[None], 1.0)


def saturation(
    forms: Forms,
    lengths: Iterable[int],
    ranks: Iterable[int],
    *,
    queries: int = 64,
    seed: int = 0,
) -> Saturation:
    """The errors of the first head of some forms without a rotation, on standard normal inputs.

    Args:
        forms: as of :func:`power_law`, or of :func:`cem.compression.forms.read`.
        lengths: of contexts; the shorter are the beginnings of the longest.
        ranks: below that of the forms.
        queries: over which the errors are averaged.

    Raises:
        ValueError: forms with a rotation.

    >>> found = saturation(power_law(16, 1.0), (16, 256), (1, 8))
    >>> found.tv[16][8] < found.tv[16][1], found.largest[256][1] < 0.5 * found.largest[16][1]
    (True, True)
    >>> 0.8 < found.tv[256][8] / found.tv[16][8] < 1.25
    True
    """
    if forms.pairs is not None:
        raise ValueError(
            "`saturation` draws inputs without positions: got forms that turn with them; give forms without a rotation"
        )
    chance = torch.Generator().manual_seed(seed)
    lengths, ranks = sorted(lengths), sorted(ranks)
    width = forms.q.shape[-1]
    x = torch.randn(lengths[-1], width, generator=chance, dtype=torch.float64)
    asked = torch.randn(queries, width, generator=chance, dtype=torch.float64)

    def scores(one: Forms) -> torch.Tensor:
        return one.scales[0] * (asked @ one.q[0, 0].T) @ (x @ one.k[0].T).T

    whole = scores(forms)
    tv: dict[int, dict[int, float]] = {length: {} for length in lengths}
    largest: dict[int, dict[int, float]] = {length: {} for length in lengths}
    for rank in ranks:
        after = scores(cut(forms, (rank,) * len(forms.k)).padded(forms))
        for length in lengths:
            moved = (whole[:, :length].softmax(1) - after[:, :length].softmax(1)).abs()
            tv[length][rank] = float(0.5 * moved.sum(1).mean())
            largest[length][rank] = float(moved.amax(1).mean())
    return Saturation(tv, largest)
