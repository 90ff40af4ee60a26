"""Growth of one layer: larger named sizes, the same update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..energy import Energy
from ..language.symbols import Dim
from ..sizes import width_of
from .gain import gain_name, with_gain
from .rows import Axes, factors, rows_of
from .search import EXACT, RULES, Probe, Recipe, Trial, difference

Carry = Callable[[Tensor, int], Tensor]
"""What follows a parameter, such as a moment of Adam, in the new shape; the power of the gradient in it."""


@dataclass(frozen=True)
class Growth:
    """How one size of one layer grew, and what that did: measured in float64, on drawn tokens.

    Attributes:
        energy, size: whose, and which.
        old, new: the size before and after.
        rule: that was asked for.
        rows: by parameter, what its new rows are.
        scalars: numbers whose default depends on the size, with the value that they have.
        change: the change of what the layer adds to its state, relative to the largest of it.
        gradient: by parameter, the share of the new numbers that receive a gradient in the first step of training.
        later: the same in the second step.
        symmetric: new rows equal others, receive the same gradients, and stay equal in training.

    >>> import cem
    >>> from cem.energies import gated
    >>> print(cem.derive(gated, dim=8, hidden=4).grow(hidden=6).growth[0])
    gated_silu: hidden 4 -> 6, frozen, exact (relative change 0e+00)
      G   0                      gradient in 100% of the new rows' numbers
      U   random, std ...        gradient in 0%, from the second step on in 100%
    """

    energy: str
    size: str
    old: int
    new: int
    rule: str
    rows: Mapping[str, str]
    scalars: Mapping[str, float]
    change: float
    gradient: Mapping[str, float]
    later: Mapping[str, float]
    symmetric: bool
    recipe: Recipe

    @property
    def key(self) -> tuple:
        """What layers share for which the same recipe is tried first."""
        return self.energy, self.size, self.old, self.new, self.rule

    @property
    def exact(self) -> bool:
        """Whether the layer computes what it did, up to rounding."""
        return self.change <= EXACT

    def __str__(self) -> str:
        kind = "exact" if self.exact else "not exact"
        lines = [
            f"{self.energy}: {self.size} {self.old} -> {self.new}, {self.rule}, {kind}"
            f" (relative change {self.change:.0e})"
        ]
        wide = max(map(len, self.rows))
        for name, what in self.rows.items():
            now, later = self.gradient[name], self.later[name]
            told = f"gradient in {now:.0%}"
            told += " of the new rows' numbers" if name == next(iter(self.rows)) else ""
            told += f", from the second step on in {later:.0%}" if later > now else ""
            lines.append(f"  {name:<{wide}}   {what:<22} {told}")
        if self.scalars:
            kept = ", ".join(f"{name} = {value:.6g}" for name, value in self.scalars.items())
            verb = "recomputed" if self.recipe.recomputed else "kept from the old size"
            lines.append(f"  {kept}: {verb}")
        if self.symmetric:
            lines.append(
                "  new rows equal others, receive equal gradients and stay equal: break that with noise=0.05"
            )
        return "\n".join(lines)


def grow_layer(
    layer,
    *,
    rule: str = "frozen",
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    **sizes: int,
):
    """A new layer with larger named sizes, and with the same update where the rule can have it.

    Which new rows leave the update as it is, is found by trying: every parameter that grows gets zeros, random
    rows or copies, the force on drawn tokens is compared in float64, and what is exact must give its new rows a
    gradient. ``layer.growth`` of the result tells what was found. This layer is left as it is.

    Args:
        rule: ``"frozen"``: random rows for as many parameters as possible, zeros for the others, and scalars keep
            their values. ``"norm_matched"``: likewise with rows whose Gram matrix is that of the old ones, and
            scalars take their default at the new size where that is exact. ``"duplicate"``: copies of the old
            rows in turn, divided so that the update stays. ``"random"``: all rows random; the update changes.
        noise: added to new rows, in shares of the standard deviation of the parameter; breaks the symmetry of
            copies, and exactness.
        generator: of the random rows, on the CPU; torch's own if None.
        **sizes: the named sizes to grow, ``hidden=704``.

    Raises:
        ValueError: an unknown rule or size, a size that would shrink or belongs to the width; a rule that cannot
            leave the update as it is; a dead point, where no new row would ever receive a gradient.

    >>> import torch, cem
    >>> from cem.energies import interaction
    >>> layer = cem.derive(interaction, dim=16, heads=2, rank=4)
    >>> wide, h = layer.grow(heads=3, rank=6), torch.randn(1, 5, 16)
    >>> wide.Q.shape, torch.allclose(wide(h), layer(h), atol=1e-6), wide.scalars == layer.scalars
    (torch.Size([3, 6, 16]), True, True)
    """
    return enlarged(layer, sizes, rule=rule, noise=noise, generator=generator)[0]


def enlarged(
    layer,
    sizes: Mapping[str, int],
    *,
    rule: str,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    known: Mapping[tuple, Recipe] | None = None,
) -> tuple[nn.Module, dict[str, Carry]]:
    """:func:`grow_layer`, and by parameter how what follows it is carried over.

    ``known`` holds recipes that served layers of the same kind: they are tried before others are searched for.
    """
    targets = _checked(layer, sizes, rule, noise)
    wide = copy.deepcopy(layer).to("cpu", torch.float64)
    names = [str(p.name) for p in layer.energy_function.parameters]
    spreads = {n: float(getattr(wide, n).detach().square().mean().sqrt()) for n in names}
    records, carries = [], {}
    for size, new in targets.items():
        found = _Step(wide, size, new, rule, spreads, noise, generator, known or {})
        wide, record = found.layer, found.record
        records.append(record)
        for name, its in found.axes.items():
            carries.setdefault(name, []).append((its, record.recipe.kinds[name]))
    for name in (str(p.name) for p in wide.energy_function.parameters):
        old = getattr(layer, name, getattr(layer, names[0]))  # a gain is new
        value = getattr(wide, name).detach().to(old.device, old.dtype)
        setattr(wide, name, nn.Parameter(value, requires_grad=old.requires_grad))
    for scalar in layer._learned:
        name = f"log_{scalar.name}" if scalar.is_positive else scalar.name
        setattr(wide, name, copy.deepcopy(getattr(layer, name)))
    parts = copy.deepcopy((layer.update, layer.preconditioner, layer.norm))
    wide.update, wide.preconditioner, wide.norm = parts
    wide.growth = tuple(records)
    return wide.train(layer.training), {n: _carry(steps) for n, steps in carries.items()}


def _carry(steps: list[tuple[Axes, str | float]]) -> Carry:
    def carried(value: Tensor, power: int = 1) -> Tensor:
        for its, kind in steps:
            if isinstance(kind, float):
                # All k copies moved by s together are the old row moved by one, so each has 1/(k s) of its gradient.
                share = (its.copies ** (kind - 1)) ** power
                value = its.duplicated(value) * share.to(value)
            else:
                value = its.spread(value, value.new_zeros(its.shape))
        return value

    return carried


def _checked(layer, sizes: Mapping[str, int], rule: str, noise: float) -> dict[Dim, int]:
    """The sizes to grow, or a ``ValueError``."""
    energy, name = layer.energy_function, layer.energy_function.name
    if rule not in RULES:
        raise ValueError(
            f"`rule` is one of {', '.join(RULES)}: got {rule!r}; type `rule={RULES[0]!r}`"
        )
    if not noise >= 0:
        raise ValueError(
            f"`noise` is a share of a standard deviation: got {noise!r}; type `noise=0.05`"
        )
    widths = [energy.width] if energy.context is None else [energy.width, energy.context.shape[1]]
    fixed = {str(dim) for width in widths for dim in width.atoms(Dim)}
    free = [str(dim) for dim in energy.dims if str(dim) not in fixed]
    advice = f"type `layer.grow({free[0]}={2 * layer.sizes[free[0]]})`" if free else "it has none"
    if not sizes:
        raise ValueError(f"layer `{name}` grows in a named size: got none; {advice}")
    found: dict[Dim, int] = {}
    for key, value in sizes.items():
        if key in fixed or key in ("dim", "seq"):
            what = (
                "is the number of tokens" if key == "seq" else "belongs to the width of the tokens"
            )
            raise ValueError(
                f"layer `{name}` cannot grow `{key}`, which {what}: got {key}={value}; sizes that grow:"
                f" {', '.join(free) or 'none'}"
            )
        if key not in free:
            raise ValueError(
                f"layer `{name}` has no size `{key}`: got {key}={value}; sizes that grow:"
                f" {', '.join(free) or 'none'}"
            )
        if type(value) is not int or value < layer.sizes[key]:
            raise ValueError(
                f"layer `{name}` grows and cannot shrink: got {key}={value!r} where it is {layer.sizes[key]};"
                f" type `{key}={2 * layer.sizes[key]}`"
            )
        if value > layer.sizes[key]:
            found[next(dim for dim in energy.dims if str(dim) == key)] = value
    return found


def _built(layer, sizes: Mapping[Dim, int], recomputed: bool, energy: Energy | None = None):
    """A layer like this one, in float64, with other sizes or another energy."""
    energy = layer.energy_function if energy is None else energy
    scalars = dict(layer._fixed)
    if recomputed:
        scalars |= _defaults(layer, sizes)
    learned = {scalar: layer.scalars[scalar.name] for scalar in layer._learned}
    ordered = {s: (scalars | learned)[s] for s in energy.scalars}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        found = type(layer)(energy, sizes, ordered, **layer.options())
    found = found.double()
    own = dict(layer.named_parameters())
    for name, parameter in found.named_parameters():
        if name in own and parameter.shape == own[name].shape:
            parameter.data.copy_(own[name])
    return found


def _gained(layer, size: Dim):
    """The layer, in float64, with a number for each row of a size, 1 for all, which does what it did."""
    name = gain_name(size)
    if name in dict(layer.named_parameters()):
        return layer
    found = _built(layer, layer._sizes, False, with_gain(layer.energy_function, size))
    getattr(found, name).data.fill_(1.0)
    return found


def _defaults(layer, sizes: Mapping[Dim, int]) -> dict:
    """The fixed scalars that are at a default which the sizes change, at its new value."""
    found = {}
    for scalar, value in layer._fixed.items():
        default = scalar.default
        if default is not None and default.free_symbols:
            before, after = (float(default.xreplace(dict(s))) for s in (layer._sizes, sizes))
            if value == before != after:
                found[scalar] = after
    return found


class _Step:
    """One size grown: the layer in float64, its record, and the axes that grew."""

    def __init__(self, layer, size, new, rule, spreads, noise, generator, known) -> None:
        energy, old = layer.energy_function, int(layer._sizes[size])
        if rule == "gain":
            layer, spreads = _gained(layer, size), {**spreads, gain_name(size): 1.0}
            energy = layer.energy_function
        self.where = f"layer `{energy.name}` cannot grow `{size}` from {old} to {new}"
        sizes = dict(layer._sizes) | {size: new}
        trial = self._trial(layer, size, new, spreads, generator)
        self.axes = trial.axes
        key = (energy.name, str(size), old, new, rule)
        found = None
        if key in known and known[key].recomputed in trial.new:
            change = trial.change(known[key])
            if change <= EXACT or rule == "random":
                found = trial.finding(known[key], change)
        if found is None or not found.alive:
            found, dead, least = trial.search(rule)
            if found is None:
                raise ValueError(self._refusal(layer, size, new, rule, spreads, trial, dead, least))
        self.layer = trial.write(found.recipe)
        if noise:
            self._disturb(noise, spreads, generator)
        probe = Probe(layer)
        change = difference(probe.output(self.layer), probe.output(layer))
        scalars = {
            scalar.name: self.layer.scalars[scalar.name]
            for scalar in layer._fixed
            if scalar.default is not None and size in scalar.default.free_symbols
        }
        self.record = Growth(
            energy=energy.name,
            size=str(size),
            old=old,
            new=int(sizes[size]),
            rule=rule,
            rows={n: _words(kind, spreads[n]) for n, kind in found.recipe.kinds.items()},
            scalars=scalars,
            change=change,
            gradient=found.gradient,
            later=found.later,
            symmetric=found.symmetric and not noise,
            recipe=found.recipe,
        )

    @staticmethod
    def _trial(layer, size, new, spreads, generator) -> Trial:
        energy, before = layer.energy_function, dict(layer._sizes)
        sizes = before | {size: new}
        rows, axes = rows_of(energy, size, int(before[size]), new), {}
        for parameter in energy.parameters:
            if not any(length.has(size) for length in parameter.shape):
                continue
            parts = factors(energy, parameter, size)
            axes[str(parameter.name)] = Axes(
                rows,
                tuple(width_of(part, before) for part in parts),
                tuple(width_of(part, sizes) for part in parts),
                tuple(axis for axis, part in enumerate(parts) if part == size),
                tuple(width_of(length, sizes) for length in parameter.shape),
            )
        built = {False: _built(layer, sizes, False)}
        if _defaults(layer, sizes):
            built[True] = _built(layer, sizes, True)
        return Trial(layer, built, axes, spreads, generator, gain_name(size))

    def _disturb(self, noise, spreads, generator) -> None:
        for name, its in self.axes.items():
            draw = torch.randn(its.shape, generator=generator, dtype=torch.float64)
            getattr(self.layer, name).data += noise * spreads[name] * its.fresh * draw

    def _refusal(self, layer, size, new, rule, spreads, trial, dead, least) -> str:
        """Why a rule fails, in one sentence, with something that does not."""
        start = f"{self.where} by rule={rule!r}: "
        if dead and "zero" not in dead[0].recipe.kinds.values():
            return f"{start}no new row ever receives a gradient, since nothing reads them; leave it out"
        if dead:
            shut = " and ".join(n for n, kind in dead[0].recipe.kinds.items() if kind == "zero")
            why = (
                f"with zeros in the new rows of {shut} the update stays, but no new row ever receives a gradient"
                " (a dead point)"
            )
        elif least == float("inf"):
            why = "it needs at least as many new rows as the rank of the old ones"
        else:
            why = f"every choice of new rows changes the update, by {least:.1g} of it at least"
        works = [other for other in RULES[:3] if other != rule and trial.search(other)[0]]
        advice = f"rule={works[0]!r}" if works else "rule='random'"
        old = int(layer._sizes[size])
        many = -(-new // old) * old
        if not works and many != new:
            wider = self._trial(layer, size, many, spreads, None)
            tried = dict.fromkeys((rule, "frozen", "duplicate"))
            works = [other for other in tried if wider.search(other)[0]]
            advice = f"{size}={many}, rule={works[0]!r}" if works else advice
        if not works:
            try:
                gained = _gained(layer, size)
                spreads = {**spreads, gain_name(size): 1.0}
                works = [self._trial(gained, size, new, spreads, None).search("gain")[0]]
                advice = "rule='gain'" if works[0] else advice
            except ValueError:
                pass
        return f"{start}{why}; type `{advice}`{'' if any(works) else ', which changes it'}"


def _words(kind: str | float, spread: float) -> str:
    """What new rows are, for a person."""
    if kind == "zero" or spread == 0:
        return "0"
    if isinstance(kind, float):
        root = "" if kind == 1 else f"^1/{1 / kind:.0f}" if kind else ""
        return f"copies, of k all over k{root}" if kind else "copies"
    return f"random, std {spread:.3g}" if kind == "random" else "matched to the old ones"
