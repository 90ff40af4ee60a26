"""Allocation of parameters: which head of which layer gets how much rank from one budget.

A *head* is one bilinear form h^T W x of an interaction energy, W = Q^T K of rank r, with the ``queries`` that share
its K. What rank r keeps of it is a gain g(r), and a plan is the assignment of ranks with the largest sum of gains
whose cost stays within the budget:

    maximise  sum_l w_l sum_a g_la(r_la)    subject to    sum_la c_l r_la <= budget

* From losses: g_la(r) is the part of what the model loses without head a that rank r gives back, in nats, measured
  with cuts as they will be made (:func:`cem.compression.losses`).
* From spectra: g_la(r) = s_1^2 + ... + s_r^2, the singular values of the data-weighted form
  C^(1/2) W Cx^(1/2) / sqrt(rank) (see :func:`cem.compression.spectra`), so what is missing is the variance of the
  scores that is lost. Weights w_l may say what a unit of it is worth in layer l.
* From importances: ranks in proportion to them, by the method of highest averages (the i-th rank of a head counts
  importance / i), each head at most its full rank.
* From nothing: the same with :func:`schedule`, more heads and wider ones in early layers.

Where one step costs the same everywhere and gains fall from step to step, taking the largest gain next is exact and
plans of larger budgets contain those of smaller ones. Otherwise a dynamic programme over the cost solves the problem
exactly, as long as the budget counts at most ``GRID`` units of cost; above it costs are rounded up to the grid and
``Plan.exact`` is False.

The paper on the allocation of heads and ranks (arXiv:2510.03784) states its budget as sum_m H_m d_m; ours is over
layers and heads.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .allotment import COSTS, Heads, LayerPlan, Plan

GRID = 1 << 16


def schedule(
    layers: Sequence[Heads], *, heads: float = 0.5, rank: float = 0.5
) -> tuple[tuple[int, ...], ...]:
    """Ranks that shrink from the first layer to the last: H_l = H (1 - heads x), d_l = R (1 - rank x), x = l/(L-1).

    At least one head is kept, of a multiple of 8 and at least 8 (or all, where there are fewer). It is a default where
    nothing has been measured: it says that early layers need more, and :func:`allocate` scales it to the budget.

    >>> schedule([Heads("", dim=8, heads=4, rank=32)] * 3)
    ((32, 32, 32, 32), (24, 24, 24, 0), (16, 16, 0, 0))
    """
    found = []
    for index, layer in enumerate(layers):
        x = index / max(len(layers) - 1, 1)
        count = max(1, round(layer.heads * (1 - heads * x)))
        width = max(min(8, layer.rank), 8 * round(layer.rank * (1 - rank * x) / 8))
        width = layer.rank if x == 0 else min(width, layer.rank)
        found.append((width,) * count + (0,) * (layer.heads - count))
    return tuple(found)


def allocate(
    budget: float,
    layers: Sequence[Heads],
    *,
    cost: str = "parameters",
    context: int = 0,
    weights: Sequence[float] | None = None,
    importances: Sequence[float | Sequence[float]] | None = None,
    groups: str = "head",
    multiple: int = 1,
    ranks: tuple[int, int | None] = (0, None),
    heads: tuple[int, int | None] = (0, None),
) -> Plan:
    """The plan with the largest gain whose cost is within the budget; see the docstring of this module.

    Args:
        budget: a share of what the layers cost in full, a float in (0, 1]; or an int, in units of the cost.
        layers: the heads of each layer, with their ``gains`` or without.
        cost: ``"rank"``, ``"parameters"``, ``"flops"`` (forward, a token) or ``"cache"``.
        context: how many tokens a token sees, for ``"flops"``: 2 parameters + 2 context a product of the attention.
        weights: of the layers' gains; all 1 by default.
        importances: one a layer, or one a head of each layer, instead of gains.
        groups: ``"head"``, every head has a rank of its own, or ``"layer"``, the heads that a layer keeps share one.
        multiple: ranks are multiples of it, and of the steps of all layers.
        ranks: the least and the most rank of a head that is kept.
        heads: the least and the most number of heads that a layer keeps.

    Raises:
        ValueError: a value out of its range, gains of some layers only, or a budget that the least ranks exceed.

    >>> early = Heads("early", dim=8, heads=1, rank=3, gains=((9.0, 4.0, 1.0),))
    >>> late = Heads("late", dim=8, heads=1, rank=3, gains=((5.0, 2.0, 0.1),))
    >>> plan = allocate(4, [early, late], cost="rank")
    >>> plan.ranks, round(plan.gain, 3), plan.exact
    (((2,), (2,)), 0.948, True)
    >>> allocate(4, [early, late], cost="rank", weights=[1.0, 100.0]).ranks
    ((1,), (3,))
    """
    layers = tuple(layers)
    source = _check(layers, cost, weights, importances, groups, multiple, ranks, heads)
    multiple = math.lcm(multiple, *(layer.step for layer in layers))
    units = [layer.unit(cost, context) for layer in layers]
    full = sum(unit * layer.rank * layer.heads for unit, layer in zip(units, layers, strict=True))
    limit = _limit(budget, full)
    if source == "gains":
        scale = weights or [1.0] * len(layers)
        gains = [
            np.asarray(layer.gains, float) * weight
            for layer, weight in zip(layers, scale, strict=True)
        ]
    else:
        given = importances if importances is not None else schedule(layers)
        gains = [
            _proportional(layer, unit, given[index])
            for index, (layer, unit) in enumerate(zip(layers, units, strict=True))
        ]
    curves = [  # (heads, steps + 1): what 0, 1, 2, ... multiples keep
        _by_multiple(np.cumsum(np.pad(gain, ((0, 0), (1, 0))), 1), multiple // layer.step)
        for gain, layer in zip(gains, layers, strict=True)
    ]
    allowed = [_allowed(layer, multiple, ranks) for layer in layers]
    counts = [_count_range(layer, heads) for layer in layers]
    if _greedy_is_exact(curves, units, allowed, counts, layers, groups):
        found, exact = _greedy(curves, units, allowed, multiple, limit), True
    else:
        choices = _layer_choices if groups == "layer" else _head_choices
        found, exact = _solve(curves, units, allowed, counts, multiple, limit, full, choices)
    kept = sum(
        float(curve[range(len(row)), [r // multiple for r in row]].sum())
        for curve, row in zip(curves, found, strict=True)
    )
    total = sum(float(gain.sum()) for gain in gains)
    rows = tuple(
        LayerPlan(
            name=layer.name,
            dim=layer.dim,
            full_rank=layer.rank,
            ranks=tuple(row),
            queries=layer.queries,
            uses=layer.uses,
            together=groups == "layer",
            value_rank=layer.value_rank,
        )
        for layer, row in zip(layers, found, strict=True)
    )
    spent = sum(unit * sum(row) for unit, row in zip(units, found, strict=True))
    gain = None if source != "gains" else kept / total if total else 1.0
    return Plan(rows, cost, limit, spent, full, context, gain, source, exact)


def _check(layers, cost, weights, importances, groups, multiple, ranks, heads) -> str:
    def refuse(what: str, got, advice: str):
        raise ValueError(f"`allocate` needs {what}: got {got!r}; {advice}")

    if not layers:
        refuse("at least one layer", layers, "type `[Heads(...)]`")
    if cost not in COSTS:
        refuse(f"a cost among {', '.join(COSTS)}", cost, 'type `cost="parameters"`')
    if groups not in ("head", "layer"):
        refuse('`groups` "head" or "layer"', groups, 'type `groups="head"`')
    if type(multiple) is not int or multiple < 1:
        refuse("`multiple` from 1", multiple, "type `multiple=8`")
    for name, (least, most) in (("ranks", ranks), ("heads", heads)):
        if least < 0 or (most is not None and most < max(least, 1)):
            refuse(f"`{name}=(least, most)`", (least, most), f"type `{name}=(0, None)`")
    known = [layer.gains is not None for layer in layers]
    if importances is not None:
        if len(importances) != len(layers):
            refuse(f"one importance a layer, {len(layers)}", importances, "give as many")
        return "importances"
    if any(known) and not all(known):
        refuse("the gains of every layer or of none", known, "measure all of them")
    if weights is not None and (
        len(weights) != len(layers) or not all(0 <= w < math.inf for w in weights)
    ):
        refuse(f"{len(layers)} weights from 0", weights, "give one a layer")
    return "gains" if all(known) else "schedule"


def _limit(budget: float, full: int) -> int:
    whole = isinstance(budget, int | np.integer) and not isinstance(budget, bool)
    if whole and budget >= 0:
        return min(int(budget), full)
    if isinstance(budget, float) and 0 < budget <= 1:
        return int(budget * full + 1e-9)
    raise ValueError(
        f"a budget is a share in (0, 1] or a whole number of units: got {budget!r}; type `0.25`"
    )


def _proportional(layer: Heads, unit: int, importance) -> np.ndarray:
    """Gains whose highest come in proportion to the importances: importance / i for the i-th rank."""
    each = np.broadcast_to(np.asarray(importance, float), (layer.heads,))
    if not (each >= 0).all() or not np.isfinite(each).all():
        raise ValueError(f"importances are numbers from 0: got {importance!r}; type 1.0")
    harmonic = 1.0 / np.arange(1, layer.rank + 1)
    steps = harmonic.reshape(layer.rank // layer.step, layer.step).sum(1)
    return unit * each[:, None] * steps


def _by_multiple(curve: np.ndarray, every: int) -> np.ndarray:
    return curve[:, ::every]


def _allowed(layer: Heads, multiple: int, ranks: tuple[int, int | None]) -> list[int]:
    """The ranks that a head of a layer may have, 0 first."""
    least, most = max(ranks[0], 1), layer.rank if ranks[1] is None else min(ranks[1], layer.rank)
    return [0, *(r for r in range(multiple, most + 1, multiple) if r >= least)]


def _count_range(layer: Heads, heads: tuple[int, int | None]) -> tuple[int, int]:
    most = layer.heads if heads[1] is None else min(heads[1], layer.heads)
    return min(heads[0], layer.heads), most


def _greedy_is_exact(curves, units, allowed, counts, layers, groups) -> bool:
    regular = all(
        la[1:2] == [la[1] - la[0]] and len(set(np.diff(la))) == 1 for la in allowed if la[1:]
    )
    free = all(c == (0, layer.heads) for c, layer in zip(counts, layers, strict=True))
    steps = {unit * la[1] for unit, la in zip(units, allowed, strict=True) if la[1:]}
    falling = all((np.diff(curve, 2) <= 1e-12 * curve[:, -1:]).all() for curve in curves)
    return groups == "head" and regular and free and falling and len(steps) == 1


def _greedy(curves, units, allowed, multiple, limit) -> list[list[int]]:
    """Always the step with the largest gain; of equal ones that of the earlier layer and head."""
    found = [[0] * len(curve) for curve in curves]
    heap = []

    def offer(layer: int, head: int) -> None:
        place = found[layer][head] // multiple
        if place + 1 < len(allowed[layer]):
            gain = curves[layer][head, place + 1] - curves[layer][head, place]
            heapq.heappush(heap, (-gain, layer, head))

    for layer, curve in enumerate(curves):
        for head in range(len(curve)):
            offer(layer, head)
    spent = 0
    while heap:
        _, layer, head = heapq.heappop(heap)
        spent += units[layer] * multiple
        if spent > limit:
            break
        found[layer][head] += multiple
        offer(layer, head)
    return found


def _head_choices(curve, allowed, count, multiple):
    """One item a head: (rank, cost in ranks, gain, heads kept) of what it may be."""
    return [
        [(rank, rank, row[rank // multiple], min(rank, 1)) for rank in allowed] for row in curve
    ]


def _layer_choices(curve, allowed, count, multiple):
    """One item: the n best heads at one rank."""
    heads, found = len(curve), []
    for rank in allowed:
        order = np.argsort(-curve[:, rank // multiple], kind="stable")
        for n in range(1, heads + 1) if rank else [0]:
            row = [0] * heads
            for head in order[:n]:
                row[head] = rank
            if count[0] <= n <= count[1]:
                gain = curve[order[:n], rank // multiple].sum()
                found.append((tuple(row), n * rank, gain, 0))
    return [found]


def _solve(curves, units, allowed, counts, multiple, limit, full, choices):
    """The dynamic programme: the best gain of the items so far at every cost and number of heads kept in the layer."""
    grid = math.gcd(*(unit * multiple for unit in units))
    exact = full // grid <= GRID
    grid = grid if exact else -(-full // GRID)
    size = limit // grid + 1
    table, trail = np.zeros(size), []
    for curve, unit, row, count in zip(curves, units, allowed, counts, strict=True):
        items = choices(curve, row, count, multiple)
        low, high = count if choices is _head_choices else (0, 0)
        counted = (low, high) != (0, len(curve)) and high > 0
        state = np.full((high + 1 if counted else 1, size), -np.inf)
        state[0] = table
        for item in items:
            state, chosen = _step(state, item, unit, grid, counted)
            trail.append((item, chosen, unit))
        first = low if counted else 0
        ends = state[first:].argmax(0)
        table = np.take_along_axis(state[first:], ends[None], 0)[0]
        trail.append((first, ends, None))
    if not np.isfinite(table[-1]):
        raise ValueError(
            f"the least ranks of the least heads cost more than the budget: got {limit} of {full}; give more, or"
            " lower `ranks` or `heads`"
        )
    found, place, kept = [], size - 1, 0
    for what, chosen, unit in reversed(trail):
        if unit is None:
            kept = what + int(chosen[place])
            found.insert(0, [])
            continue
        picked, ranks, _, more = what[chosen[min(kept, len(chosen) - 1), place]]
        place -= -(-ranks * unit // grid)
        kept -= more if len(chosen) > 1 else 0
        found[0] = [picked, *found[0]] if isinstance(picked, int) else list(picked)
    return found, exact


def _step(state, item, unit, grid, counted):
    """One more item: the best of its choices for every number of heads and every cost."""
    best = np.full_like(state, -np.inf)
    chosen = np.zeros(state.shape, np.int32)
    size = state.shape[1]
    for index, (_, ranks, gain, more) in enumerate(item):
        cost, more = -(-ranks * unit // grid), more if counted else 0
        if cost >= size or more >= len(state):
            continue
        offered = state[: len(state) - more, : size - cost] + gain
        target, mark = best[more:, cost:], chosen[more:, cost:]
        better = offered > target
        target[better], mark[better] = offered[better], index
    return best, chosen


def uniform(budget: float, layers: Sequence[Heads], **options) -> Plan:
    """The plan that gives every head of every layer the same share of its rank; what others are compared with.

    >>> uniform(0.5, [Heads("a", dim=8, heads=2, rank=4), Heads("b", dim=8, heads=2, rank=4)]).ranks
    ((2, 2), (2, 2))
    """
    equal = [replace(layer, gains=None) for layer in layers]
    return allocate(budget, equal, importances=[float(layer.rank) for layer in layers], **options)


__all__ = ["Heads", "LayerPlan", "Plan", "allocate", "schedule", "uniform"]
