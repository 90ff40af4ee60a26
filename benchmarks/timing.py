"""Interleaved timing of two functions, for machines that others use as well."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .settings import Settings


@dataclass(frozen=True)
class Pair:
    """Seconds a call of two functions, one entry a round, and the same in time of the processor.

    On a shared machine the wall clock also counts what others run meanwhile; the time of the
    processor counts this process alone. It is empty on a GPU.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]
    first_cpu: tuple[float, ...] = ()
    second_cpu: tuple[float, ...] = ()

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.first), statistics.median(self.second)

    @property
    def ratio_of_medians(self) -> float:
        first, second = self.medians
        return first / second

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratio within each round, whose two samples were taken next to each other."""
        return tuple(a / b for a, b in zip(self.first, self.second, strict=True))

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def cpu_ratio(self) -> float | None:
        """The median of the ratios of the rounds in time of the processor."""
        if not self.first_cpu:
            return None
        pairs = zip(self.first_cpu, self.second_cpu, strict=True)
        return statistics.median(a / b for a, b in pairs)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the ratios of the rounds."""
        return quartiles(self.ratios)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; a single value twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def sample(function: Callable[[], object], repeat: int, device: str) -> tuple[float, float]:
    """Seconds a call over ``repeat`` calls: by the wall clock, and of the processor.

    On a GPU: between two events, until the last kernel is done.
    """
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeat):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeat, 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeat):
        function()
    return (time.perf_counter() - wall) / repeat, (time.process_time() - cpu) / repeat


def interleave(first: Callable, second: Callable, settings: Settings) -> Pair:
    """Time two functions in alternation: AB, BA, AB, ..., after a warm-up that is thrown away."""
    device = settings.device
    for function in (first, second):
        function()
    quickest = min(sample(function, 1, device)[0] for function in (first, second, first, second))
    repeat = max(1, min(1000, math.ceil(settings.sample / quickest)))
    wall: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    gc.disable()
    try:
        for done in range(settings.rounds):
            late = time.perf_counter() - started > settings.seconds
            if late and done >= settings.least_rounds:
                break
            for side in (0, 1) if done % 2 == 0 else (1, 0):
                seconds, own = sample((first, second)[side], repeat, device)
                wall[side].append(seconds)
                cpu[side].append(own)
    finally:
        gc.enable()
    kept = () if device.startswith("cuda") else (tuple(cpu[0]), tuple(cpu[1]))
    return Pair(tuple(wall[0]), tuple(wall[1]), *kept)
