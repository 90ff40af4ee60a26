"""Tiny language models for the tests of the Hugging Face interface: every kind of block, two blocks each."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    logging,
    set_seed,
)

from cem.hf import (
    CEMConfig,
    CEMForCausalLM,
    CEMForQuestionAnswering,
    CEMForSequenceClassification,
    CEMForTokenClassification,
    CEMModel,
)

logging.disable_progress_bar()

VOCAB, WIDTH = 37, 16
ATTENTION = {"energy": "rotary_interaction", "heads": 2, "rank": 8}
MLP = {"energy": "gated_silu", "hidden": 24}
ALIBI = {"energy": "alibi_interaction", "heads": 2, "rank": 8}

# Blocks of every kind; a list of two lists is one description a block.
BLOCKS = {
    "tied": [ATTENTION, MLP],
    "parallel": [{"energy": "parallel_block", "heads": 2, "rank": 8, "hidden": 24}],
    "linear": [{"energy": "gated_linear_attention", "heads": 2, "rank": 8}, MLP],
    "recursion": [
        {
            **ATTENTION,
            "steps": 3,
            "update": {"Momentum": {"step_size": 0.5}},
            "preconditioner": {"DiagonalPlusLowRank": {"rank": 2}},
        },
        MLP,
    ],
    "llama": [
        {"module": "attention", "heads": 2, "kv_heads": 1, "rank": 8},
        {"module": "mlp", "hidden": 24},
    ],
    "differing": [[ATTENTION, {"energy": "plain_gelu", "hidden": 20}], [MLP, ALIBI]],
}
# Layers that no cache serves: Newton asks for Hessians.
UNCACHED = [{**ATTENTION, "update": {"Newton": {}}}, MLP]
EVERY = {**BLOCKS, "newton": UNCACHED}
KINDS = {
    CEMModel: AutoModel,
    CEMForCausalLM: AutoModelForCausalLM,
    CEMForSequenceClassification: AutoModelForSequenceClassification,
    CEMForTokenClassification: AutoModelForTokenClassification,
    CEMForQuestionAnswering: AutoModelForQuestionAnswering,
}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 10, "top_p": 0.9, "temperature": 0.7},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "processed": {"do_sample": False, "bad_words_ids": [[1, 0]], "repetition_penalty": 1.2},
}
blocks = pytest.mark.parametrize("block", EVERY.values(), ids=EVERY)
cached = pytest.mark.parametrize("block", BLOCKS)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def config(block="tied", **options):
    """The configuration of a kind of ``BLOCKS``, or of a block."""
    parts = BLOCKS[block] if isinstance(block, str) else block
    where = {"layers": parts} if isinstance(parts[0], list) else {"block": parts}
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2}
    return CEMConfig(**sizes | where | {"initializer_range": 0.3} | options)


def model(block="tied", kind=CEMForCausalLM, *, dtype=torch.float64, seed=0, **options):
    """A model of a kind of ``BLOCKS``, in eval mode, its weights drawn from a seed."""
    set_seed(seed)
    return kind(config(block, **options)).to(dtype).eval()


def tokens(batch=2, length=9, seed=1):
    """Tokens (batch, length) from a seed."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def write(its, ids, seed=0, **options):
    """The tokens that a model appends, 5 unless the options say otherwise."""
    set_seed(seed)
    out = its.generate(ids, **{"max_new_tokens": 5, "do_sample": False, **options})
    return out if isinstance(out, torch.Tensor) else out.sequences
