"""The five sections of a run, each a generator of rows."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

import cem

from . import cold
from .cases import (
    CASES,
    backward,
    gated_layer,
    interaction_as,
    interaction_layer,
    largest_difference,
)
from .memory import exponent, fresh_peak
from .report import Row, of_pair
from .settings import Settings
from .timing import interleave, quartiles

HAND_WRITTEN = 1.05
AUTOGRAD = 5.0
LINEAR = 1.2
TRACE_BEFORE, TRACE_BOTH = 1.2, 2.2
DERIVE_MS, IMPORT_S = 50.0, 0.3

MIB = 2**20


def inputs(settings: Settings, seq: int):
    torch.manual_seed(settings.seed)
    kind = {"device": settings.device, "dtype": settings.torch_dtype}
    h = torch.randn(settings.batch, seq, settings.dim, **kind)
    return h, h.clone().requires_grad_(), torch.randn_like(h)


def _ready(settings: Settings, *modules: nn.Module) -> list[Callable]:
    """The modules as they are, or compiled for the shapes of the next call alone."""
    if not settings.compile:
        return list(modules)
    torch.compiler.reset()
    return [torch.compile(module, dynamic=False) for module in modules]


def _without_gradients(module: Callable, h: torch.Tensor) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return module(h)

    return run


def speed(settings: Settings) -> Iterator[Row]:
    """Derived layers against hand-written ones, after a check that both compute the same."""
    title = "Time of the derived layer / hand-written layer"
    for case in CASES:
        yield from against_twin(title, case, settings.seqs, settings, HAND_WRITTEN)
    # The same module twice: how far from 1 the method itself strays on this machine.
    seq = settings.seqs[-1]
    case = CASES[-1]
    written = case.write(case.derive(settings).to(settings.device, settings.torch_dtype))
    sides = _ready(settings, written, copy.deepcopy(written))
    yield from both_modes(title, f"control: {case.twin} / itself", *sides, seq, settings)


def against_twin(title, case, seqs, settings, most) -> Iterator[Row]:
    difference = largest_difference(case, settings)
    if not difference < 1e-12:
        what = f"`{case.name}` and its twin differ by {difference:.1e} in float64"
        raise AssertionError(what)
    torch.manual_seed(settings.seed)
    layer = case.derive(settings).to(settings.device, settings.torch_dtype)
    written = case.write(layer)
    for seq in seqs:
        ours, theirs = _ready(settings, layer, written)
        what = f"{case.name} / {case.twin}"
        yield from both_modes(title, what, ours, theirs, seq, settings, most)


def both_modes(title, what, ours, theirs, seq, settings, most=None) -> Iterator[Row]:
    h, moving, weights = inputs(settings, seq)
    pair = interleave(_without_gradients(ours, h), _without_gradients(theirs, h), settings)
    yield of_pair(title, f"{what}, T={seq}, forward", pair, most=most)
    pair = interleave(
        lambda: backward(ours, moving, weights), lambda: backward(theirs, moving, weights), settings
    )
    yield of_pair(title, f"{what}, T={seq}, forward and backward", pair, most=most)


def autograd(settings: Settings) -> Iterator[Row]:
    """The closed form against autograd of the same energy, on the same parameters."""
    title = "Time of autograd of the energy / derived layer"
    fused = interaction_as("fused", settings).to(settings.device, settings.torch_dtype)
    names = {
        "autograd": ("interaction, autograd of all tokens", settings.autograd_seqs, AUTOGRAD),
        "vmap": ('interaction, `lowering="autograd"`', settings.vmap_seqs, None),
    }
    for kind, (name, seqs, bar) in names.items():
        reference = interaction_as(kind, settings).to(settings.device, settings.torch_dtype)
        for mine, other in zip(fused.parameters(), reference.parameters(), strict=True):
            other.data.copy_(mine.data)
        for seq in seqs:
            forward, training = both_modes(title, name, reference, fused, seq, settings)
            yield from (forward, replace(training, least=bar if seq == seqs[-1] else None))


def memory(settings: Settings) -> Iterator[Row]:
    """How the peak memory of a forward and backward pass grows with the number of tokens."""
    title = "Exponent of T in the peak memory, forward and backward"
    names = {
        "fused": "derived",
        "autograd": "autograd of all tokens",
        "vmap": '`lowering="autograd"`',
    }
    wanted = (
        ("fused", settings.fused_memory, LINEAR),
        ("autograd", settings.autograd_memory, None),
        ("vmap", settings.vmap_memory, None),
    )
    for kind, seqs, most in wanted:
        points = {seq: fresh_peak(kind, seq, settings) for seq in seqs}
        listed = ", ".join(f"{value / MIB:.0f}" for value in points.values())
        yield Row(
            title,
            f"interaction, {names[kind]}, T={', '.join(map(str, seqs))}",
            exponent(points),
            unit="",
            most=most,
            medians=f"{listed} MiB",
            detail={"bytes": points},
        )


def trace(settings: Settings) -> Iterator[Row]:
    """Recording energies against the forward pass alone."""
    title = "Time of cem.trace / forward pass"
    interaction = interaction_layer(settings)
    models = {
        "interaction": interaction,
        "interaction, then gated": nn.Sequential(interaction, gated_layer(settings)),
    }
    for name, model in models.items():
        model = model.to(settings.device, settings.torch_dtype)
        for seq in settings.trace_seqs:
            h, _, _ = inputs(settings, seq)
            plain = _without_gradients(model, h)

            def before(model=model, h=h):
                return cem.trace(model, h, after=False, states=False)

            def both(model=model, h=h):
                return cem.trace(model, h)

            pair = interleave(before, plain, settings)
            yield of_pair(title, f"{name}, T={seq}, energies before", pair, most=TRACE_BEFORE)
            pair = interleave(both, plain, settings)
            yield of_pair(title, f"{name}, T={seq}, before and after", pair, most=TRACE_BOTH)


def start(settings: Settings) -> Iterator[Row]:
    """What a fresh process pays: the import, and the first derive of each gallery energy."""
    title = "Fresh process"
    found = cold.import_times(settings)
    base, both, own, cpu = map(statistics.median, found.values())
    low, high = quartiles(found["cem"])
    yield Row(
        title,
        "`import cem` after torch and sympy",
        own,
        unit="s",
        most=IMPORT_S,
        spread=f"{low:.3f} to {high:.3f}, n={len(found['cem'])}",
        cpu=f"{cpu:.3f} s",
        medians=f"{both:.2f} s with cem, {base:.2f} s torch and sympy alone",
        detail=found,
    )
    for name in settings.energies or cold.gallery():
        found = cold.derive_times(name, settings)
        first, cpu, second = (1000 * statistics.median(times) for times in found.values())
        low, high = quartiles(found["first"])
        yield Row(
            title,
            f"first `derive({name})`",
            first,
            unit="ms",
            most=DERIVE_MS,
            spread=f"{low * 1000:.1f} to {high * 1000:.1f}, n={len(found['first'])}",
            cpu=f"{cpu:.1f} ms",
            medians=f"second derive {second:.1f} ms",
            detail=found,
        )


SECTIONS = {"speed": speed, "autograd": autograd, "memory": memory, "trace": trace, "cold": start}
