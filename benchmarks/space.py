"""Time points of the design space against each other: ``python -m benchmarks.space``; see README.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

import cem

from . import counts, layers
from .cases import backward, diagonal_layer, interaction_as, interaction_layer
from .handwritten import TiedAttention
from .measures import HAND_WRITTEN, LINEAR, MIB, both_modes, inputs
from .memory import exponent, fresh_peak
from .report import Row, of_pair
from .settings import Settings
from .timing import interleave, quartiles, sample

COUNTED = 0.10
AS_WIDE = 1.1
RECURSION = 0.03
LINEAR_TIME = 1.15

STEPS = 4
LINEAR_ENERGIES = ("squared_interaction", "gated_linear_attention")


def _training(settings: Settings, one: nn.Module, other: nn.Module, seq: int):
    _, h, weights = inputs(settings, seq)
    return interleave(
        lambda: backward(one, h, weights), lambda: backward(other, h, weights), settings
    )


def diagonal(settings: Settings) -> Iterator[Row]:
    """A diagonal beside the low rank: against the low rank alone, and against a rank as wide as both."""
    title = "Time of diagonal plus low rank / interaction, forward and backward"
    seq, block = settings.space_seq, settings.dim // settings.heads
    wide = settings.rank + block
    ours = diagonal_layer(settings).to(settings.device, settings.torch_dtype)
    mine = counts.interaction(settings, seq, direct=block).training
    for rank in (settings.rank, wide):
        plain = interaction_layer(replace(settings, rank=rank))
        plain.to(settings.device, settings.torch_dtype)
        counted = mine / counts.interaction(settings, seq, rank=rank).training
        what = f"rank {settings.rank} and block {block} / rank {rank}, T={seq}"
        pair = _training(settings, ours, plain, seq)
        bar = {"most": AS_WIDE}
        if rank == settings.rank:
            bar = {"least": counted * (1 - COUNTED), "most": counted * (1 + COUNTED)}
        yield of_pair(title, f"{what}, counted {counted:.3f}x", pair, **bar)


def recursion(settings: Settings) -> Iterator[Row]:
    """Steps that share parameters and context against as many layers that share nothing.

    The same pair written by hand shows what sharing the keys can save with these kernels, in which a
    multiplication of attention takes longer than one of a projection.
    """
    title = f"Time of interaction with steps={STEPS} / {STEPS} layers of one step"
    where = {"device": settings.device, "dtype": settings.torch_dtype}
    ours = interaction_layer(settings, steps=STEPS).to(**where)
    stack = nn.Sequential(*(interaction_layer(settings) for _ in range(STEPS))).to(**where)
    by_hand = _written(ours, STEPS)
    stack_by_hand = nn.Sequential(*map(_written, stack))
    for seq in settings.recursion_seqs:
        once = counts.interaction(settings, seq)
        shared = counts.interaction(settings, seq, steps=STEPS)
        counted = (shared.forward / once.forward / STEPS, shared.training / once.training / STEPS)
        rows = both_modes(title, "interaction", ours, stack, seq, settings)
        for row, ratio in zip(rows, counted, strict=True):
            bar = {"least": ratio - RECURSION, "most": ratio + RECURSION}
            yield replace(row, what=f"{row.what}, counted {ratio:.3f}x", **bar)
        yield from both_modes(title, "both by hand", by_hand, stack_by_hand, seq, settings)
    title = f"Time of interaction with steps={STEPS} / the same written by hand"
    for seq in settings.recursion_seqs:
        yield from both_modes(title, "interaction", ours, by_hand, seq, settings, HAND_WRITTEN)


def _written(layer: cem.EnergyLayer, steps: int = 1) -> TiedAttention:
    return TiedAttention(layer.Q, layer.K, layer.scalars["beta"], steps)


def linear(settings: Settings) -> Iterator[Row]:
    """How time and memory of linear attention grow with T, and its time against softmax attention."""
    seqs = settings.linear_seqs
    listed = ", ".join(map(str, seqs))
    for batch in sorted({1, settings.batch}):
        for name in LINEAR_ENERGIES:
            yield _time_exponent(name, replace(settings, batch=batch))
    for name in LINEAR_ENERGIES:
        points = {seq: fresh_peak(name, seq, settings) for seq in seqs}
        yield Row(
            "Exponent of T in the peak memory of linear attention, forward and backward",
            f"{name}, T={listed}",
            exponent(points),
            unit="",
            most=LINEAR,
            medians=f"{', '.join(f'{value / MIB:.0f}' for value in points.values())} MiB",
            detail={"bytes": points},
        )
    softmax = interaction_layer(settings).to(settings.device, settings.torch_dtype)
    for name in LINEAR_ENERGIES:
        layer = interaction_as(name, settings).to(settings.device, settings.torch_dtype)
        yield of_pair(
            "Time of linear attention / softmax attention, forward and backward",
            f"{name} / interaction, T={settings.softmax_seq}",
            _training(settings, layer, softmax, settings.softmax_seq),
        )


def _time_exponent(name: str, settings: Settings) -> Row:
    """The median over rounds of the exponent of T; a round takes every length once."""
    layer = interaction_as(name, settings).to(settings.device, settings.torch_dtype)
    times = _times(layer, settings.linear_seqs, settings)
    rounds = [dict(zip(times, one, strict=True)) for one in zip(*times.values(), strict=True)]
    slopes = [exponent(one) for one in rounds]
    low, high = quartiles(slopes)
    medians = ", ".join(f"{1000 * statistics.median(one):.0f}" for one in times.values())
    return Row(
        "Exponent of T in the time of linear attention, forward and backward",
        f"{name}, batch {settings.batch}, T={', '.join(map(str, times))}",
        statistics.median(slopes),
        unit="",
        most=LINEAR_TIME,
        spread=f"{low:.3f} to {high:.3f}, n={len(slopes)}",
        medians=f"{medians} ms",
        detail={"seconds": times},
    )


def _times(layer: nn.Module, seqs: tuple[int, ...], settings: Settings) -> dict[int, list[float]]:
    """Seconds of a forward and backward pass, one entry a round; a round takes every length once."""
    calls = {}
    for seq in seqs:
        _, h, weights = inputs(settings, seq)
        calls[seq] = lambda h=h, weights=weights: backward(layer, h, weights)
    found: dict[int, list[float]] = {seq: [] for seq in seqs}
    spent = 0.0
    for done in range(-1, settings.rounds):
        if spent > settings.seconds and done >= settings.least_rounds:
            break
        for seq in seqs if done % 2 == 0 else reversed(seqs):
            seconds, _ = sample(calls[seq], 1, settings.device)
            if done >= 0:  # the first round warms up
                found[seq].append(seconds)
                spent += seconds
    return found


SECTIONS = {"diagonal": diagonal, "recursion": recursion, "linear": linear}


def main(argv: list[str] | None = None) -> dict | None:
    return layers.main(argv, "benchmarks.space", SECTIONS)


if __name__ == "__main__":
    main()
