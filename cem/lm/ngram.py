"""What counting alone achieves: an interpolated byte n-gram, the baseline of a language model.

With c the k bytes before a byte b, n the counts in the training bytes and t(c) the number of
different bytes that were seen after c, the model of order k is

    p_k(b | c) = (n(c b) + t(c) p_{k-1}(b | c')) / (n(c) + t(c)),        p_{-1}(b) = 1 / 256,

where c' is c without its oldest byte; a context that was never seen leaves p_{k-1}. This is the
smoothing of Witten and Bell (IEEE Transactions on Information Theory 37, 1991), method C in their
words. It has no setting to tune.
"""

import numpy as np


def ngram_bits(
    train: np.ndarray, text: np.ndarray, positions: np.ndarray, *, order: int = 4
) -> np.ndarray:
    """Bits per byte of the models with 0, 1, ... `order` bytes of context, lower is better.

    The models are asked for ``text[positions]`` and see the bytes of `text` before each position.

    Args:
        train: uint8, shape (bytes,), or (windows, bytes): no count crosses from row to row.
        text: uint8, shape (bytes,).
        positions: integers of any shape, 0 to bytes - 1.
        order: the longest context in bytes, 0 to 6.

    Returns:
        float64, shape (order + 1,): the mean over the positions.

    Raises:
        ValueError: `order` is not in 0..6; a gram and its successor must fit in 64 bits.

    Example:
        >>> text = np.frombuffer(b"abababab", np.uint8)
        >>> ngram_bits(text, text, np.arange(2, 8), order=1).round(3).tolist()
        [1.319, 0.209]
    """
    if not 0 <= order <= 6:
        raise ValueError(f"`order` must be between 0 and 6: got {order}; type `order=4`")
    positions = np.asarray(positions).ravel()
    p = np.full(positions.shape, 1 / 256)
    bits = []
    for k in range(order + 1):
        grams = np.sort(_grams(train, k + 1), axis=None)
        new = np.concatenate([[True], grams[1:] != grams[:-1]])[: len(grams)]
        distinct = np.concatenate([[0], np.cumsum(new)])  # different grams before each place
        asked = _grams(text, k + 1)[np.maximum(positions - k, 0)]
        context = asked & ~np.uint64(255)
        low, high = (
            np.searchsorted(grams, context),
            np.searchsorted(grams, context + np.uint64(256)),
        )
        after = distinct[high] - distinct[low]
        count = np.searchsorted(grams, asked, side="right") - np.searchsorted(grams, asked)
        # A position nearer to the beginning than k has no context of k bytes.
        seen = (high > low) & (positions >= k)
        p = np.where(seen, (count + after * p) / np.maximum(high - low + after, 1), p)
        bits.append(-np.log2(p).mean())
    return np.array(bits)


def _grams(data: np.ndarray, length: int) -> np.ndarray:
    """Each run of `length` bytes along the last axis as one number, the last byte lowest."""
    count = max(data.shape[-1] - length + 1, 0)
    grams = np.zeros((*data.shape[:-1], count), np.uint64)
    for i in range(length):
        grams = grams << np.uint64(8) | data[..., i : i + count]
    return grams
