"""The allocation of ranks: the optimum, its invariants, the schedule, and the plan as a file."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cem import allocation
from cem.allocation import Heads, LayerPlan, Plan, allocate, schedule, uniform
from cem.allotment import unit_cost

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def layers_of(seed, *, layers=None, concave=True, equal=True, step=1):
    """Small layers with random gains, so that every assignment can be listed."""
    chance = random.Random(seed)
    found = []
    for index in range(layers or chance.randint(1, 3)):
        heads, steps = chance.randint(1, 2), chance.randint(1, 3)
        gains = [[chance.random() for _ in range(steps)] for _ in range(heads)]
        if concave:
            gains = [sorted(row, reverse=True) for row in gains]
        dim = 8 if equal else chance.choice((4, 6, 9))
        uses = "scores" if equal else chance.choice(("scores", "tied", "all"))
        rows = tuple(map(tuple, gains))
        found.append(Heads(f"{index}", dim, heads, steps * step, uses=uses, step=step, gains=rows))
    return found


def best(limit, layers, *, cost, context, multiple, groups, ranks, heads):
    """The largest gain within a budget, by listing every assignment; None if there is none."""
    rows = []
    for layer in layers:
        low, high = max(ranks[0], 1), min(ranks[1] or layer.rank, layer.rank)
        allowed = [0, *(r for r in range(multiple, high + 1, multiple) if r >= low)]
        most = layer.heads if heads[1] is None else heads[1]
        rows.append(
            [
                row
                for row in itertools.product(allowed, repeat=layer.heads)
                if min(heads[0], layer.heads) <= sum(r > 0 for r in row) <= most
                and (groups == "head" or len({r for r in row if r}) <= 1)
            ]
        )
    found = None
    for row in itertools.product(*rows):
        spent = sum(la.unit(cost, context) * sum(r) for la, r in zip(layers, row, strict=True))
        if spent <= limit:
            gain = sum(
                sum(gains[: r // la.step])
                for la, kept in zip(layers, row, strict=True)
                for gains, r in zip(la.gains, kept, strict=True)
            )
            found = gain if found is None else max(found, gain)
    return found


def gain_of(plan, layers):
    return sum(
        sum(gains[: r // layer.step])
        for layer, row in zip(layers, plan.ranks, strict=True)
        for gains, r in zip(layer.gains, row, strict=True)
    )


@pytest.mark.parametrize("groups", ["head", "layer"])
@pytest.mark.parametrize("cost", ["rank", "parameters", "flops", "cache"])
@pytest.mark.parametrize("concave", [True, False])
def test_the_plan_is_as_good_as_the_best_of_all_assignments(groups, cost, concave):
    """On random instances with ranges, multiples, steps of two and layers of different cost."""
    solved = 0
    for seed in range(25):
        chance = random.Random(1000 + seed)
        step = chance.choice((1, 2))
        layers = layers_of(seed, concave=concave, equal=chance.random() < 0.5, step=step)
        full = sum(la.unit(cost, 5) * la.heads * la.rank for la in layers)
        limit = chance.randint(0, full)
        said = {
            "multiple": step * chance.choice((1, 1, 2)),
            "ranks": chance.choice(((0, None), (2, None), (0, 2), (2, 4))),
            "heads": chance.choice(((0, None), (1, None), (0, 1), (1, 2))),
            "groups": groups,
            "cost": cost,
            "context": 5,
        }
        wanted = best(limit, layers, **said)
        if wanted is None:
            with pytest.raises(ValueError, match="cost more than the budget"):
                allocate(limit, layers, **said)
            continue
        plan = allocate(limit, layers, **said)
        spent = sum(la.unit(cost, 5) * sum(r) for la, r in zip(layers, plan.ranks, strict=True))
        assert plan.cost == spent <= limit and plan.exact
        assert gain_of(plan, layers) == pytest.approx(wanted, abs=1e-12)
        assert plan.gain == pytest.approx(wanted / sum(sum(map(sum, la.gains)) for la in layers))
        solved += 1
    assert solved > 12


def test_greedy_and_programme_agree(monkeypatch):
    """Where both are exact they find equal gains; the programme is what runs where steps differ."""
    drawn = -np.sort(-np.random.default_rng(0).random((2, 4, 16)))
    layers = [Heads("", 8, 4, 16, gains=tuple(map(tuple, gains))) for gains in drawn]
    greedy = allocate(0.4, layers, multiple=4)
    monkeypatch.setattr(allocation, "_greedy_is_exact", lambda *_: False)
    solved = allocate(0.4, layers, multiple=4)
    assert greedy.gain == pytest.approx(solved.gain, abs=1e-12)
    assert greedy.ranks == solved.ranks


def test_a_budget_beyond_the_grid_is_kept_and_said(monkeypatch):
    layers = layers_of(3, layers=3, equal=False)
    monkeypatch.setattr(allocation, "GRID", 7)
    plan = allocate(0.6, layers)
    assert not plan.exact and plan.cost <= plan.budget
    assert "not proved optimal" in str(plan)


@QUICK
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 1), equal=st.booleans())
def test_costs_stay_within_the_budget_and_more_budget_gains_more(seed, share, equal):
    layers = layers_of(seed, equal=equal)
    small, large = allocate(share / 2, layers), allocate(share, layers)
    assert small.cost <= small.budget <= share / 2 * small.full + 1e-6
    assert small.gain <= large.gain + 1e-12
    if equal:  # greedy plans are nested
        pairs = zip(small.ranks, large.ranks, strict=True)
        assert all(a <= b for x, y in pairs for a, b in zip(x, y, strict=True))
    assert allocate(share, layers) == large
    assert allocate(1.0, layers).ranks == tuple((la.rank,) * la.heads for la in layers)


@QUICK
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1), data=st.data())
def test_heads_and_layers_in_another_order_get_the_same_ranks(seed, share, data):
    layers = layers_of(seed, layers=3)
    plan = allocate(share, layers)
    order = data.draw(st.permutations(range(3)))
    turned = [
        Heads(la.name, la.dim, la.heads, la.rank, gains=la.gains[::-1])
        for la in (layers[n] for n in order)
    ]
    assert allocate(share, turned).ranks == tuple(plan.ranks[n][::-1] for n in order)


@QUICK
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1), factor=st.floats(0.1, 10))
def test_only_the_ratio_of_weights_matters(seed, share, factor):
    layers = layers_of(seed, layers=2)
    one = allocate(share, layers, weights=[1.0, 3.0])
    assert allocate(share, layers, weights=[factor, 3 * factor]).ranks == one.ranks


def test_a_heavy_layer_gets_more():
    layers = [Heads(name, 8, 1, 4, gains=((4.0, 3.0, 2.0, 1.0),)) for name in "ab"]
    assert allocate(0.5, layers).ranks == ((2,), (2,))
    assert allocate(0.5, layers, weights=[1.0, 9.0]).ranks == ((0,), (4,))


def test_equal_gains_are_taken_in_order():
    layers = [Heads(name, 8, 2, 2, gains=((1.0, 1.0),) * 2) for name in "ab"]
    assert allocate(3, layers, cost="rank").ranks == ((2, 1), (0, 0))


# -- costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uses", "parameters", "flops", "cache"),
    [
        ("scores", 40, 80 + 14 * 3, 1),
        ("tied", 40, 80 + 28 * 3, 1),
        ("values", 50, 100 + 28 * 3, 2),
        ("outputs", 70, 140 + 28 * 3, 1),
        ("all", 80, 160 + 28 * 3, 2),
    ],
)
def test_what_a_rank_costs(uses, parameters, flops, cache):
    """K and three queries of width 10; 7 tokens in sight, one product of scores and one of values a query."""
    assert unit_cost("parameters", 7, 10, 3, uses) == parameters
    assert unit_cost("flops", 7, 10, 3, uses) == flops
    assert unit_cost("cache", 7, 10, 3, uses) == cache


def test_the_plan_counts_its_cost_in_every_way():
    plan = allocate(0.5, [Heads("a", 10, 2, 4, queries=3)], context=7)
    assert plan.total("parameters") == plan.cost == plan.full / 2
    assert plan.total("flops") == sum(plan.ranks[0]) * unit_cost("flops", 7, 10, 3, "scores")
    assert plan.total("rank", full=True) == 8


# -- schedule and importances ---------------------------------------------------------------------------------


def test_the_schedule_costs_58_percent():
    """mean (1 - x/2)^2 over many layers: 7/12; with the ranks kept, 3/4. The formula of the docstring."""
    layers = [Heads("", 8, 64, 512)] * 101
    rows = schedule(layers)
    assert sum(map(sum, rows)) / (101 * 64 * 512) == pytest.approx(7 / 12, abs=2e-3)
    rows = schedule(layers, rank=0.0)
    assert sum(map(sum, rows)) / (101 * 64 * 512) == pytest.approx(3 / 4, abs=2e-3)
    assert rows[0] == (512,) * 64 and sum(r > 0 for r in rows[-1]) == 32


@pytest.mark.parametrize("cost", ["rank", "parameters", "flops"])
def test_at_its_own_cost_the_schedule_is_the_plan(cost):
    layers = [Heads("", 16, 4, 32), Heads("", 16, 4, 32), Heads("", 24, 4, 32)]
    rows = schedule(layers)
    units = [la.unit(cost, 9) for la in layers]
    limit = sum(unit * sum(row) for unit, row in zip(units, rows, strict=True))
    plan = allocate(limit, layers, cost=cost, context=9)
    assert plan.ranks == rows and plan.cost == limit
    assert (plan.source, plan.gain) == ("schedule", None)


@QUICK
@given(share=st.floats(0.05, 1), multiple=st.sampled_from((1, 4, 8)))
def test_the_schedule_is_scaled_to_the_budget(share, multiple):
    layers = [Heads("", 16, 4, 32)] * 4
    plan = allocate(share, layers, multiple=multiple)
    assert plan.budget - plan.cost < 32 * multiple
    totals = [sum(row) for row in plan.ranks]
    assert totals == sorted(totals, reverse=True)
    assert all(rank % multiple == 0 for row in plan.ranks for rank in row)


def test_ranks_are_in_proportion_to_importances():
    layers = [Heads("", 8, 2, 32), Heads("", 8, 2, 32)]
    plan = allocate(40, layers, cost="rank", importances=[[6.0, 2.0], [1.0, 1.0]])
    assert plan.ranks == ((24, 8), (4, 4)) and plan.source == "importances"
    assert allocate(12, layers, cost="rank", importances=[2.0, 1.0]).ranks == ((4, 4), (2, 2))


def test_uniform_gives_the_same_share_everywhere():
    layers = layers_of(5, layers=3) + [Heads("wide", 8, 3, 32, gains=((1.0,) * 32,) * 3)]
    equal = [Heads(la.name, la.dim, la.heads, 32) for la in layers]
    assert {r for row in uniform(0.25, equal, multiple=2).ranks for r in row} == {8}


# -- the plan --------------------------------------------------------------------------------------------------


@QUICK
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1))
def test_a_plan_is_read_as_it_was_written(seed, share, tmp_path_factory):
    plan = allocate(share, layers_of(seed, equal=False), cost="flops", context=3)
    assert Plan.from_yaml(plan.to_yaml()) == plan == Plan.from_json(plan.to_json())
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(plan.to_yaml())
    assert Plan.read(path) == plan


def test_the_table_says_what_each_layer_keeps():
    gains = ((9.0, 8.0, 7.0, 6.0), (5.0, 0.1, 0.1, 0.1))
    plan = allocate(
        5,
        [Heads("first", 8, 2, 4, gains=gains), Heads("second", 8, 2, 4, gains=((0.0,) * 4,) * 2)],
        cost="rank",
    )
    lines = plan.table().splitlines()
    assert lines[1].split() == ["first", "1x4", "+", "1x1", "5", "62%", "5"]
    assert lines[2].split() == ["second", "none", "0", "0%", "0"]
    assert lines[3].split() == ["all", "5", "31%", "5"]
    assert "99.15%" in str(plan)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"budget": 1.5}, r"a share in \(0, 1\] or a whole number of units: got 1.5; type `0.25`"),
        ({"budget": True}, "a share in .* got True"),
        ({"cost": "time"}, "a cost among rank, parameters, flops, cache: got 'time'"),
        ({"groups": "heads"}, '`groups` "head" or "layer": got \'heads\''),
        ({"multiple": 0}, "`multiple` from 1: got 0; type `multiple=8`"),
        ({"weights": [1.0]}, r"2 weights from 0: got \[1.0\]"),
        ({"weights": [1.0, -1.0]}, "2 weights from 0"),
        ({"importances": [1.0]}, "one importance a layer, 2"),
        ({"importances": [1.0, -1.0]}, "importances are numbers from 0"),
        ({"ranks": (4, 2)}, r"`ranks=\(least, most\)`: got \(4, 2\)"),
        ({"heads": (2, None), "ranks": (4, None), "budget": 0.1}, "cost more than the budget"),
    ],
)
def test_what_cannot_be_allocated_is_said(said, message):
    layers = [Heads(name, 8, 2, 4, step=2, gains=((2.0, 1.0),) * 2) for name in "ab"]
    said = {"budget": 0.5, "multiple": 2} | said
    with pytest.raises(ValueError, match=message):
        allocate(said.pop("budget"), layers, **said)


def test_gains_of_some_layers_only_are_refused():
    layers = [Heads("a", 8, 1, 1, gains=((1.0,),)), Heads("b", 8, 1, 1)]
    with pytest.raises(
        ValueError, match=r"the gains of every layer or of none: got \[True, False\]"
    ):
        allocate(0.5, layers)
    with pytest.raises(ValueError, match="at least one layer"):
        allocate(0.5, [])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rank": 3, "step": 2}, "a rank that is a multiple of `step`"),
        ({"heads": 0}, "sizes from 1"),
        ({"uses": "keys"}, "`uses` of scores, tied, values, outputs, all"),
        ({"gains": ((1.0,),)}, r"has 2 heads of 4 steps: got gains of 1 heads and \[1\] steps"),
        ({"gains": ((1.0, -1.0, 0.0, 0.0),) * 2}, "got one below 0 in layer `a`"),
    ],
)
def test_heads_that_make_no_sense_are_refused(said, message):
    with pytest.raises(ValueError, match=message):
        Heads(**{"name": "a", "dim": 8, "heads": 2, "rank": 4} | said)


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no plan .*; type `cem allocate"):
        Plan.read(tmp_path / "plan.yaml")
    with pytest.raises(ValueError, match="a plan has the fields"):
        Plan.from_yaml("{cem_plan: 1, layers: []}")
    with pytest.raises(ValueError, match="version 2"):
        Plan.from_yaml("{cem_plan: 2}")
    with pytest.raises(ValueError, match="a plan is YAML"):
        Plan.from_yaml("[")


def test_groups_are_counted_largest_first():
    assert LayerPlan("", 8, 16, (8, 16, 0, 8)).groups == ((1, 16), (2, 8))
