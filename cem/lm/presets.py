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
    """Depth, width and heads of a Llama model, and the vocabulary it is named for.

    ``wide`` is the rank of a head with three matrices: about 4/3 of Llama's, which has four, and even.
    """

    layers: int
    dim: int
    heads: int
    vocab: int
    wide: int

    @property
    def hidden(self) -> int:
        """8/3 of the width, up to a multiple of 16, so that 3/2 of it is whole and even."""
        return -(-8 * self.dim // 48) * 16


SHAPES = {
    "tiny": Shape(4, 128, 4, 256, 42),
    "25m": Shape(7, 512, 8, 8192, 88),
    "124m": Shape(12, 768, 12, 50257, 88),
    "350m": Shape(24, 1024, 16, 50257, 88),
}


def _blocks(shape: Shape) -> dict[str, list[dict]]:
    rank, heads, hidden = shape.dim // shape.heads, shape.heads, shape.hidden

    def loose(heads: int) -> list[dict]:
        start = {"init": {"w": 0.0}}  # as Llama
        return [
            {"energy": "loosely_tied_interaction", "heads": heads, "rank": shape.wide},
            {"energy": "partly_tied_gated", "hidden": hidden} | start,
        ]

    def tied(heads: int, hidden: int) -> list[dict]:
        return [
            {"energy": "rotary_interaction", "heads": heads, "rank": rank},
            {"energy": "gated_silu", "hidden": hidden},
        ]

    return {
        "": loose(heads),
        "lean": loose(heads // 2),
        "tied": tied(2 * heads, 3 * hidden // 2),
        "half": tied(heads, hidden),
    }


def preset(name: str, *, vocab_size: int | None = None, **changes) -> PreTrainedConfig:
    """The configuration of a preset: ``SIZE`` or ``lean-``, ``tied-``, ``half-`` or ``llama-SIZE``, SIZE of ``SHAPES``.

    All have the same depth and width.

    - ``SIZE`` has about Llama's number of parameters. Its attention, ``loosely_tied_interaction``, has Llama's heads of
      4/3 of the rank, which write with their queries and have values of their own: the tie that ``benchmarks/studies``
      found to cost nothing. Its MLP, ``partly_tied_gated``, has Llama's matrices and a learned share of the tied
      force, from 0.
    - ``lean-SIZE`` has half of these heads, so half of the parameters of Llama's attention.
    - ``tied-SIZE`` has the parameters of ``llama-SIZE``, matrix for matrix: its tied attention has twice the heads
      (two matrices a head instead of four) and its gated MLP 3/2 of the hidden units (two matrices instead of three).
    - ``half-SIZE`` has Llama's heads and hidden units, so half of the parameters of its attention, half of its cache,
      and two thirds of the parameters of its MLP.

    Args:
        name: the preset.
        vocab_size: of the tokeniser; by default that which the size is named for.
        **changes: fields of the configuration that differ.

    Raises:
        ValueError: no preset has that name.

    >>> preset("half-124m").block[0]["heads"], preset("tied-124m").block[0]["heads"]
    (12, 24)
    """
    side, _, size = name.rpartition("-")
    sides = ("", "lean", "tied", "half", "llama")
    if size not in SHAPES or side not in sides:
        known = [f"{side}-{size}".lstrip("-") for size in SHAPES for side in sides]
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
    if side != "llama":
        return CEMConfig(**common | {"block": _blocks(shape)[side]} | changes)
    sizes = {
        "intermediate_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "head_dim": shape.dim // shape.heads,
    }
    return LlamaConfig(**common | sizes | changes)
