"""Sizes by name, each as a model of energy layers and as its Llama twin.

>>> cem_side, llama_side = preset("tiny", vocab_size=256), preset("llama-tiny", vocab_size=256)
>>> cem_side.hidden_size == llama_side.hidden_size
True
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import LlamaConfig, PreTrainedConfig

from .config import CEMConfig


class Shape(NamedTuple):
    """Depth, width and heads of a Llama model, and the vocabulary it is named for."""

    layers: int
    dim: int
    heads: int
    vocab: int

    @property
    def hidden(self) -> int:
        """8/3 of the width, up to a multiple of 16, so that 3/2 of it is whole and even."""
        return -(-8 * self.dim // 48) * 16


SHAPES = {
    "tiny": Shape(4, 128, 4, 256),
    "25m": Shape(7, 512, 8, 8192),
    "124m": Shape(12, 768, 12, 50257),
    "350m": Shape(24, 1024, 16, 50257),
}


def preset(name: str, *, vocab_size: int | None = None, **changes) -> PreTrainedConfig:
    """The configuration of a preset: ``SIZE``, ``half-SIZE`` or ``llama-SIZE`` with SIZE of ``SHAPES``.

    All three have the same depth and width. ``SIZE`` has the parameters of ``llama-SIZE``, matrix for matrix: its
    tied attention has twice the heads (two matrices a head instead of four) and its gated MLP 3/2 of the hidden
    units (two matrices instead of three). ``half-SIZE`` has Llama's heads and hidden units, so half of the
    parameters of its attention and two thirds of those of its MLP.

    Args:
        name: the preset.
        vocab_size: of the tokeniser; by default that which the size is named for.
        **changes: fields of the configuration that differ.

    Raises:
        ValueError: no preset has that name.

    >>> preset("half-124m").block[0]["heads"], preset("124m").block[0]["heads"]
    (12, 24)
    """
    side, _, size = name.rpartition("-")
    if size not in SHAPES or side not in ("", "half", "llama"):
        known = [f"{side}{size}" for size in SHAPES for side in ("", "half-", "llama-")]
        raise ValueError(f"a preset is one of {', '.join(known)}: got {name!r}; type 'tiny'")
    shape = SHAPES[size]
    common = {
        "vocab_size": vocab_size or shape.vocab,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.layers,
        "initializer_range": shape.dim**-0.5,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    rank = shape.dim // shape.heads
    if side == "llama":
        return LlamaConfig(
            **common
            | {
                "intermediate_size": shape.hidden,
                "num_attention_heads": shape.heads,
                "head_dim": rank,
            }
            | changes
        )
    heads, hidden = shape.heads, shape.hidden
    if side == "":
        heads, hidden = 2 * heads, 3 * hidden // 2
    block = [
        {"energy": "rotary_interaction", "heads": heads, "rank": rank},
        {"energy": "gated_silu", "hidden": hidden},
    ]
    return CEMConfig(**common | {"block": block} | changes)
