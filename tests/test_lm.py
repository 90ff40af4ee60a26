"""Windows of bytes, the n-gram baseline and the language model."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sympy import Sum
from torch import nn

import cem
from cem import lm

ROOT = Path(__file__).resolve().parents[1]


def test_batches_repeat_with_the_seed():
    data = np.arange(200, dtype=np.uint8)

    def take(seed):
        stream = lm.batches(data, batch=3, context=7, seed=seed)
        return np.stack(list(itertools.islice(stream, 4)))

    assert take(0).shape == (4, 3, 8) and take(0).dtype == np.uint8
    np.testing.assert_array_equal(take(0), take(0))
    assert (take(0) != take(1)).any()
    assert (np.diff(take(0).astype(int)) == 1).all()  # consecutive bytes
    with pytest.raises(ValueError, match="context 200 needs 201 bytes: got 200"):
        next(lm.batches(data, batch=1, context=200))


@pytest.mark.parametrize("count", [1, 4, 1000])
def test_even_windows_predict_no_byte_twice(count):
    data = np.arange(100, dtype=np.uint8)
    windows, positions = lm.even_windows(data, count=count, context=9)
    assert windows.shape == (min(count, 11), 10)
    np.testing.assert_array_equal(windows[:, 1:], data[positions])
    assert len(np.unique(positions)) == positions.size


def counted_bits(rows, text, positions, order):
    """The definition of the n-gram model, byte by byte, with exact dictionaries of counts."""
    bits = []
    for position in positions:
        p = 1 / 256
        for k in range(min(order, position) + 1):
            context, byte = text[position - k : position], text[position]
            followers = [
                row[i + k] for row in rows for i in range(len(row) - k) if row[i : i + k] == context
            ]
            if followers:
                kinds = len(set(followers))
                p = (followers.count(byte) + kinds * p) / (len(followers) + kinds)
        bits.append(-math.log2(p))
    return sum(bits) / len(bits)


@pytest.mark.parametrize("rows", [1, 5])
def test_ngram_matches_counting_by_hand(rows):
    random = np.random.default_rng(0)
    # 0 and 255 are the ends of the range of bytes, where packed grams could wrap.
    letters = np.array([0, 97, 98, 255], np.uint8)
    train, text = letters[random.integers(4, size=(rows, 60))], letters[random.integers(4, size=40)]
    positions = np.array([0, 1, 2, 3, 5, 17, 39])
    got = lm.ngram_bits(train[0] if rows == 1 else train, text, positions, order=5)
    for order in range(6):
        expected = counted_bits([r.tobytes() for r in train], text.tobytes(), positions, order)
        assert got[order] == pytest.approx(expected, abs=1e-12)


def test_ngram_probabilities_sum_to_one():
    train = np.frombuffer(b"the cat sat on the mat", np.uint8)
    texts = [np.frombuffer(b"the " + bytes([b]), np.uint8) for b in range(256)]
    for order in range(5):
        total = sum(2.0 ** -lm.ngram_bits(train, t, np.array([4]), order=order)[-1] for t in texts)
        assert total == pytest.approx(1, abs=1e-12)


def test_ngram_order_is_limited():
    text = np.frombuffer(b"abc", np.uint8)
    with pytest.raises(ValueError, match="`order` must be between 0 and 6: got 7"):
        lm.ngram_bits(text, text, np.array([1]), order=7)


def model(recent=3, max_seq=12):
    """A small model with layers of an energy with a context and one without."""
    dim, hidden = cem.dims("dim hidden")
    h, x, U = cem.state(dim), cem.context(dim), cem.parameter("U", hidden, dim)
    W = cem.parameter("W", dim, dim)
    i, j, m, s = dim.index("i"), dim.index("j"), hidden.index("m"), x.index("s")
    score = Sum(Sum(W[i, j] * x[s, j], j) * h[i], i)
    pull = cem.Energy(-cem.logsumexp(score, s), name="pull")
    plain = cem.Energy(-Sum(cem.relu(Sum(U[m, i] * h[i], i)) ** 2, m) / 2, name="plain")
    layers = [
        cem.derive(pull, dim=8, norm=nn.RMSNorm),
        cem.derive(plain, dim=8, hidden=5, norm=nn.RMSNorm),
    ]
    return lm.LanguageModel(256, 8, layers, max_seq, recent=recent)


@pytest.mark.parametrize("recent", [1, 3, 20])
def test_the_future_does_not_reach_the_past(recent):
    net = model(recent)
    tokens = torch.randint(256, (2, 12), dtype=torch.uint8)
    other = tokens.clone()
    other[:, 7:] += 1
    assert torch.equal(net(tokens)[:, :7], net(other)[:, :7])
    assert not torch.equal(net(tokens)[:, 7:], net(other)[:, 7:])


def test_recent_tokens_reach_the_first_state():
    net = model(recent=3)
    net.layers = nn.ModuleList()
    tokens = torch.randint(256, (1, 12), dtype=torch.uint8)
    other = tokens.clone()
    other[:, 4] += 1
    changed = (net(tokens) != net(other)).any(-1).squeeze(0)
    assert changed.nonzero().flatten().tolist() == [4, 5, 6]


@pytest.mark.parametrize("length", [1, 2, 12])
def test_any_length_up_to_the_longest(length):
    net = model(recent=5)
    assert net(torch.zeros(1, length, dtype=torch.uint8)).shape == (1, length, 256)
    with pytest.raises(ValueError, match="at most 12 tokens: got 13; make it with `max_seq=13`"):
        net(torch.zeros(1, 13, dtype=torch.uint8))


def test_losses_are_those_of_the_next_token():
    net = model()
    windows = torch.randint(256, (3, 13), dtype=torch.uint8)
    log_p = net(windows[:, :-1]).log_softmax(-1)
    expected = -log_p.gather(-1, windows[:, 1:, None].long()).squeeze(-1)
    torch.testing.assert_close(net.losses(windows), expected, rtol=1e-5, atol=1e-5)
    assert abs(net.losses(windows).mean().item() - math.log(256)) < 0.5  # close to uniform


def test_the_model_learns():
    net = model()
    windows = torch.arange(13, dtype=torch.uint8).repeat(4, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        net.losses(windows).mean().backward()
        optimizer.step()
    assert net.losses(windows).mean() < 1.0


def test_the_demo_needs_nothing_of_the_extra():
    extra = ("transformers", "tokenizers", "datasets", "accelerate")
    code = f"import sys; sys.modules.update(dict.fromkeys({extra})); import cem.demo"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
