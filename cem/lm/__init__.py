"""Language models made of energy layers, text to train them on, and the baseline to beat."""

from cem.lm.bytes_model import LanguageModel as LanguageModel
from cem.lm.corpus import Corpus as Corpus
from cem.lm.corpus import read_corpus as read_corpus
from cem.lm.data import Data as Data
from cem.lm.data import Prepared as Prepared
from cem.lm.ngram import ngram_bits as ngram_bits
from cem.lm.packing import Packed as Packed
from cem.lm.windows import batches as batches
from cem.lm.windows import even_windows as even_windows
from cem.lm.windows import joined as joined
