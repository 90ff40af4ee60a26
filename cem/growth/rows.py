"""Where the old rows of a grown size stand among the new ones, and how new rows are filled.

Legend: n old rows, m new rows, k copies of a row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from sympy import Expr, Indexed
from torch import Tensor

from ..energy import Energy
from ..language.positions import Rope
from ..language.symbols import Dim, Parameter, size_of, split


@dataclass(frozen=True)
class Rows:
    """One size, n before and n + m after; old row i stands at ``places[i]``."""

    size: Dim
    places: tuple[int, ...]
    total: int

    @cached_property
    def fresh(self) -> tuple[int, ...]:
        """The places of the new rows."""
        taken = set(self.places)
        return tuple(row for row in range(self.total) if row not in taken)

    @cached_property
    def origins(self) -> tuple[int, ...]:
        """Which old row each row copies, where rows are duplicated: all in turn."""
        found = dict(zip(self.places, range(len(self.places)), strict=True))
        found |= {row: at % len(self.places) for at, row in enumerate(self.fresh)}
        return tuple(found[row] for row in range(self.total))

    @cached_property
    def copies(self) -> tuple[int, ...]:
        """How often each row's origin occurs, itself included."""
        counts = Counter(self.origins)
        return tuple(counts[origin] for origin in self.origins)


def rows_of(energy: Energy, size: Dim, old: int, new: int) -> Rows:
    """The old rows first; where ``rope`` turns the size, pairs stay pairs and keep their frequencies if they can.

    The frequencies of a rotation over R coordinates are base^(-2n/R), so pair n of R is pair k n of k R: an axis
    that is turned grows exactly to multiples.

    >>> import cem
    >>> rank = cem.dims("rank")
    >>> rows_of(cem.energies.interaction, rank, 2, 3).places
    (0, 1)
    >>> rows_of(cem.energies.rotary_interaction, rank, 4, 8).places
    (0, 2, 4, 6)
    """
    ropes = set() if energy.expression is None else energy.expression.atoms(Rope)
    found = {_turned(rope, old, new) for rope in ropes if size_of(rope.index) == size}
    places = found.pop() if len(found) == 1 else tuple(range(old))
    return Rows(size, places, new)


def _turned(rope: Rope, old: int, new: int) -> tuple[int, ...]:
    before, after = rope.rates(old)[1], rope.rates(new)[1]
    stride = after // before if after % before == 0 else 1

    def place(row: int) -> int:
        if row >= before:
            return after + row - before
        if rope.interleaved:
            return 2 * stride * (row // 2) + row % 2
        half, pair = divmod(row, before // 2)
        return half * (after // 2) + stride * pair

    places = tuple(map(place, range(old)))
    return places if max(places) < new else tuple(range(old))


def factors(energy: Energy, parameter: Parameter, size: Dim) -> tuple[Expr, ...]:
    """The sizes of a parameter with axes over products of sizes taken apart, slowest first.

    Raises:
        ValueError: an axis is a product with the size, and nothing in the energy says in which order.
    """
    found: list[Expr] = []
    for axis, length in enumerate(parameter.shape):
        orders = set()
        if not isinstance(length, Dim) and length.has(size):
            entries = energy.expression.atoms(Indexed) if energy.expression is not None else ()
            slots = {e.indices[axis] for e in entries if e.base == parameter}
            orders = {tuple(map(size_of, split(slot))) for slot in slots}
            orders = {order for order in orders if len(order) > 1}
            if len(orders) != 1:
                raise ValueError(
                    f"energy `{energy.name}`: `{size}` is a factor of the axis {length} of `{parameter.name}`, and the"
                    f" energy does not say in which order: got {len(orders)} of them; write the axes one by one"
                )
        found += orders.pop() if orders else (length,)
    return tuple(found)


@dataclass(frozen=True)
class Axes:
    """The axes of one parameter along which rows are added.

    Attributes:
        rows: of the size that grows.
        before, after: the shape with products taken apart, before and after.
        grown: which of these axes grow.
        shape: the shape of the parameter after.
    """

    rows: Rows
    before: tuple[int, ...]
    after: tuple[int, ...]
    grown: tuple[int, ...]
    shape: tuple[int, ...]

    def _grid(self, lengths: tuple[int, ...], index: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Indices that select ``index`` along the grown axes and everything along the others."""
        found = []
        for axis, length in enumerate(lengths):
            chosen = torch.tensor(index) if axis in self.grown else torch.arange(length)
            found.append(chosen.view([-1 if axis == k else 1 for k in range(len(lengths))]))
        return tuple(found)

    def spread(self, old: Tensor, fill: Tensor) -> Tensor:
        """``fill`` with the old rows written in; a tensor of the new shape."""
        found = fill.reshape(self.after).clone()
        found[self._grid(self.before, self.rows.places)] = old.reshape(self.before)
        return found.reshape(self.shape)

    def duplicated(self, old: Tensor) -> Tensor:
        """Every row is a copy of its origin."""
        return old.reshape(self.before)[self._grid(self.after, self.rows.origins)].reshape(
            self.shape
        )

    @cached_property
    def copies(self) -> Tensor:
        """How often each number occurs among the duplicates, in the new shape."""
        found = torch.ones(self.after, dtype=torch.float64)
        for axis in self.grown:
            counts = torch.tensor(self.rows.copies, dtype=torch.float64)
            found *= counts.view([-1 if axis == k else 1 for k in range(len(self.after))])
        return found.reshape(self.shape)

    @cached_property
    def fresh(self) -> Tensor:
        """True at the new numbers, in the new shape."""
        old, new = torch.zeros(self.before).bool(), torch.ones(self.after).bool()
        return self.spread(old, new)

    def matched(self, old: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """The old rows and new ones with their Gram matrix, P'^T P' = (m/n) P^T P, or None if m is too small.

        P' = sqrt(m/n) O S V^T with P = U S V^T and orthonormal columns O (m, rank P).
        """
        if len(self.grown) != 1:
            return None
        axis, m = self.grown[0], len(self.rows.fresh)
        last = len(self.before) - 1
        P = old.reshape(self.before).movedim(axis, -1)  # (..., n)
        P = P.mT if axis < last else P.unsqueeze(-1)  # (..., n, columns)
        _, S, Vh = torch.linalg.svd(P, full_matrices=False)
        rank = int(torch.linalg.matrix_rank(P).max())
        if rank > m:
            return None
        draw = torch.randn(*P.shape[:-2], m, rank, generator=generator, dtype=torch.float64)
        new = torch.linalg.qr(draw)[0] @ (S[..., :rank, None] * Vh[..., :rank, :])
        new = new * (m / len(self.rows.places)) ** 0.5
        new = (new.mT if axis < last else new.squeeze(-1)).movedim(-1, axis)
        found = torch.zeros(self.after, dtype=torch.float64)
        shape = tuple(m if k == axis else length for k, length in enumerate(self.before))
        found[self._grid(shape, self.rows.fresh)] = new
        return self.spread(old, found)
