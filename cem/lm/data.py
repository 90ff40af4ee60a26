"""Text as bytes: the Python standard library's own sources, split by file, and windows of them.

A token is one byte: dtype uint8, vocabulary 256. Legend: B batch, T tokens, N windows.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_LEFT_OUT = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages"),  # not on every machine
    *("encodings", "pydoc_data"),  # tables and texts that a program wrote
}


@dataclass(frozen=True)
class ByteCorpus:
    """Bytes to train on and bytes to test on, with no file in both.

    Attributes:
        train, held_out: uint8, shape (bytes,); files joined by one zero byte.
        train_files, held_out_files: the names of the files, in the order in which they are joined.
        digest: the first 12 hexadecimal digits of the SHA-256 of all names and contents. The
            corpus differs between versions of Python, so a loss belongs to a digest.
    """

    train: np.ndarray
    held_out: np.ndarray
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    digest: str


def python_sources(root: str | Path | None = None, *, held_out: float = 0.05) -> ByteCorpus:
    """Read the ``*.py`` files under a folder, by default the standard library of this Python.

    A file is held out when the SHA-256 of its relative path, read as a number in [0, 1), is below
    `held_out`. The split depends on names alone, so a file keeps its side from one version to the
    next. Tests, installed packages and generated tables are left out, see `_LEFT_OUT`.

    Args:
        root: the folder; None takes ``sysconfig.get_path("stdlib")``.
        held_out: expected share of the files that are held out, between 0 and 1.

    Raises:
        ValueError: `held_out` is not between 0 and 1, or one side of the split is empty.

    Example:
        >>> corpus = python_sources()
        >>> corpus.train.dtype.name, set(corpus.train_files) & set(corpus.held_out_files)
        ('uint8', set())
    """
    if not 0 < held_out < 1:
        raise ValueError(
            f"`held_out` must be a share between 0 and 1: got {held_out}; try `held_out=0.05`"
        )
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    digest = hashlib.sha256()
    train, test = {}, {}  # name -> content
    for name, path in sorted((p.relative_to(root).as_posix(), p) for p in root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(name.split("/")):
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            (test if _unit_hash(name) < held_out else train)[name] = content
    if not train or not test:
        raise ValueError(
            f"cannot split the Python files under {root}: got {len(train)} to train on and "
            f"{len(test)} held out; give a folder with more files or another share, `held_out=0.2`"
        )
    return ByteCorpus(_join(train), _join(test), tuple(train), tuple(test), digest.hexdigest()[:12])


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _join(contents: dict[str, bytes]) -> np.ndarray:
    return np.frombuffer(b"\0".join(contents.values()), np.uint8)


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
