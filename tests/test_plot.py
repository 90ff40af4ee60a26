"""The pictures of a trace: what they draw, what they say, what they refuse."""

import math
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
import pytest
import torch
from helpers import ENERGIES, by_name
from matplotlib import colors
from matplotlib import pyplot as plt

import cem
from cem import plot

CONTEXT = "fixed, as before the update"


@dataclass
class Layer:
    """What the pictures need of a layer in a trace."""

    name: str
    energy_name: str
    before: torch.Tensor
    after: torch.Tensor | None
    states: torch.Tensor | None = None
    energy: object = None

    def energy_at(self, points, *, batch=0, token=-1):
        return self.energy(points)


class Trace(tuple):
    context = CONTEXT

    def __getitem__(self, key):
        if isinstance(key, str):
            return next(layer for layer in self if layer.name == key)
        return super().__getitem__(key)


def make_trace(layers=4, steps=1, batch=2, tokens=7, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(layers):
        before = torch.randn(steps, batch, tokens, generator=generator)
        drop = torch.rand(steps, batch, tokens, generator=generator) * scale**i
        kind = ("attention", "mlp")[i % 2]
        energy = ("interaction", "gated")[i % 2]
        made.append(Layer(f"model.blocks.{i // 2}.{kind}", energy, before, before - drop))
    return Trace(made)


def make_descent(energy, start, steps, step_size):
    states = [start]
    for _ in range(steps):
        h = states[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(h[None]).sum(), h)
        states.append(h.detach() - step_size * gradient)
    energies = torch.stack([energy(h[None]) for h in states])[:, None]  # (N + 1, 1, 1)
    path = torch.stack(states)[:, None, None]  # (N + 1, 1, 1, D)
    return Trace([Layer("memory", "memory", energies[:-1], energies[1:], path, energy)])


def bowl(points):
    weights = torch.arange(1, points.shape[-1] + 1, dtype=points.dtype)
    return (weights * points.square()).sum(-1) / 2


def drops_of(trace):
    return [(layer.before - layer.after).double().numpy() for layer in trace]


def medians_of(ax):
    """The medians of `descent`, layer after layer; the triangles and the zero line are others."""
    return np.concatenate([line.get_ydata() for line in ax.lines if line.get_marker() == "o"])


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def draw(ax):
    """Everything is laid out and drawn once, so that a fault or a warning there fails the test."""
    ax.figure.canvas.draw()
    return ax


@pytest.mark.parametrize("steps", [1, 3])
def test_descent_draws_the_medians_and_quantiles(steps):
    trace = make_trace(steps=steps)
    ax = draw(plot.descent(trace, quantiles=(0.25, 0.75)))
    flat = [drop.reshape(steps, -1) for drop in drops_of(trace)]
    np.testing.assert_allclose(medians_of(ax), np.concatenate([np.median(x, 1) for x in flat]))
    bars = np.concatenate([np.array(c.get_segments())[:, :, 1] for c in ax.collections])
    expected = np.concatenate([np.quantile(x, (0.25, 0.75), axis=1).T for x in flat])
    np.testing.assert_allclose(bars, expected)


def test_descent_labels():
    ax = draw(plot.descent(make_trace(steps=2)))
    assert ax.get_ylabel() == "energy drop per token\nmedian, bar from 10% to 90%"
    assert ax.get_xlabel() == f"layers and their steps in order of computation\ncontext: {CONTEXT}"
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names == ["0.attention", "0.mlp", "1.attention", "1.mlp"]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["interaction", "gated"]
    assert ax.get_yscale() == "linear"


def test_what_all_names_share_is_not_in_a_label():
    layers = make_trace()
    names = [f"model.layers.{i}.parts.{layer.energy_name}" for i, layer in enumerate(layers)]
    trace = Trace(replace(layer, name=n) for layer, n in zip(layers, names, strict=True))
    labels = [text.get_text() for text in draw(plot.descent(trace)).get_xticklabels()]
    assert labels == ["0.interaction", "1.gated", "2.interaction", "3.gated"]


def test_descent_marks_uphill_steps():
    first, second, *rest = make_trace()
    uphill = replace(second, before=second.after, after=second.before)
    ax = draw(plot.descent(Trace([first, uphill, *rest])))
    triangles = [line for line in ax.lines if line.get_marker() == "v" and len(line.get_ydata())]
    (height,) = triangles[0].get_ydata()
    assert len(triangles) == 1
    assert height == pytest.approx(np.median(drops_of([uphill])[0])) and height < 0
    assert ax.get_legend().get_texts()[-1].get_text() == "uphill"


def test_descent_over_orders_of_magnitude_is_symlog():
    assert draw(plot.descent(make_trace(scale=30.0))).get_yscale() == "symlog"


def test_many_layers_get_few_labels():
    ax = draw(plot.descent(make_trace(layers=96)))
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert 5 < len(names) < 45
    assert {name.split(".")[1] for name in names} == {"attention", "mlp"}
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False))


