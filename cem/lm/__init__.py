"""Language models made of energy layers, bytes to train them on, and the baseline to beat."""

from cem.lm.bytes_model import LanguageModel as LanguageModel
from cem.lm.data import ByteCorpus as ByteCorpus
from cem.lm.data import batches as batches
from cem.lm.data import even_windows as even_windows
from cem.lm.data import python_sources as python_sources
from cem.lm.ngram import ngram_bits as ngram_bits
