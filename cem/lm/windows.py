"""Text as bytes, and windows of them.

A token is one byte: dtype uint8, vocabulary 256. Legend: B batch, T tokens, N windows.
"""

from collections.abc import Iterator, Mapping

import numpy as np


def joined(documents: Mapping[str, bytes]) -> np.ndarray:
    """The bytes of the documents with one zero byte between two, uint8, shape (bytes,).

    Example:
        >>> joined({"a": b"hi", "b": b"ho"}).tolist()
        [104, 105, 0, 104, 111]
    """
    return np.frombuffer(b"\0".join(documents.values()), np.uint8)


def batches(data: np.ndarray, *, batch: int, context: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Random windows of the data, without end: uint8, shape (B, T + 1), T = `context`.

    The first T bytes of a window are what a model reads, the last T are what it predicts. Windows
    start anywhere, uniformly and with replacement; the same seed gives the same windows.

    Raises:
        ValueError: the data are shorter than one window.

    Example:
        >>> next(batches(np.arange(99, dtype=np.uint8), batch=2, context=3, seed=0))
        array([[81, 82, 83, 84],
               [61, 62, 63, 64]], dtype=uint8)
    """
    windows = _windows(data, context)
    random = np.random.default_rng(seed)
    while True:
        yield windows[random.integers(len(windows), size=batch)]


def even_windows(data: np.ndarray, *, count: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows spread evenly over the data, and where the bytes stand that they predict.

    No byte is predicted twice: where the data are too short for `count` windows, there are as many
    as fit.

    Returns:
        The windows, uint8, shape (N, T + 1) with T = `context`, and the positions in the data of
        their last T bytes, int64, shape (N, T).

    Raises:
        ValueError: the data are shorter than one window.

    Example:
        >>> windows, positions = even_windows(np.arange(9, dtype=np.uint8), count=2, context=3)
        >>> windows.tolist(), positions.tolist()
        ([[0, 1, 2, 3], [5, 6, 7, 8]], [[1, 2, 3], [6, 7, 8]])
    """
    windows = _windows(data, context)
    last = len(windows) - 1
    starts = np.linspace(0, last, max(1, min(count, last // context + 1))).astype(np.int64)
    return windows[starts], starts[:, None] + np.arange(1, context + 1)


def _windows(data: np.ndarray, context: int) -> np.ndarray:
    if len(data) <= context:
        raise ValueError(
            f"a window of context {context} needs {context + 1} bytes: got {len(data)}; "
            "take a shorter `context`"
        )
    return np.lib.stride_tricks.sliding_window_view(data, context + 1)
