"""Peak memory of one forward and backward pass, each point in a process of its own.

As a program it prints the bytes of one point: ``python -m benchmarks.memory fused 512 '{...}'``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from .cases import backward, interaction_as
from .settings import Settings

ROOT = Path(__file__).resolve().parents[1]


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no `{field}`")


def _reset_peak() -> bool:
    """Set the peak of resident memory to what is resident now; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return _status("VmHWM") <= _status("VmRSS") + 2**20


def peak_bytes(kind: str, seq: int, settings: Settings) -> int:
    """How far memory rises above inputs and parameters in one forward and backward pass."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    where = {"device": settings.device, "dtype": settings.torch_dtype}
    layer = interaction_as(kind, settings).to(**where)
    h = torch.randn(settings.batch, seq, settings.dim, **where, requires_grad=True)
    weights = torch.randn_like(h)
    # Libraries that load lazily are loaded by a short pass.
    backward(layer, h.detach()[:, :4].clone().requires_grad_(), weights[:, :4].clone())
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        backward(layer, h, weights)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if _reset_peak():
        before = _status("VmRSS")
        backward(layer, h, weights)
        return _status("VmHWM") - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backward(layer, h, weights)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def fresh_peak(kind: str, seq: int, settings: Settings) -> int:
    """``peak_bytes`` in a process of its own."""
    options = json.dumps(dataclasses.asdict(settings))
    command = [sys.executable, "-m", "benchmarks.memory", kind, str(seq), options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"peak memory of {kind} at T = {seq}: {done.stderr[-2000:]}")
    return max(1, int(done.stdout))


def exponent(points: dict[int, float]) -> float:
    """The slope of log(value) against log(T) by least squares."""
    pairs = [(math.log(seq), math.log(value)) for seq, value in points.items()]
    x, y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return sum((a - x) * (b - y) for a, b in pairs) / sum((a - x) ** 2 for a, _ in pairs)


if __name__ == "__main__":
    print(peak_bytes(sys.argv[1], int(sys.argv[2]), Settings(**json.loads(sys.argv[3]))))
