"""Sizes that make two models equal: as many parameters, or as many operations a token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache

import torch

from .data import Data
from .run import set_value
from .throughput import flops_per_token
from .training import build, configure

TOLERANCE = 0.01
KINDS = ("parameters", "flops")


def count(model: str | dict, data: dict, kind: str) -> float:
    """Parameters of a model (tied ones once), or operations a token of its training.

    Parameters are counted without memory; operations by running the model on one sequence.

    Args:
        model, data: of a :class:`~cem.lm.run.Run`.
        kind: ``"parameters"`` or ``"flops"``, see :func:`cem.lm.throughput.flops_per_token`.
    """
    prepared = Data(**data).prepare()
    if kind == "flops":
        return flops_per_token(build(model, prepared.tokenizer), prepared.train[0])
    with torch.device("meta"):
        built = build(model, prepared.tokenizer)
    return sum(p.numel() for p in built.parameters() if p.requires_grad)


def places(config, size: str) -> list[str]:
    """Where a configuration says a size: in a field of its own, or in the parts of its blocks.

    >>> from cem.lm.presets import preset
    >>> places(preset("tiny"), "hidden"), places(preset("llama-tiny"), "intermediate_size")
    (['block.1.hidden'], ['intermediate_size'])
    """
    if "." in size or isinstance(getattr(config, size, None), int):
        return [size]
    if getattr(config, "layers", None):
        rows = [(f"layers.{i}", parts) for i, parts in enumerate(config.layers)]
    else:
        rows = [("block", getattr(config, "block", None) or [])]

    def said(row: str, parts: list) -> Iterator[str]:
        for i, part in enumerate(parts):
            if size in part:
                yield f"{row}.{i}.{size}"
            yield from said(f"{row}.{i}.parts", part.get("parts", []))

    return [place for row, parts in rows for place in said(row, parts)]


def resized(model: str | dict, config, size: str, value: int) -> dict:
    """The ``model`` of a run with another size, wherever its configuration says that size.

    >>> from cem.lm.presets import preset
    >>> resized("tied-tiny", preset("tied-tiny"), "hidden", 96)["block"][1]
    {'energy': 'gated_silu', 'hidden': 96}
    """
    said = {"preset": model} if isinstance(model, str) else deepcopy(model)
    for place in places(config, size):
        field = place.partition(".")[0]
        if field != place and field not in said:
            said[field] = deepcopy(getattr(config, field))
        set_value(said, place, value)
    return said


def nearest_size(counted: Callable[[int], float], start: int, target: float) -> int:
    """The size from 1 at which a count that grows with it comes nearest to a target.

    Interpolation inside a bracket, which for a count that is affine in the size, as parameters and
    operations nearly are, takes four counts or so; every other step halves, whatever the count. A
    size that is a multiple of 8 stays one where that keeps the count within 1 % of the target.

    >>> nearest_size(lambda n: 100 + 7 * n, 8, 460.0)
    51
    >>> nearest_size(lambda n: 7 * n, 8, 7.0 * 795)
    792
    """
    counted = cache(counted)
    low = high = start
    while counted(high) < target:
        low, high = high, 2 * high
        if counted(high) <= counted(low):
            break
    while counted(low) > target and low > 1:
        low, high = low // 2, low
    halve = False
    while high - low > 1:
        share = (target - counted(low)) / max(counted(high) - counted(low), 1e-9)
        middle = (low + high) // 2 if halve else round(low + share * (high - low))
        middle = min(max(middle, low + 1), high - 1)
        low, high = (middle, high) if counted(middle) <= target else (low, middle)
        halve = not halve
    best = min((low, high), key=lambda size: abs(counted(size) - target))
    round_one = 8 * max(1, round(best / 8))
    if start % 8 == 0 and abs(counted(round_one) / target - 1) <= TOLERANCE:
        return round_one
    return best


def equalised(
    model: str | dict, reference: str | dict, data: dict, size: str | None, kind: str
) -> str | dict:
    """The model with one size changed so that it equals the reference within 1 %.

    A model that is within 1 % already stays as it is. Otherwise the size is set to
    :func:`nearest_size`, to the same value wherever the configuration says it: ``hidden`` and
    ``heads`` are those of all parts of the blocks that say them, ``intermediate_size`` is the field
    of a Llama configuration, and ``block.1.hidden`` is one place.

    Args:
        model, reference, data: of the two runs; the data are theirs both.
        size: the name of the size, or None to change nothing.
        kind: what must be equal, ``"parameters"`` or ``"flops"``.

    Raises:
        ValueError: the model has no such size, or no value of it comes within 1 %.
    """
    texts = (json.dumps(part, sort_keys=True) for part in (model, reference, data))
    return json.loads(_equalised(*texts, size, kind))


@cache
def _equalised(model: str, reference: str, data: str, size: str | None, kind: str) -> str:
    model, reference, data = map(json.loads, (model, reference, data))
    target = count(reference, data, kind)
    ratio = count(model, data, kind) / target
    if abs(ratio - 1) <= TOLERANCE:
        return json.dumps(model)
    if size is None:
        raise ValueError(
            f"a side does not have the {kind} of the reference: got {ratio:.3f} times as many; "
            "name the size that may change, as in `scale: {SIDE: hidden}`"
        )
    config = configure(model, Data(**data).prepare().tokenizer)
    found = places(config, size)
    start = _value(config, found[0]) if found else None
    if not isinstance(start, int):
        raise ValueError(
            f"no part of the model says a size `{size}`: got {config.to_diff_dict()}; "
            "write it there, or scale another"
        )

    def counted(value: int) -> float:
        return count(resized(model, config, size, value), data, kind)

    best = nearest_size(counted, start, target)
    if abs(counted(best) / target - 1) > TOLERANCE:
        raise ValueError(
            f"`{size}` cannot make the {kind} equal within {TOLERANCE:.0%}: got "
            f"{counted(best) / target:.3f} times as many at {best}; scale a finer one, such as `hidden`"
        )
    return json.dumps(resized(model, config, size, best))


def _value(config, place: str):
    """What a configuration holds at a dotted name; None where there is nothing."""
    value = config.to_dict()
    for key in place.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value.get(key)
        except (AttributeError, IndexError, ValueError):
            return None
    return value
