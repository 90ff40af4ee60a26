"""Pictures of ranks: what is drawn, from the numbers."""

import pytest
from matplotlib import pyplot as plt

from cem import rank_plots
from cem.allocation import Heads, allocate


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_a_bar_is_made_of_the_ranks_of_its_heads():
    gains = ((9.0, 8.0, 7.0), (5.0, 0.1, 0.1))
    layers = [Heads(f"model.{n}.attn", 8, 2, 3, gains=gains) for n in range(2)]
    plan = allocate(6, layers, cost="rank", weights=[10.0, 1.0])
    ax = plan.plot()
    solid = [bar for bar in ax.patches if bar.get_fill()]
    assert [bar.get_height() for bar in solid] == [
        r for row in plan.ranks for r in sorted(row)[::-1] if r
    ]
    outlines = [bar.get_height() for bar in ax.patches if not bar.get_fill()]
    assert outlines == [6, 6]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1"]


def test_gains_end_where_nothing_is_left():
    layers = [Heads("a", 8, 2, 4, step=2, gains=((3.0, 1.0), (1.0, 0.0)))]
    ax = rank_plots.gains(layers)
    first, second = ax.lines
    assert list(first.get_xdata()) == [0, 2] and list(first.get_ydata()) == [1.0, 0.25]
    assert list(second.get_xdata()) == [0]
    assert ax.get_yscale() == "log"


def test_increases_are_drawn_by_share():
    ax = rank_plots.increases({"uniform": {0.5: 0.1, 0.125: 0.9}, "loss": {0.5: 0.01, 0.125: 0.2}})
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.9, 0.1], [0.2, 0.01]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1/8", "1/2"]
    ax = rank_plots.saturation({64: {1: 0.4, 4: 0.1}}, "error", log=True, ax=plt.subplots()[1])
    assert list(ax.lines[0].get_xdata()) == [1, 4] and ax.get_ylabel() == "error"
