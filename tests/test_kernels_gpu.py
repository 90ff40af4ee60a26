"""The kernels on CUDA against the same definitions."""

import pytest
import torch
from kernel_definitions import (
    LONG,
    PER,
    SCALE,
    B,
    E,
    H,
    T,
    V,
    assert_same,
    dense_attention,
    dense_banded,
    dense_grouped,
    dense_linear,
    dense_transposed,
    draw,
    linear_call,
    linear_inputs,
    masks,
)

from cem.lowering import kernels
from cem.lowering.kernels.linear import CHUNK


def on_cuda(function, dtype):
    """The same function of float64 tensors on the CPU, computed on CUDA in another dtype."""

    def run(*inputs):
        found = function(*(x.to("cuda", dtype) for x in inputs))
        return tuple(y.cpu().double() for y in (found if isinstance(found, tuple) else (found,)))

    return run


# bfloat16 keeps 8 bits, float16 11; gradients sum many rounded terms.
on_gpu = pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 3e-2),
        (torch.float16, 5e-3),
    ],
)


@pytest.fixture
def full_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32")
@masks
@pytest.mark.parametrize("biased", [False, True])
@on_gpu
def test_attention_with_logsumexp_on_cuda(visible, causal, size, biased, dtype, rtol):
    *inputs, bias = draw((B, H, T, E), (B, H, size, E), (B, H, size, V), (1, H, T, size))
    seen = visible if visible is None else visible.cuda()
    added = bias.to("cuda", dtype) if biased else None
    assert_same(
        on_cuda(
            lambda q, k, v: kernels.attention_with_logsumexp(q, k, v, seen, causal, SCALE, added),
            dtype,
        ),
        lambda q, k, v: dense_attention(q, k, v, visible, causal, bias if biased else None),
        inputs,
        rtol,
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32")
@masks
@on_gpu
def test_transposed_attention_on_cuda(visible, causal, size, dtype, rtol):
    seen = visible if visible is None else visible.cuda()
    assert_same(
        on_cuda(lambda q, k, u: kernels.transposed_attention(q, k, u, seen, causal, SCALE), dtype),
        lambda q, k, u: dense_transposed(q, k, u, visible, causal),
        draw((B, H, T, E), (B, H, size, E), (B, H, T, V)),
        rtol,
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32")
@masks
@pytest.mark.parametrize("rows", [1, T])
@on_gpu
def test_grouped_attention_on_cuda(visible, causal, size, rows, dtype, rtol):
    causal = causal and rows == T
    visible = visible if visible is None else visible[..., :rows, :]
    seen = visible if visible is None else visible.cuda()
    assert_same(
        on_cuda(lambda q, k, v: kernels.grouped_attention(q, k, v, seen, causal, SCALE), dtype),
        lambda q, k, v: dense_grouped(q, k, v, visible, causal),
        draw((B, H * PER, rows, E), (B, H, size, E), (B, H, size, V)),
        rtol,
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("sinks", [0, 3])
@on_gpu
def test_banded_attention_on_cuda(sinks, dtype, rtol):
    assert_same(
        on_cuda(lambda q, k: kernels.banded_attention(q, k, k, 20, SCALE, sinks), dtype),
        lambda q, k: dense_banded(q, k, k, 20, sinks),
        draw((B, H, LONG, E), (B, H, LONG, E)),
        rtol,
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("decay", [None, (1, H)])
@on_gpu
def test_linear_attention_on_cuda(decay, dtype, rtol):
    assert_same(
        on_cuda(linear_call(kernels.linear_attention, decay, True), dtype),
        linear_call(dense_linear, decay, True),
        linear_inputs(2 * CHUNK + 3, decay, True),
        rtol,
    )
