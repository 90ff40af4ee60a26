"""How many operations training takes, and how many the device can do."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Dense matrix products in bfloat16, operations a second, from the makers' data sheets.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def flops_per_token(model: nn.Module, item: dict) -> float:
    """Operations of one forward and backward pass over one sequence, divided by its tokens.

    ``torch.utils.flop_counter`` counts what runs: every matrix product, a multiplication and an
    addition as two, of the forward and of the backward pass; attention as full T x T scores, the
    half above the diagonal included, as is usual. Not counted are element-wise operations, lookups,
    the optimizer, and what activation checkpointing computes again. The pass leaves no gradients
    and no trace in the random numbers.

    Args:
        model: called with the item as keywords, returns an output with ``loss``.
        item: one sequence, tensors (T,).
    """
    device = next(model.parameters()).device
    batch = {name: value[None].to(device) for name, value in item.items()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
    model.zero_grad()
    return counter.get_total_flops() / batch["input_ids"].shape[1]


@cache
def peak_flops(device: str, dtype: torch.dtype) -> float:
    """The most operations a second that matrix products do on a device in a dtype.

    For bfloat16 on a known GPU it is the data sheet's number, for everything else that of the
    fastest of a few square products on the device, with the threads that torch has.
    """
    if device == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name()
        for part, peak in _PEAKS.items():
            if part in name:
                return peak
    size = 8192 if device == "cuda" else 512
    a, b = torch.ones(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
