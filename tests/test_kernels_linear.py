"""Linear attention in chunks against its definition."""

import math

import pytest
import torch
from kernel_definitions import (
    B,
    E,
    H,
    T,
    V,
    assert_compiles,
    assert_linear_memory,
    assert_same,
    dense_linear,
    generator,
    linear_call,
    linear_inputs,
)
from torch.autograd import gradcheck

from cem.lowering import kernels
from cem.lowering.kernels.linear import CHUNK
from cem.testing import assert_close

LENGTHS = [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]
decays = pytest.mark.parametrize("decay", [None, (B, H), (1, H), (B, 1)])


@pytest.mark.parametrize("length", LENGTHS)
@decays
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_linear_attention(length, decay, state, dtype, rtol):
    run = linear_call(kernels.linear_attention, decay, state)
    assert_same(
        lambda *inputs: run(*(x.to(dtype) for x in inputs)).double(),
        linear_call(dense_linear, decay, state),
        linear_inputs(length, decay, state),
        rtol,
        atol=1e-15,  # one token has no earlier one, so its decay no gradient but rounding
    )


PADDING = torch.rand(B, 1, 1, CHUNK + 5, generator=generator(3)) < 0.7
GENERAL = torch.rand(B, 1, CHUNK + 5, CHUNK + 5, generator=generator(4)).tril() > 0.5


