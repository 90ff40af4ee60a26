"""Definitions of five lines of the kernels of emitted programs, and the checks that their tests share."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cem.lowering.kernels.banded import BLOCK
from cem.testing import assert_close

B, H, T, S, E, V = 2, 3, 7, 9, 5, 4
SCALE = 0.3
PER = 2  # queries for each group of keys
LONG = 2 * BLOCK + 41


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shapes, seed=0, dtype=torch.float64):
    rng = generator(seed)
    return [torch.randn(s, generator=rng, dtype=torch.float64).to(dtype) for s in shapes]


def mask(*shape, seed=1):
    """Bool (*shape, T, S) in which one token sees nothing."""
    visible = torch.rand(*shape, T, S, generator=generator(seed)) < 0.5
    visible[..., 2, :] = False
    return visible


def allowed(visible, causal, rows, columns):
    seen = torch.ones(rows, columns, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    return seen if visible is None else seen & visible


def assert_same(function, definition, inputs, rtol, **options):
    """Equal values and equal gradients of a random projection of all outputs."""
    results = []
    for f in (function, definition):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        found = f(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        rng = generator(5)
        cotangents = [torch.randn(y.shape, generator=rng, dtype=torch.float64) for y in found]
        torch.autograd.backward(found, cotangents)
        results.append((*found, *(x.grad for x in leaves)))
    for n, (a, b) in enumerate(zip(*results, strict=True)):
        assert a.isfinite().all()
        assert_close(a, b, rtol, name=f"{n}", **options)


class Allocated(TorchDispatchMode):
    """The numbers in all tensors that are made, forward and backward, views among them."""

    def __init__(self):
        super().__init__()
        self.numbers = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for y in out if isinstance(out, tuple | list) else [out]:
            size = y.numel() if isinstance(y, torch.Tensor) else 0
            self.numbers, self.largest = self.numbers + size, max(self.largest, size)
        return out


def assert_linear_memory(function, short, long):
    """What a call and its backward allocate grows at most in proportion to the length."""
    totals = []
    for length in (short, long):
        with Allocated() as allocated:
            found = function(length)
            found = found if isinstance(found, tuple) else (found,)
            sum(y.sum() for y in found).backward()
        totals.append(allocated.numbers / length)
    assert totals[1] < 1.1 * totals[0], totals


def assert_compiles(function, inputs, rtol=1e-12):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled, function, inputs, rtol)


def dense_attention(q, k, v, visible, causal, bias=None):
    seen = allowed(visible, causal, q.shape[-2], k.shape[-2])
    some = seen.any(-1, keepdim=True)
    scores = SCALE * q @ k.mT + (0 if bias is None else bias)
    scores = scores.masked_fill(~seen & some, -math.inf)
    weights = torch.where(some, scores.softmax(-1), 0)
    return weights @ v, torch.where(some.squeeze(-1), scores.logsumexp(-1), 0)


MASKS = {
    "all": (None, False, S),
    "causal": (None, True, T),
    "mask": (mask(B, 1), False, S),
    "one_mask": (mask(1, 1), False, S),
}
masks = pytest.mark.parametrize(("visible", "causal", "size"), MASKS.values(), ids=MASKS)


def dense_transposed(q, k, u, visible, causal, bias=None):
    seen = allowed(visible, causal, q.shape[-2], k.shape[-2])
    some = seen.any(-1, keepdim=True)
    scores = SCALE * q @ k.mT + (0 if bias is None else bias)
    scores = scores.masked_fill(~seen & some, -math.inf)
    return torch.where(some, scores.softmax(-1), 0).mT @ u


def dense_linear(q, k, v, log_decay=None, visible=None, causal=True, state=None):
    rows, columns = q.shape[-2], k.shape[-2]
    seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows if causal else columns)
    seen = seen if visible is None else seen & visible
    gates = (k.new_zeros(1, 1, columns) if log_decay is None else log_decay).unsqueeze(-2)
    gates = torch.where(seen, gates, 0.0)  # (B, H, T, S)
    after = torch.triu(torch.ones(columns, columns, dtype=gates.dtype), 1) @ gates.unsqueeze(-1)
    out = torch.where(seen, after.squeeze(-1).exp() * (q @ k.mT), 0.0) @ v
    return out if state is None else out + gates.sum(-1, keepdim=True).exp() * (q @ state)


def linear_inputs(length, decay=(B, H), state=True, rows=None, dtype=torch.float64):
    """q, k, v and, if wanted, the log decay and the state."""
    shapes = [(B, H, rows or length, E), (B, H, length, E), (B, H, length, V)]
    *found, logits, start = draw(*shapes, (*(decay or ()), length), (B, H, E, V))
    found += [-logits.exp()] if decay else []
    return [x.to(dtype) for x in (*found, *([start] if state else []))]


def linear_call(function, decay, state, **options):
    """The function of positional tensors, with the decay and the state in their places."""

    def run(q, k, v, *rest):
        rest = list(rest)
        log_decay = rest.pop(0) if decay else None
        return function(q, k, v, log_decay, state=rest.pop(0) if state else None, **options)

    return run


def dense_grouped(q, k, v, visible, causal):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return dense_attention(q, k, v, visible, causal)[0]


def dense_banded(q, k, v, window, sinks=0):
    s = torch.arange(q.shape[-2])
    seen = (s > s.unsqueeze(-1) - window) | (s < sinks)
    return dense_attention(q, k, v, seen, True)[0]
