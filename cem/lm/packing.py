"""Documents packed into windows of one length, read from memory-mapped files.

Legend: T tokens of a window, the `context`.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset


def write_documents(folder: Path, documents: Iterable[np.ndarray]) -> None:
    """Write the tokens of documents, one after another, as the two files that `Packed` reads.

    ``tokens.npy`` holds all tokens in the dtype of the documents, ``starts.npy`` the place of the
    first token of each document, int64.
    """
    documents = list(documents)
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    folder.mkdir(parents=True)
    np.save(folder / "tokens.npy", np.concatenate(documents))
    np.save(folder / "starts.npy", np.concatenate([[0], ends[:-1]]).astype(np.int64))


def check_context(context: int) -> None:
    """Refuse windows that are too short to predict anything, with a ValueError."""
    if context < 2:
        raise ValueError(
            f"a window needs a token to read and one to predict: got `context={context}`; "
            "type `context=256`"
        )


class Packed(Dataset):
    """Windows of `context` tokens over documents that stand one after another.

    An item is a dictionary of three int64 tensors of shape (T,):

    - ``input_ids``: tokens k (T - 1) to k (T - 1) + T of the stream, for window k. The last token
      of a window is the first of the next, which reads it and does not predict it, so the windows
      predict every token once: all but the first of each document.
    - ``labels``: the same, but -100 at the first token of the window and of each document. A loss
      shifts them, so the labels that count are exactly the tokens that are predicted.
    - ``position_ids``: they start at 0 with the window and with each document, which is what
      keeps packed documents apart where a model is given no `attention_mask` and no cache.

    The last window is filled with `fill`, which is no label.

    Args:
        folder: what `write_documents` wrote.
        context: the length of a window, T.
        fill: the token that fills the last window.

    Raises:
        ValueError: `context` is below 2.

    Example:
        >>> write_documents(Path("shard"), [np.array([9, 1, 2, 9]), np.array([9, 3, 9])])
        >>> windows = Packed(Path("shard"), context=5, fill=9)
        >>> for name, values in windows[0].items():
        ...     print(f"{name:<13}{values.tolist()}")
        input_ids    [9, 1, 2, 9, 9]
        labels       [-100, 1, 2, 9, -100]
        position_ids [0, 1, 2, 3, 0]
        >>> windows[1]["labels"].tolist(), len(windows), windows.predicted
        ([-100, 3, 9, -100, -100], 2, 5)
    """

    def __init__(self, folder: Path, *, context: int, fill: int):
        check_context(context)
        self.folder, self.context, self.fill = Path(folder), context, fill
        self.tokens = np.load(self.folder / "tokens.npy", mmap_mode="r")
        self.starts = np.load(self.folder / "starts.npy", mmap_mode="r")

    def __reduce__(self):  # a worker process maps the files anew
        return _open, (self.folder, self.context, self.fill)

    @property
    def predicted(self) -> int:
        """How many tokens all windows together predict."""
        return len(self.tokens) - len(self.starts)

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // (self.context - 1))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} windows: got index {index}")
        begin = index % len(self) * (self.context - 1)
        tokens = self.tokens[begin : begin + self.context]
        low, high = np.searchsorted(self.starts, [begin + 1, begin + self.context])
        first = np.append(0, self.starts[low:high] - begin)  # of the window, of each document
        ids = np.full(self.context, self.fill, np.int64)
        ids[: len(tokens)] = tokens
        labels = ids.copy()
        labels[first] = -100
        labels[len(tokens) :] = -100
        origin = np.zeros(self.context, np.int64)
        origin[first] = first
        positions = np.arange(self.context) - np.maximum.accumulate(origin)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }


def _open(folder: Path, context: int, fill: int) -> Packed:
    return Packed(folder, context=context, fill=fill)
