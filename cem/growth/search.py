"""Which values of the new rows leave the update as it is, and can still learn: tried out, in float64.

Nothing here is told about an energy. A candidate says for every parameter how its new rows are filled; it is written
into the grown layer, and the force on drawn tokens is compared with that of the old layer. What is exact is then asked
for the gradient of its new rows, at once and after one step of training.

Legend: B batch, T tokens, D dim; n old rows, m new rows, k copies of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from sympy import Indexed, Mul
from torch import Tensor, nn

from ..energy import Energy
from ..language.symbols import State
from .rows import Axes

EXACT = 1e-12
"""The largest relative change of a force that is called none, in float64."""

RULES = ("frozen", "norm_matched", "duplicate", "gain", "random")
POWERS = (1, 1 / 2, 1 / 3, 1 / 4)


@dataclass(frozen=True)
class Recipe:
    """How the new rows of each parameter are filled.

    Attributes:
        kinds: by parameter, ``"zero"``, ``"random"``, ``"matched"``, or a power p: copies, all divided by k^p.
        recomputed: whether scalars take their default at the new size; else they keep their value.
    """

    kinds: Mapping[str, str | float]
    recomputed: bool = False


@dataclass(frozen=True)
class Finding:
    """What a recipe does, measured.

    Attributes:
        recipe: it.
        change: the largest change of a force, relative to the largest force.
        gradient, later: by parameter, the share of new numbers that receive a gradient at once, and after one step.
        symmetric: whether new rows equal others and receive equal gradients, so that they stay equal.
    """

    recipe: Recipe
    change: float
    gradient: Mapping[str, float]
    later: Mapping[str, float]
    symmetric: bool = False

    @property
    def alive(self) -> bool:
        """Whether any new number can learn."""
        return any(self.later.values())


class Probe:
    """Drawn tokens, of many lengths, under the layer's own visibility and under a drawn mask."""

    def __init__(self, layer, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def tokens(*shape: int) -> Tensor:
            scale = torch.randn(*shape[:-1], 1, generator=draw, dtype=torch.float64).exp()
            return scale * torch.randn(*shape, generator=draw, dtype=torch.float64)

        energy, inputs = layer.energy_function, {}
        self.h = tokens(3, 7, layer.dim)
        if energy.context is not None and layer.context_dim != layer.dim:
            inputs["context"] = tokens(3, 9, layer.context_dim)
        self.inputs = [inputs]
        if energy.context is not None and (energy.expression is not None or energy.masks_itself):
            length = inputs["context"].shape[1] if inputs else 7
            visible = torch.rand(3, 7, length, generator=draw) < 0.6
            self.inputs.append(inputs | {"visible": visible})

    def force(self, layer) -> Tensor:
        """dE/dg at the first step, (2, B, T, D)."""
        found = []
        for inputs in self.inputs:
            _, first = layer.begin(self.h, **inputs)
            found.append(first.gradient(first.g) * layer.lowering.scale)
        return torch.stack(found)

    def output(self, layer) -> Tensor:
        """What the layer adds to its state, all steps included, (2, B, T, D)."""
        with torch.no_grad():
            return torch.stack([layer(self.h, **inputs) - self.h for inputs in self.inputs])

    def gradients(self, layer, parameters: list[nn.Parameter], seed: int) -> list[Tensor]:
        """The gradients of one weighted sum of the force."""
        with torch.enable_grad():
            force = self.force(layer)
            draw = torch.Generator().manual_seed(seed)
            weights = torch.randn(force.shape, generator=draw, dtype=force.dtype)
            found = torch.autograd.grad((force * weights).sum(), parameters, allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        return [torch.zeros_like(p) if g is None else g for p, g in pairs]


def difference(new: Tensor, old: Tensor) -> float:
    """The largest change, relative to the largest value before; infinite where it is no number."""
    change = (new - old).abs().max()
    if change == 0:
        return 0.0
    found = float(change / old.abs().max())
    return found if found == found else float("inf")


def compared(new, old) -> float:
    """The change of what a layer adds to its state, relative to the largest of it, in float64 on drawn tokens."""
    old, new = (copy.deepcopy(layer).to("cpu", torch.float64) for layer in (old, new))
    probe = Probe(old)
    return difference(probe.output(new), probe.output(old))


def reads_state(energy: Energy) -> set[str]:
    """The parameters that multiply the state: zero there, a part of the energy neither reads nor moves it."""
    found: set[str] = set()
    for product in () if energy.expression is None else energy.expression.atoms(Mul):
        bases = [factor.base for factor in product.args if isinstance(factor, Indexed)]
        if any(isinstance(base, State) for base in bases):
            found |= {str(base.name) for base in bases if not isinstance(base, State)}
    return found


class Trial:
    """The grown layer, into which recipes are written.

    Args:
        old: the layer in float64.
        new: by whether scalars are recomputed, the grown layer in float64.
        axes: by name, the parameters that grow.
        spreads: by name, the standard deviation of random rows.
        generator: of what is drawn.
        gain: the parameter with a number a row, for rule ``"gain"``.
    """

    def __init__(
        self,
        old,
        new: Mapping[bool, nn.Module],
        axes: Mapping[str, Axes],
        spreads: Mapping[str, float],
        generator: torch.Generator | None,
        gain: str,
    ) -> None:
        self.gain = gain
        self.new, self.axes = new, axes
        self.old = {name: getattr(old, name).detach() for name in axes}
        self.probe, self.energy = Probe(old), old.energy_function
        with torch.no_grad():
            self.before = self.probe.force(old)
        self.random, self.matched = {}, {}
        for name, its in axes.items():
            shape = torch.Size(its.shape)
            draw = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.random[name] = draw * spreads[name]
        self._generator = generator

    def value(self, name: str, kind: str | float) -> Tensor:
        """The parameter with its new rows."""
        its, old = self.axes[name], self.old[name]
        if kind == "zero":
            return its.spread(old, torch.zeros(its.shape, dtype=torch.float64))
        if kind == "random":
            return its.spread(old, self.random[name])
        if kind == "matched":
            if name not in self.matched:
                self.matched[name] = its.matched(old, self._generator)
            return self.matched[name]
        return its.duplicated(old) * its.copies**-kind

    def write(self, recipe: Recipe) -> nn.Module:
        """The grown layer with a recipe in it."""
        layer = self.new[recipe.recomputed]
        for name, kind in recipe.kinds.items():
            getattr(layer, name).data.copy_(self.value(name, kind))
        return layer

    def change(self, recipe: Recipe) -> float:
        """The relative change of the force."""
        layer = self.write(recipe)
        with torch.no_grad():
            return difference(self.probe.force(layer), self.before)

    def finding(self, recipe: Recipe, change: float) -> Finding:
        """What a recipe does to the gradients of the new rows."""
        layer = self.write(recipe)
        parameters = [getattr(layer, name) for name in self.axes]
        first = self.probe.gradients(layer, parameters, 1)
        least = EXACT * max(float(g.abs().max()) for g in first)
        symmetric = self._symmetric(parameters, first, least)
        gradient = self._shares(first, least)
        with (
            torch.no_grad()
        ):  # one small step along the gradient, each parameter by a share of its size
            for p, g in zip(parameters, first, strict=True):
                size = g.square().mean().sqrt()
                if size > 0:
                    p -= 0.02 * (p.square().mean().sqrt() + 1e-3) * g / size
        second = self._shares(self.probe.gradients(layer, parameters, 2), least)
        later = {name: max(gradient[name], second[name]) for name in gradient}
        return Finding(recipe, change, gradient, later, symmetric)

    def _symmetric(self, values: list[Tensor], gradients: list[Tensor], least: float) -> bool:
        """Whether a new row equals another, with its gradient: rows are compared by a random projection."""
        draw = torch.Generator().manual_seed(3)
        found = []
        for tensors in (values, gradients):
            flat = [
                t.detach().reshape(its.after).movedim(its.grown[0], 0).reshape(its.rows.total, -1)
                for t, its in zip(tensors, self.axes.values(), strict=True)
            ]
            table = torch.cat(flat, 1)
            found.append(table @ torch.randn(table.shape[1], generator=draw, dtype=table.dtype))
        rows, slopes = found
        order = rows.argsort()
        fresh = torch.zeros(len(rows)).bool()
        fresh[list(next(iter(self.axes.values())).rows.fresh)] = True
        first, second = order[:-1], order[1:]
        near = (rows[first] - rows[second]).abs() <= EXACT * rows.abs().max()
        near &= (slopes[first] - slopes[second]).abs() <= 1e3 * least
        return bool((near & (fresh[first] | fresh[second])).any())

    def _shares(self, gradients: list[Tensor], least: float) -> dict[str, float]:
        found = {}
        for (name, its), g in zip(self.axes.items(), gradients, strict=True):
            fresh = g[its.fresh]
            found[name] = float(((fresh.abs() > least) & fresh.isfinite()).double().mean())
        return found

    def sets(self) -> Iterator[tuple[str, ...]]:
        """Sets of parameters, small ones first; of many parameters no large sets."""
        for count in range(len(self.axes) + 1):
            if len(self.axes) <= 6 or count <= 2:
                yield from combinations(self.axes, count)

    def recipes(self, rule: str) -> Iterator[tuple[Recipe, frozenset[str]]]:
        """Candidates for a rule, with the parameters that are set to zero."""
        scalars = {
            "frozen": (False,),
            "gain": (False,),
            "random": (False,),
            "norm_matched": (True, False),
        }
        for recomputed in scalars.get(rule, (False, True)):
            if recomputed not in self.new:
                continue
            if rule in ("random", "gain"):
                kinds = dict.fromkeys(self.axes, "random")
                kinds |= {self.gain: "zero"} if rule == "gain" else {}
                yield Recipe(kinds, recomputed), frozenset()
            elif rule == "duplicate":
                for power in (0.0, *map(float, POWERS)):
                    for chosen in self.sets():
                        single = len(chosen) in (1, len(self.axes))
                        if bool(chosen) != bool(power) or (power not in (0, 1, 0.5) and not single):
                            continue
                        kinds = {name: power if name in chosen else 0.0 for name in self.axes}
                        yield Recipe(kinds, recomputed), frozenset(chosen)
            else:
                other = "random" if rule == "frozen" else "matched"
                for zeros in self.sets():
                    kinds = {name: "zero" if name in zeros else other for name in self.axes}
                    rest = [name for name in self.axes if name not in zeros]
                    if other == "matched" and any(self.value(n, other) is None for n in rest):
                        continue
                    if rest or rule == "frozen":
                        yield Recipe(kinds, recomputed), frozenset(zeros)

    def search(self, rule: str) -> tuple[Finding | None, list[Finding], float]:
        """The best exact recipe that can learn, the exact ones that cannot, and the least change of the others."""
        best, dead, least = None, [], float("inf")
        exact: list[tuple[bool, frozenset[str]]] = []
        reading = reads_state(self.energy)
        for recipe, chosen in self.recipes(rule):
            if any(recipe.recomputed == r and chosen > smaller for r, smaller in exact):
                continue  # it does more than is needed
            change = self.change(recipe)
            if rule != "random" and not change <= EXACT:
                least = min(least, change)
                continue
            exact.append((recipe.recomputed, chosen))
            found = self.finding(recipe, change)
            if not found.alive:
                dead.append(found)
                continue
            # All can learn, each in its way; most learn at once; little is lost; what is off does not read the state.
            numbers = {name: int(its.fresh.sum()) for name, its in self.axes.items()}
            order = (
                sum(numbers[n] for n, share in found.later.items() if share),
                not found.symmetric,
                sum(numbers[n] * share for n, share in found.gradient.items()),
                -sum(numbers[n] for n in chosen),
                len(chosen & reading),
            )
            if best is None or order > best[0]:
                best = order, found
            if rule == "duplicate":
                break
        return (best[1] if best else None), dead, least
