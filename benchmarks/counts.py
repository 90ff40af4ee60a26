"""The multiplications of interaction layers, counted."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import Settings


@dataclass(frozen=True)
class Count:
    """Multiplications of one forward pass.

    Attributes:
        projections: of tokens with parameters.
        attention: of queries with keys and of weights with values, over the pairs that are visible.
    """

    projections: int
    attention: int

    @property
    def forward(self) -> float:
        return self.projections + self.attention

    @property
    def training(self) -> float:
        """Forward and backward.

        The backward pass of a projection is two products of its size. That of attention is five for
        the two of the forward pass: the scores once more, and the gradients of the weights, the
        queries, the keys and the values.
        """
        return 3 * self.projections + 3.5 * self.attention


def interaction(
    settings: Settings,
    seq: int,
    *,
    rank: int = 0,
    direct: int = 0,
    steps: int = 1,
    span: bool = False,
) -> Count:
    """Count a causal interaction layer.

    Every step projects to the queries and back; the keys, which are the values, are made once.
    Heads also compare ``direct`` coordinates of the state as they are. In the ``span`` of the
    queries the steps project once, and every step but the first takes a product with the Gram
    matrix of the queries, which is made once.
    """
    rank = rank or settings.rank
    width, tokens = settings.heads * rank, settings.batch * seq
    projection = tokens * settings.dim * width
    projections = (1 + 2 * steps) * projection
    if span:
        gram = width * width * settings.dim
        projections = 3 * projection + (steps - 1) * tokens * width * width + gram
    pairs = settings.batch * settings.heads * seq * (seq + 1) // 2
    return Count(projections, steps * 2 * pairs * (rank + direct))
