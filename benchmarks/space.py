"""Time points of the design space against each other: ``python -m benchmarks.space``; see README.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import cem

from . import counts, layers
from .cases import (
    ROTARY,
    backward,
    diagonal_layer,
    interaction_as,
    interaction_layer,
    rotary_layer,
)
from .handwritten import CachedAttention, SpanAttention, TiedAttention
from .measures import HAND_WRITTEN, LINEAR, MIB, against_twin, both_modes, inputs
from .memory import exponent, fresh_peak
from .report import Row, of_pair
from .settings import Settings
from .timing import interleave, quartiles, sample

COUNTED = 0.10
AS_WIDE = 1.1
RECURSION = 0.03
LINEAR_TIME = 1.15
DECODE = 1.3
PACKED = 2.0
ROTARY_TIME = 1.03

STEPS = 4
DOCUMENT = 300
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

    The bar is what the loop over h counts; steps in the span of the queries count fewer. Both written by hand show
    what either saves with these kernels, in which a multiplication of attention takes longer than one of a projection.
    """
    title = f"Time of interaction with steps={STEPS} / {STEPS} layers of one step"
    where = {"device": settings.device, "dtype": settings.torch_dtype}
    ours = interaction_layer(settings, steps=STEPS).to(**where)
    stack = nn.Sequential(*(interaction_layer(settings) for _ in range(STEPS))).to(**where)
    stack_by_hand = nn.Sequential(*(_written(TiedAttention, layer) for layer in stack))
    loop = _written(TiedAttention, ours, steps=STEPS)
    span = _written(SpanAttention, ours, steps=STEPS)
    for seq in settings.recursion_seqs:
        once = counts.interaction(settings, seq)
        looped = counts.interaction(settings, seq, steps=STEPS)
        spanned = counts.interaction(settings, seq, steps=STEPS, span=True)
        rows = both_modes(title, "interaction", ours, stack, seq, settings)
        for row, mode in zip(rows, ("forward", "training"), strict=True):
            in_h, in_span = (
                getattr(count, mode) / getattr(once, mode) / STEPS for count in (looped, spanned)
            )
            what = f"{row.what}, counted {in_span:.3f}x, the loop over h {in_h:.3f}x"
            yield replace(row, what=what, most=in_h + RECURSION)
        yield from both_modes(title, "the span by hand", span, stack_by_hand, seq, settings)
        yield from both_modes(title, "the loop over h by hand", loop, stack_by_hand, seq, settings)
    title = f"Time of interaction with steps={STEPS} / the same written by hand"
    for seq in settings.recursion_seqs:
        yield from both_modes(title, "interaction", ours, span, seq, settings, HAND_WRITTEN)


def _written(kind: type[TiedAttention], layer: cem.EnergyLayer, **options: int) -> TiedAttention:
    return kind(layer.Q, layer.K, layer.scalars["beta"], **options)


def rotary(settings: Settings) -> Iterator[Row]:
    """Attention that turns queries and keys, and turns back what it reads, against the same by hand."""
    title = "Time of the derived layer / hand-written layer"
    yield from against_twin(title, ROTARY, (settings.space_seq,), settings, ROTARY_TIME)


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


def packed(settings: Settings) -> Iterator[Row]:
    """Packed documents, by a dense mask and by blocks; with the backward pass where blocks have one."""
    title = 'Time of packed documents by a dense mask / by `lowering="flex"`'
    where = {"device": settings.device, "dtype": settings.torch_dtype}
    masked = rotary_layer(settings).to(**where)
    blocks = rotary_layer(settings, lowering="flex").to(**where)
    blocks.load_state_dict(masked.state_dict())
    for seq in settings.packed_seqs:
        h, leaf, weights = inputs(settings, seq)
        seen = {"document_ids": torch.arange(seq, device=settings.device) // DOCUMENT}
        what = f"rotary interaction, documents of {DOCUMENT}, T={seq}"
        with torch.no_grad():
            sides = [partial(layer, h, **seen) for layer in (masked, blocks)]
            one, other = (side() for side in sides)
            pair = interleave(*sides, settings)
        row = of_pair(title, f"{what}, forward", pair, least=PACKED)
        yield replace(row, detail={**row.detail, "difference": (one - other).abs().max().item()})
        if settings.device.startswith("cuda"):
            sides = [partial(backward, layer, leaf, weights, **seen) for layer in (masked, blocks)]
            pair = interleave(*sides, settings)
            yield of_pair(title, f"{what}, forward and backward", pair, least=PACKED)


def decode(settings: Settings) -> Iterator[Row]:
    """One more token, with the derived cache of the tied layer and with a cache of keys and values by hand."""
    for dim, heads in settings.widths:
        sized = replace(settings, dim=dim, heads=heads)
        for context in settings.contexts:
            yield from _decode(sized, context)


def _decode(settings: Settings, context: int) -> Iterator[Row]:
    where = {"device": settings.device, "dtype": settings.torch_dtype}
    tied = interaction_layer(settings).to(**where)
    untied = untied_twin(tied)
    h, *_ = inputs(settings, context + 1)
    before, new = h.split([context, 1], 1)
    cache = tied.init_cache(settings.batch, context + 1)
    untied.init_cache(settings.batch, context + 1)
    with torch.no_grad():
        tied(before, cache=cache)
        untied(before)

    def ours():
        cache.crop(context)
        tied(new, cache=cache)

    def theirs():
        untied.length = context
        untied(new)

    with torch.no_grad():
        pair = interleave(theirs, ours, settings)
    name = f"dim {settings.dim}, {settings.heads} heads, context {context}"
    other, own = (f"{settings.batch / seconds:.0f}" for seconds in pair.medians)
    row = of_pair(
        "Tokens a second of tied attention with its derived cache / untied attention by hand",
        name,
        pair,
        least=DECODE,
    )
    yield replace(row, medians=f"{own} / {other} tokens/s")
    held = untied.keys.nbytes + untied.values.nbytes
    shares = [
        matrices * tied.Q.nbytes / (matrices * tied.Q.nbytes + size)
        for matrices, size in ((3, cache.nbytes), (4, held))
    ]
    yield Row(
        "Bytes of the derived cache / cache of keys and values",
        name,
        cache.nbytes / held,
        least=0.5,
        most=0.5,
        medians=f"{cache.nbytes / MIB:.1f} / {held / MIB:.1f} MiB; matrices are"
        f" {shares[0]:.1%} / {shares[1]:.1%} of the bytes that a token reads",
        detail={"cache": [cache.nbytes, held], "matrices": shares},
    )


def untied_twin(layer: cem.EnergyLayer) -> CachedAttention:
    """Untied attention of the same size, with keys for values and queries for the output at the start."""
    Q, K = (tensor.detach().clone() for tensor in (layer.Q, layer.K))
    return CachedAttention(Q, K, K.clone(), Q.clone(), layer.scalars["beta"])


SECTIONS = {
    "diagonal": diagonal,
    "recursion": recursion,
    "rotary": rotary,
    "linear": linear,
    "packed": packed,
    "decode": decode,
}


def main(argv: list[str] | None = None) -> dict | None:
    return layers.main(argv, "benchmarks.space", SECTIONS)


if __name__ == "__main__":
    main()
