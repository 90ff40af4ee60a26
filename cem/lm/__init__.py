"""Language models made of energy layers, text to train them on, and the baseline to beat."""

from cem.lm.corpus import Corpus as Corpus
from cem.lm.corpus import read_corpus as read_corpus
from cem.lm.data import Data as Data
from cem.lm.data import Prepared as Prepared
from cem.lm.ngram import ngram_bits as ngram_bits
from cem.lm.packing import Packed as Packed

# Imported when they are first asked for: they need transformers.
_LAZY = {
    "Result": "training",
    "Run": "run",
    "Sweep": "sweep",
    "evaluate": "training",
    "sample": "training",
    "train": "training",
}


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
