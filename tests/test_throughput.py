"""What a run measures: operations, time and the peak of the device."""

import time

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from training_runs import LLAMA, data

from cem.lm import Data, training
from cem.lm.callbacks import Clock
from cem.lm.throughput import flops_per_token, peak_flops
from cem.lm.tokenizer import byte_tokenizer


def test_the_operations_of_a_llama():
    model = training.build(LLAMA | {"num_key_value_heads": 1}, byte_tokenizer())
    T, dim, layers, vocab, hidden = 16, 16, 2, 257, 24
    matrices = layers * (dim * dim * 2 + 2 * dim * 8 + 3 * dim * hidden) + vocab * dim
    attention = layers * 2 * 2 * T * dim  # scores and mixing, forward
    before = torch.random.get_rng_state()
    # some versions of transformers turn the rotary angles by a matrix product too
    counted = flops_per_token(model, Data(**data()).prepare().train[0])
    assert counted == pytest.approx(6 * matrices + 3 * attention, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_clock_counts_training_only(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock, control = Clock(10.0), transformers.TrainerControl()
    clock.on_train_begin(None, None, control)
    for seconds, event, logs in (
        (1, "step_end", {}),
        (2, "log", {"logs": {"loss": 1.0}}),  # where a GPU is waited for
        (40, "log", {"logs": {"eval_loss": 1.0}}),  # the end of an evaluation
        (80, "evaluate", {}),
        (160, "save", {}),
        (4, "step_end", {}),
    ):
        now += seconds
        getattr(clock, f"on_{event}")(None, None, control, **logs)
    with clock.stopped():
        now += 320
    now += 8
    clock.on_step_end(None, None, control)
    assert clock.seconds == 10 + 1 + 2 + 4 + 8


def test_the_peak_of_a_cpu():
    assert 1e8 < peak_flops("cpu", torch.float32) < 1e15
    assert peak_flops("cpu", torch.float32) == peak_flops("cpu", torch.float32)
