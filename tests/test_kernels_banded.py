"""Attention in a window against its definition."""

import pytest
import torch
from kernel_definitions import (
    LONG,
    SCALE,
    B,
    E,
    H,
    V,
    assert_compiles,
    assert_linear_memory,
    assert_same,
    dense_banded,
    draw,
)
from torch.autograd import gradcheck

from cem.lowering import kernels
from cem.lowering.kernels.banded import BLOCK
from cem.testing import assert_close

windows = pytest.mark.parametrize("window", [1, 7, BLOCK, 2 * BLOCK + 1, LONG - 1, LONG, LONG + 9])


@windows
@pytest.mark.parametrize("sinks", [0, 3, BLOCK + 1])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_banded_attention(window, sinks, dtype, rtol):
    assert_same(
        lambda *inputs: kernels.banded_attention(
            *(x.to(dtype) for x in inputs), window, SCALE, sinks
        ).double(),
        lambda q, k, v: dense_banded(q, k, v, window, sinks),
        draw((B, H, LONG, E), (B, H, LONG, E), (B, H, LONG, V)),
        rtol,
        atol=rtol,  # with a window of 1 the scores have no gradient
    )


@pytest.mark.parametrize("length", [1, 2, BLOCK, 7 + 5 * BLOCK])
@pytest.mark.parametrize("sinks", [0, 3])
def test_banded_attention_with_keys_for_values_of_any_length(length, sinks):
    assert_same(
        lambda q, k: kernels.banded_attention(q, k, k, 7, SCALE, sinks),
        lambda q, k: dense_banded(q, k, k, 7, sinks),
        [x.mT.contiguous().mT for x in draw((B, H, length, E), (B, H, length, E))],
        1e-12,
        atol=1e-15,
    )


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("sinks", [0, 2])
def test_banded_attention_gradcheck(window, sinks, monkeypatch):
    monkeypatch.setattr("cem.lowering.kernels.banded.BLOCK", 2)
    inputs = [x.requires_grad_() for x in draw((1, 2, 8, 3), (1, 2, 8, 3), (1, 2, 8, 2))]
    assert gradcheck(
        lambda q, k, v: kernels.banded_attention(q, k, v, window, SCALE, sinks), inputs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [5, BLOCK, LONG])
@pytest.mark.parametrize("sinks", [0, 3])
def test_banded_attention_is_causal_to_the_bit(dtype, window, sinks):
    cut = LONG - 30
    q, k, later = draw((B, H, LONG, E), (B, H, LONG, E), (B, H, 30, E), dtype=dtype)
    changed = torch.cat([k[:, :, :cut], later], 2)
    a = kernels.banded_attention(q, k, k, window, SCALE, sinks)
    b = kernels.banded_attention(q, changed, changed, window, SCALE, sinks)
    assert torch.equal(a[:, :, :cut], b[:, :, :cut]) and not torch.equal(a, b)


@pytest.mark.parametrize("sinks", [0, 3])
def test_what_has_left_the_window_is_forgotten_to_the_bit(sinks):
    window, cut = 20, BLOCK + 10
    q, k, earlier = draw((B, H, LONG, E), (B, H, LONG, E), (B, H, cut, E), dtype=torch.float32)
    changed = torch.cat([k[:, :, :sinks], earlier[:, :, sinks:], k[:, :, cut:]], 2)
    a = kernels.banded_attention(q, k, k, window, SCALE, sinks)
    b = kernels.banded_attention(q, changed, changed, window, SCALE, sinks)
    kept = slice(cut + window - 1, None)
    assert torch.equal(a[:, :, kept], b[:, :, kept]) and not torch.equal(a, b)


def test_sinks_keep_their_digits_in_bfloat16():
    q, k = draw((B, H, LONG, E), (B, H, LONG, E), dtype=torch.bfloat16)
    found = kernels.banded_attention(4 * q, 4 * k, k, 8, SCALE, 3)
    # bfloat16 keeps 8 bits.
    assert_close(found, dense_banded(4 * q.double(), 4 * k.double(), k.double(), 8, 3), 1e-2)


@pytest.mark.parametrize("sinks", [0, 3])
def test_banded_attention_needs_linear_memory(sinks):
    def function(length):
        q, k = (x.requires_grad_() for x in draw((1, 1, length, E), (1, 1, length, E)))
        return kernels.banded_attention(q, k, k, 16, SCALE, sinks)

    assert_linear_memory(function, 16 * BLOCK, 64 * BLOCK)


def test_banded_attention_compiles():
    for sinks in (0, 2):
        assert_compiles(
            lambda q, k, n=sinks: kernels.banded_attention(q, k, k, 9, SCALE, n),
            draw((B, H, LONG, E), (B, H, LONG, E)),
        )


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (3, -1)])
def test_a_window_that_is_none_is_refused(window, sinks):
    (q,) = draw((1, 1, 3, E))
    with pytest.raises(ValueError, match="needs a window of at least 1 .* type `window=1`"):
        kernels.banded_attention(q, q, q, window, SCALE, sinks)
