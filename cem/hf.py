"""The classes of Hugging Face, known to its Auto classes.

>>> import transformers, cem.hf
>>> config = cem.hf.CEMConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)
>>> type(transformers.AutoModelForCausalLM.from_config(config)).__name__
'CEMForCausalLM'
"""

from cem.lm.compressed import load_compressed as load_compressed
from cem.lm.compressed import save_compressed as save_compressed
from cem.lm.config import CEMConfig as CEMConfig
from cem.lm.export import export as export
from cem.lm.model import CEMForCausalLM as CEMForCausalLM
from cem.lm.model import CEMForQuestionAnswering as CEMForQuestionAnswering
from cem.lm.model import CEMForSequenceClassification as CEMForSequenceClassification
from cem.lm.model import CEMForTokenClassification as CEMForTokenClassification
from cem.lm.model import CEMModel as CEMModel
