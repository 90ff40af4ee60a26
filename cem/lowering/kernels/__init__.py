"""The few functions that emitted programs call beside torch's own.

Legend: B batch, H heads, T tokens, S context tokens, E features of queries and keys, V features of values.
``visible`` is a bool tensor of shape (B or 1, 1, T, S) or None; ``causal`` stands for s <= t where there is none (T
equal to S). At most one of them is given. A token that sees nothing gets zeros, never NaN, in values and gradients.
"""

from .attention import attention_with_logsumexp, transposed_attention
from .banded import banded_attention, windowed_attention
from .entmax import entmax, entmax_conjugate, masked_entmax, masked_entmax_conjugate
from .flex import flex_attention
from .grouped import decode_attention, grouped_attention
from .linear import (
    decayed,
    linear_attention,
    linear_context,
    linear_memory,
    linear_recall,
    linear_recalled,
)
from .masked import (
    bias,
    masked_logsumexp,
    masked_softmax,
    one_unseen,
    seen,
    visible_count,
    zero_unseen,
)
from .places import exact_parts, lookup, rotate, settled, sharing, turns

__all__ = [
    "attention_with_logsumexp",
    "banded_attention",
    "bias",
    "decode_attention",
    "entmax",
    "entmax_conjugate",
    "exact_parts",
    "flex_attention",
    "grouped_attention",
    "decayed",
    "linear_attention",
    "linear_context",
    "linear_memory",
    "linear_recall",
    "linear_recalled",
    "lookup",
    "masked_entmax",
    "masked_entmax_conjugate",
    "masked_logsumexp",
    "masked_softmax",
    "one_unseen",
    "rotate",
    "seen",
    "settled",
    "transposed_attention",
    "sharing",
    "turns",
    "visible_count",
    "windowed_attention",
    "zero_unseen",
]
