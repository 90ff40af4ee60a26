"""trace: the energy of every token before and after every step of every energy layer.

Legend: B batch, T tokens, D dim, N steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .descent import LayerObjective
from .layer import EnergyLayer


@dataclass(frozen=True)
class LayerTrace:
    """What one call of one energy layer did to the energies of its tokens.

    Attributes:
        name: the path of the layer in the model, such as ``"blocks.0.attention"``.
        energy_name: the name of its energy.
        before: energies before each step, shape (N, B, T), at the context and the gates that the step saw.
        after: energies after each step at the same context and gates, or None if they were not asked for.
        states: what the energy read, norm(h), before each step and after the last, (N + 1, B, T, D), or None.
    """

    name: str
    energy_name: str
    before: Tensor
    after: Tensor | None
    states: Tensor | None
    _call: dict = field(repr=False)

    @property
    def drop(self) -> Tensor:
        """before - after, shape (N, B, T): positive where a step went down."""
        if self.after is None:
            raise ValueError(
                f"trace of layer `{self.name}` has no energies after each step: got after=False; type"
                " `cem.trace(model, x)`"
            )
        return self.before - self.after

    @property
    def share_down(self) -> float:
        """The share of tokens whose energy did not rise in any step, between 0 and 1."""
        return float((self.drop >= 0).all(0).double().mean())

    def energy_at(self, points: Tensor, *, batch: int = 0, token: int = -1) -> Tensor:
        """The energies of one token at other states, as the energy reads them (after the norm).

        Args:
            points: shape (P, D).
            batch, token: which token; its context and gates stay those of the first step.

        Returns:
            energies, shape (P,).
        """
        layer, call = self._call["layer"], self._call
        batch = range(len(call["frozen"]))[batch]
        g, seen = call["frozen"][batch : batch + 1], call["seen"]
        token = range(g.shape[1])[token]
        if seen.x is not None:
            T, S = g.shape[1], seen.x.shape[1]
            visible = seen.visible
            if visible is None:
                visible = torch.ones(T, S, dtype=torch.bool, device=g.device)
                visible = (visible.tril() if seen.causal else visible)[None, None]
            visible = _of_sequence(visible, batch)[:, :, token, None].expand(1, 1, len(points), S)
            seen = seen._replace(
                x=seen.x[batch : batch + 1], visible=visible, causal=False, ordered=False
            )
        if seen.position is not None:
            own = _of_sequence(seen.position, batch)[:, token, None].expand(1, len(points))
            others = _of_sequence(seen.context_position, batch)
            seen = seen._replace(position=own, context_position=others)
        frozen = g[:, token : token + 1].expand(1, *points.shape)
        with torch.no_grad():
            inputs = (points[None].to(g), frozen, *seen, *layer.values())
            return layer.lowering.energy(*inputs)[0]


def _of_sequence(tensor: Tensor, batch: int) -> Tensor:
    """The row of one sequence, with its batch axis; one row serves all."""
    return tensor[batch : batch + 1] if tensor.shape[0] > 1 else tensor


@dataclass(frozen=True)
class EnergyTrace:
    """The traces of all energy layers that a model called, in the order of the calls.

    ``context`` says at which context every energy was taken.
    """

    layers: tuple[LayerTrace, ...]
    context: str = "fixed, as before the step"

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerTrace]:
        return iter(self.layers)

    def __getitem__(self, key: int | str) -> LayerTrace:
        if isinstance(key, int):
            return self.layers[key]
        for layer in self.layers:
            if layer.name == key:
                return layer
        raise KeyError(
            f"no layer `{key}` in this trace: its layers are {', '.join(t.name for t in self.layers)}"
        )

    def numpy(self) -> dict[str, dict]:
        """Energies as numpy arrays: layer name -> ``{"before": (N, B, T), "after": (N, B, T)}``.

        The second call of one layer is found under its name with ``#2``.
        """
        found: dict[str, dict] = {}
        for layer in self.layers:
            calls = sum(name.split("#")[0] == layer.name for name in found)
            name = f"{layer.name}#{calls + 1}" if calls else layer.name
            found[name] = {"before": _array(layer.before), "after": _array(layer.after)}
        return found

    def table(self) -> str:
        """One line a layer and step: mean energies, median drop, share of tokens that went down."""
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [
            f"{'layer':<{width}}  step  {'before':>10}  {'after':>10}  {'median drop':>12}  down"
        ]
        for layer in self.layers:
            for step, before in enumerate(layer.before):
                line = f"{layer.name:<{width}}  {step + 1:>4}  {before.nanmean():>10.4g}"
                if layer.after is not None:
                    drop = (before - layer.after[step]).flatten()
                    share = (drop >= 0).double().mean()
                    after = layer.after[step].nanmean()
                    line += f"  {after:>10.4g}  {drop.nanmedian():>12.4g}  {share:>4.0%}"
                lines.append(line)
        return "\n".join(lines)

    def plot(self, *, ax=None):
        """The energy drop per layer and step; see :func:`cem.plot.descent`."""
        from . import plot

        return plot.descent(self, ax=ax)


def _array(energies: Tensor | None):
    """A numpy array; numpy has no bfloat16."""
    if energies is None:
        return None
    return energies.cpu().to(torch.promote_types(energies.dtype, torch.float32)).numpy()


@dataclass
class _Recording:
    """The energies and states of one call, as its steps are taken."""

    layer: EnergyLayer
    name: str
    after: bool
    first: LayerObjective
    last: tuple[_Recorded, Tensor] | None = None
    before: list[Tensor] = field(default_factory=list)
    later: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def finish(self, states: bool) -> LayerTrace:
        """The trace of the call, after its last step."""
        objective, h = self.last
        g = self.layer.norm(h)
        if self.after and not self.later:
            # At a fixed context and fixed gates the energy after a step is the energy before the next.
            self.later = [*self.before[1:], objective.energy_at(g)]
        return LayerTrace(
            self.name,
            self.layer.energy_function.name,
            torch.stack(self.before),
            torch.stack(self.later) if self.after else None,
            torch.stack([*self.states, g]) if states else None,
            {"layer": self.layer, "frozen": self.first.frozen, "seen": self.first.seen},
        )


class _Recorded(LayerObjective):
    """An objective that writes down the energies before and after its step."""

    recording: _Recording
    start: Tensor | None = None

    def at(self, h: Tensor, step: int) -> LayerObjective:
        found = super().at(h, step)
        found.recording = self.recording
        return found

    def gradient(self, g: Tensor) -> Tensor:
        gradient, energy = self.layer.lowering.gradient_and_energy(g, *self.around)
        if g is self.g:
            self.start = energy
        return gradient

    def energy_at(self, g: Tensor) -> Tensor:
        """Energies (B, T) at what the energy reads."""
        return self.layer.lowering.energy(g, *self.around)

    def taken(self, before: Tensor, after: Tensor) -> None:
        record = self.recording
        record.before.append(self.energy_at(self.g) if self.start is None else self.start)
        record.states.append(self.g)
        record.last = self, after
        if record.after and (self.layer.moving or self.layer.refresh == "step"):
            record.later.append(self.energy_at(self.layer.norm(after)))


def _record(layer: EnergyLayer, name: str, records: list[_Recording], after: bool):
    """A stand-in for the layer's ``begin`` whose objective also writes down energies."""

    def begin(h: Tensor, **inputs):
        if inputs.pop("cache", None) is not None:
            raise ValueError(
                f"`trace` sees whole sequences: layer `{name}` was called with a cache; call the model without it"
            )
        lowering = layer.lowering
        dense = lowering.gradient_and_energy.needs_mask or lowering.energy.needs_mask
        h, first = type(layer).begin(layer, h, dense=dense, kind=_Recorded, **inputs)
        first.recording = _Recording(layer, name, after, first)
        records.append(first.recording)
        return h, first

    return begin


