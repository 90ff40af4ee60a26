"""What counting achieves: the n-gram baseline."""

import math

import numpy as np
import pytest

from cem import lm


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