def test_names_of_one_layer_and_of_a_bare_layer():
    (layer,) = make_trace(layers=1)
    for name, shown in [("blocks.0.attention", "attention"), ("", "interaction")]:
        ax = plot.descent(Trace([replace(layer, name=name)]))
        assert [label.get_text() for label in ax.get_xticklabels()] == [shown]


def test_masked_tokens_are_left_out():
    trace = make_trace(steps=2)
    trace[0].before[:, 1, 4:] = math.nan
    trace[1].before[:] = math.nan  # nothing left: no dot, and no warning
    medians = medians_of(draw(plot.descent(trace)))
    first = drops_of(trace)[0].reshape(2, -1)
    np.testing.assert_allclose(medians[:2], np.nanmedian(first, axis=1))
    assert np.isnan(medians[2:4]).all() and np.isfinite(medians[4:]).all()
    draw(plot.curve(trace))
    image = draw(plot.tokens(trace, batch=1)).images[0].get_array()
    assert image.mask[:2].tolist() == [[False] * 4 + [True] * 3] * 2


def test_curve_adds_up_the_drops():
    trace = make_trace(layers=3, steps=4)
    ax = draw(plot.curve(trace))
    lines = [line for line in ax.lines if line.get_marker() == "o"]
    for line, drop in zip(lines, drops_of(trace), strict=True):
        change = -np.cumsum(drop.reshape(4, -1), axis=0)
        np.testing.assert_allclose(line.get_ydata(), [0, *np.median(change, axis=1)], atol=1e-15)
    assert ax.get_ylabel() == "energy change per token\nmedian, bar from 10% to 90%"
    assert ax.get_xlabel() == f"step\ncontext: {CONTEXT}"


def test_tokens_draws_the_drops_of_one_sequence():
    trace = make_trace(steps=3)
    ax = draw(plot.tokens(trace, batch=1))
    image = ax.images[0]
    np.testing.assert_allclose(image.get_array(), np.concatenate(drops_of(trace))[:, 1])
    limit = np.quantile(np.abs(np.array(image.get_array())), 0.98)
    assert (image.norm.vmin, image.norm.vmax) == (-limit, limit)
    assert ax.get_xlabel() == f"token\ncontext: {CONTEXT}"
    assert image.colorbar.ax.get_ylabel() == "energy drop per token"
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["0.attention", "0.mlp", "1.attention", "1.mlp"]


def test_tokens_over_orders_of_magnitude_is_symlog():
    norm = draw(plot.tokens(make_trace(scale=30.0))).images[0].norm
    assert isinstance(norm, colors.SymLogNorm) and norm.vmin == -norm.vmax


def test_tokens_of_a_layer_at_rest():
    (layer,) = make_trace(layers=1)
    norm = draw(plot.tokens(Trace([replace(layer, after=layer.before)]))).images[0].norm
    assert (norm.vmin, norm.vmax) == (-1, 1)


def test_tokens_writes_the_text():
    text = ["The", " price", " is", " $", "5", "$", "\n"]
    ax = draw(plot.tokens(make_trace(), text=text))
    shown = [label.get_text() for label in ax.get_xticklabels()]
    assert shown == ["The", " price", " is", r" \$", "5", r"\$", r"\n"]
    long = make_trace(tokens=300)
    assert len(plot.tokens(long, text=["word"] * 300).get_xticklabels()) < 60


def path_of(ax):
    return np.array(ax.lines[0].get_data()).T  # (N + 1, 2)


def test_landscape_of_one_step():
    start = torch.tensor([1.0, 0.5, -0.5, 0.2], dtype=torch.float64)
    trace = make_descent(bowl, start, steps=1, step_size=0.1)
    ax = draw(plot.landscape(trace, resolution=21))
    length = (trace[0].states[1] - trace[0].states[0]).norm().item()
    np.testing.assert_allclose(path_of(ax), [[0, 0], [length, 0]], atol=1e-12)
    assert ax.get_xlabel() == "displacement along the step, in units of h"
    assert ax.get_ylabel() == "displacement across:\ndownhill at the end"
    assert ax.get_title(loc="left") == "memory, token 0"
    assert ax.get_aspect() == 1
    ends = [text.get_text() for text in ax.get_legend().get_texts()]
    before, after = trace[0].before.item(), trace[0].after.item()
    assert ends == [f"start, E = {before:.4g}", f"end, E = {after:.4g}"]


def test_plane_of_a_straight_path_holds_the_gradient():
    start = torch.tensor([1.0, 0.5, -0.5, 0.2], dtype=torch.float64)
    path = make_descent(bowl, start, steps=1, step_size=0.1)[0].states[:, 0, 0]
    plane, _ = plot._plane(path, lambda points: bowl(points).numpy())
    np.testing.assert_allclose(plane @ plane.T, np.eye(2), atol=1e-12)
    gradient = (torch.arange(1, 5) * path[1]).numpy()
    # Central differences of a quadratic are exact, so only rounding is left.
    np.testing.assert_allclose(plane.T @ (plane @ gradient), gradient, atol=1e-12)
    assert plane[1] @ gradient < 0