@pytest.mark.parametrize(
    ("visible", "causal", "decay"),
    [
        (None, False, None),
        (PADDING, False, None),
        (PADDING, True, None),
        (PADDING, True, (B, H)),
        (PADDING[:1], True, (1, 1)),
        (GENERAL, False, None),
        (GENERAL, False, (B, H)),
        (GENERAL.mT, True, (B, H)),
    ],
)
@pytest.mark.parametrize("state", [False, True])
def test_linear_attention_with_masks(visible, causal, decay, state):
    options = {"visible": visible, "causal": causal}
    assert_same(
        linear_call(kernels.linear_attention, decay, state, **options),
        linear_call(dense_linear, decay, state, **options),
        linear_inputs(CHUNK + 5, decay, state),
        1e-12,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("decay", [None, (B, H)])
def test_linear_attention_of_the_last_tokens_of_a_context(causal, decay):
    assert_same(
        linear_call(kernels.linear_attention, decay, True, causal=causal),
        linear_call(dense_linear, decay, True, causal=causal),
        linear_inputs(T, decay, True, rows=3),
        1e-12,
    )


@decays
@pytest.mark.parametrize("length", [1, 5, 13])
def test_linear_attention_gradcheck(decay, length, monkeypatch):
    monkeypatch.setattr("cem.lowering.kernels.linear.CHUNK", 4)
    inputs = [x.requires_grad_() for x in linear_inputs(length, decay, True)]
    # Two chunks entry by entry; more of them along random directions.
    attend = linear_call(kernels.linear_attention, decay, True)
    assert gradcheck(attend, inputs, fast_mode=length > 5)


@decays
def test_a_context_in_two_parts_gives_the_same(decay):
    cut, length = CHUNK + 3, 2 * CHUNK
    q, k, v, *rest = linear_inputs(length, decay, True)
    log_decay, state = rest if decay else (None, *rest)
    whole = kernels.linear_memory(k, v, log_decay, state)
    first, second = slice(None, cut), slice(cut, None)
    decays = [None if log_decay is None else log_decay[..., part] for part in (first, second)]
    memory = kernels.linear_memory(k[:, :, first], v[:, :, first], decays[0], state)
    assert memory.shape == (B, H, 3, E, V)
    later = kernels.linear_memory(k[:, :, second], v[:, :, second], decays[1], memory[:, :, -1])
    assert_close(later[:, :, -1], whole[:, :, -1], 1e-12)
    out = kernels.linear_recall(q[:, :, second], k[:, :, second], v[:, :, second], decays[1], later)
    expected = kernels.linear_attention(q, k, v, log_decay, state=state)
    assert_close(out, expected[:, :, second], 1e-12)


@pytest.mark.parametrize("decay", [None, (B, H)])
def test_a_state_takes_in_what_is_not_padding(decay):
    q, k, v, *gate, state = linear_inputs(5, decay, True)
    log_decay = gate[0] if gate else None
    seen = torch.ones(B, 1, 5, 9, dtype=torch.bool).tril(4)
    seen[..., 4:6] = False  # of 9 tokens, 5 are new, and the first two of those are padding
    around = (seen, False, (state,))
    memory = kernels.linear_context(k, v, log_decay, *around, 0)
    out = kernels.linear_recalled(q, k, v, log_decay, *around, memory)
    alone = [None if x is None else x[:, :, 2:] for x in (q, k, v, log_decay)]
    assert_close(memory[:, :, -1], kernels.linear_memory(*alone[1:], state)[:, :, -1], 1e-12)
    assert_close(out[:, :, 2:], kernels.linear_attention(*alone, state=state), 1e-12)


def test_strong_decay_keeps_its_digits_in_float32():
    """A step of -3000 leaves running sums with a spacing of 2e-4; what follows it must not notice."""
    q, k, v, log_decay = linear_inputs(2 * CHUNK, state=False)
    log_decay = log_decay * 0.01
    log_decay[..., ::50] = -3000.0
    found = kernels.linear_attention(*(x.float() for x in (q, k, v, log_decay)))
    assert_close(found, dense_linear(q, k, v, log_decay), 1e-5)


def test_a_log_decay_of_minus_infinity_is_a_reset():
    q, k, v, log_decay = (x.requires_grad_() for x in linear_inputs(2 * CHUNK, state=False))
    reset = torch.zeros(2 * CHUNK)
    reset[[CHUNK, CHUNK + 9]] = -math.inf
    out = kernels.linear_attention(q, k, v, log_decay + reset)
    alone = slice(CHUNK + 9, None)
    expected = kernels.linear_attention(*(x[:, :, alone] for x in (q, k, v, log_decay)))
    assert_close(out[:, :, alone], expected, 1e-12)
    seen = torch.ones(1, 1, 2 * CHUNK, 2 * CHUNK, dtype=torch.bool).tril()
    assert_close(kernels.linear_attention(q, k, v, log_decay + reset, seen, False), out, 1e-12)
    grads = torch.autograd.grad(out.sum(), (q, k, v, log_decay))
    assert all(g.isfinite().all() for g in grads)


def test_linear_attention_is_causal_to_the_bit():
    inputs = linear_inputs(2 * CHUNK + 9, state=False, dtype=torch.float32)
    cut = CHUNK + 20
    changed = [torch.cat([x[:, :, :cut], -x[:, :, cut:].abs()], 2) for x in inputs]
    a, b = kernels.linear_attention(*inputs), kernels.linear_attention(*changed)
    assert torch.equal(a[:, :, :cut], b[:, :, :cut]) and not torch.equal(a, b)


def test_linear_attention_keeps_its_state_in_float32():
    inputs = [x.bfloat16() for x in linear_inputs(8 * CHUNK, (1, H), True)]
    assert kernels.linear_memory(*inputs[1:]).dtype == torch.float32
    run = linear_call(kernels.linear_attention, (1, H), True)
    exact = linear_call(dense_linear, (1, H), True)(*(x.double() for x in inputs))
    found = run(*inputs)
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits.
    assert_close(found, exact, 2e-2)


@pytest.mark.parametrize("decay", [None, (B, H)])
def test_linear_attention_needs_linear_memory(decay):
    def function(length):
        inputs = [x.requires_grad_() for x in linear_inputs(length, decay, True)]
        return linear_call(kernels.linear_attention, decay, True)(*inputs)

    assert_linear_memory(function, 8 * CHUNK, 32 * CHUNK)


def test_linear_attention_compiles():
    for decay, length in ((None, 2 * CHUNK + 3), ((1, H), 2 * CHUNK + 3), ((B, H), 3)):
        assert_compiles(
            linear_call(kernels.linear_attention, decay, True), linear_inputs(length, decay, True)
        )