def trace(
    model: nn.Module, *inputs, after: bool = True, states: bool = True, **keywords
) -> EnergyTrace:
    """Run a model once and record the energies of all its energy layers.

    Every energy is taken at the context and the gates that the step itself saw, before and after it, so that a
    drop is what the step achieved and not what other tokens did meanwhile. With momentum, or a point ahead, these
    are the energies of the states themselves, and a step may go up. For ``Proximal`` it is the smooth energy E,
    without the r whose prox is taken, which E may rise to pay for. The model runs under ``torch.no_grad``;
    attention energies come from the kernel's own log-sum-exp.

    Args:
        model: any module that contains energy layers, or one energy layer.
        *inputs, **keywords: what to call it with.
        after: also take energies after each step, which costs one more pass over the scores.
        states: keep the states, which :func:`cem.plot.landscape` needs.

    Raises:
        ValueError: the model has no energy layer, or calls none.

    >>> import torch, cem
    >>> from cem.energies import interaction
    >>> layer = cem.derive(interaction, dim=16, heads=2, rank=8)
    >>> found = cem.trace(layer, torch.randn(1, 5, 16))
    >>> found[0].before.shape, bool((found[0].drop > -1e-5).all())
    (torch.Size([1, 1, 5]), True)
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, EnergyLayer)}
    if not layers:
        raise ValueError(
            f"`trace` found no energy layer in {type(model).__name__}: make one with `cem.derive(energy, ...)`"
        )
    records: list[_Recording] = []
    found: list[LayerTrace] = []

    def finish(*_) -> None:
        # At once: FSDP keeps the parameters of a block whole only while the block runs.
        found.append(records.pop().finish(states))

    with ExitStack() as restore, torch.no_grad():
        for name, layer in layers.items():
            layer.begin = _record(layer, name or layer.energy_function.name, records, after)
            restore.callback(layer.__dict__.pop, "begin")
            restore.callback(layer.register_forward_hook(finish).remove)
        model(*inputs, **keywords)
        # A module such as `FixedPoint` takes the steps of its layer without calling it.
        found.extend(record.finish(states) for record in records)
    if not found:
        raise ValueError(
            f"`trace` saw no energy layer run: {type(model).__name__} has {', '.join(layers)}"
        )
    return EnergyTrace(tuple(found))