def test_plane_of_a_bent_path_holds_the_path():
    start = torch.tensor([1.0, 1.0], dtype=torch.float64)
    trace = make_descent(bowl, start, steps=4, step_size=0.3)
    ax = draw(plot.landscape(trace, layer="memory", resolution=11))
    path = trace[0].states[:, 0, 0].numpy()
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)
    np.testing.assert_allclose(np.linalg.norm(np.diff(path_of(ax), axis=0), axis=1), lengths)
    assert ax.get_xlabel() == "displacement along the steps, in units of h"
    assert ax.get_ylabel() == "displacement across:\nwhere the path bends"


def test_plane_where_the_gradient_has_no_other_direction():
    def round_bowl(points):
        return points.square().sum(-1) / 2

    trace = make_descent(round_bowl, torch.tensor([1.0, 0.5, 0.0]), steps=1, step_size=0.5)
    labels = {draw(plot.landscape(trace, resolution=5)).get_ylabel() for _ in range(2)}
    assert labels == {"displacement across:\nat random"}


def test_plane_of_a_closed_path():
    path = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    plane, _ = plot._plane(path, None)
    np.testing.assert_allclose(plane @ plane.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(np.abs(plane[:, 2]), 0, atol=1e-12)


def test_landscape_asks_for_the_chosen_token():
    asked = set()

    class Asking(Layer):
        def energy_at(self, points, *, batch=0, token=-1):
            asked.add((batch, token))
            assert points.ndim == 2 and points.dtype == self.states.dtype
            return bowl(points)

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 5, 4, generator=generator)
    ax = plot.landscape(Trace([Asking("a", "b", None, None, states)]), batch=1, token=-2)
    assert asked == {(1, -2)}
    assert ax.get_title(loc="left") == "a, token 3"


PICTURES = {
    "descent": (plot.descent, make_trace),
    "curve": (plot.curve, lambda: make_trace(steps=2)),
    "tokens": (plot.tokens, make_trace),
    "landscape": (plot.landscape, lambda: make_descent(bowl, torch.ones(3), 2, 0.1)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_draws_on_the_given_axes_and_keeps_the_style(name):
    function, make = PICTURES[name]
    before = dict(matplotlib.rcParams)
    figure, axes = plt.subplots(1, 2, layout="constrained")
    assert function(make(), ax=axes[1]) is draw(axes[1])
    assert plt.get_fignums() == [figure.number]
    assert not axes[0].has_data()
    function(make())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", ["descent", "curve", "tokens"])
def test_pictures_need_the_energies_after(name):
    trace = Trace([replace(layer, after=None) for layer in make_trace()])
    message = "needs the energies after each step: got a trace made with after=False; type"
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        getattr(plot, name)(trace)
    with pytest.raises(ValueError, match=f"`{name}` needs an energy layer: got an empty trace"):
        getattr(plot, name)(Trace())


def test_tokens_refuses():
    with pytest.raises(ValueError, match="`tokens` needs a string for each token: got 2 for 7"):
        plot.tokens(make_trace(), text=["a", "b"])
    mixed = Trace([*make_trace(tokens=5), *make_trace(tokens=3)])
    with pytest.raises(ValueError, match=r"`tokens` needs layers of one length: got \[3, 5\]"):
        plot.tokens(mixed)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (None, "the states: got a trace made with states=False"),
        (torch.rand(2, 1, 1, 1), "two coordinates: got a state of dim 1"),
        (torch.ones(2, 1, 1, 3), "a token that moves: got token -1 of batch 0"),
        (torch.full((2, 1, 1, 3), math.nan), "a token that moves: got token -1 of batch 0"),
    ],
)
def test_landscape_refuses(states, message):
    layer = Layer("blocks.0.mlp", "gated", None, None, states, bowl)
    with pytest.raises(ValueError, match=f"`landscape` of layer `blocks.0.mlp` needs {message}"):
        plot.landscape(Trace([layer]))


@pytest.mark.parametrize("case", ENERGIES, ids=by_name)
def test_the_landscape_of_every_energy(case):
    """Its ends are at the energies that the trace has of the first and the last state."""
    trace = cem.trace(case.derive(steps=2), **case.inputs())
    texts = plot.landscape(trace, resolution=5).get_legend().get_texts()
    ends = [trace[0].before[0, 0, -1], trace[0].after[-1, 0, -1]]
    shown = [float(text.get_text().split("= ")[1].replace("−", "-")) for text in texts]
    np.testing.assert_allclose(shown, ends, rtol=1e-3)  # four digits are shown
