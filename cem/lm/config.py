"""The configuration of a language model made of energy layers."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig


class CEMConfig(PreTrainedConfig):
    """What a :class:`~cem.lm.model.CEMModel` is made of, as data: nothing in it is evaluated.

    A model is an embedding, a row of blocks, a norm and a head. A block is a list of parts that run one after the
    other on the state; each is a mapping. A part with the key ``energy`` is a derived layer, see
    :func:`cem.lm.layers.derived` for its keys; with ``parts`` and ``routed`` it is several of them behind one router,
    which a share of the tokens takes. ``{"module": "attention"}`` and ``{"module": "mlp"}`` are the two
    halves of a Llama block, for comparisons, see :func:`cem.lm.layers.llama_part`.

    Args:
        vocab_size: V.
        hidden_size: the width D of the state.
        num_hidden_layers: the number of blocks, L.
        block: the parts of every block; rotary tied attention and a tied gated MLP if None.
        layers: the parts of each block, where they differ; ``num_hidden_layers`` is then their number.
        norm_eps: added to the mean square in every norm that does not say otherwise.
        initializer_range: standard deviation at which the embedding starts, and the matrices of Llama's parts.
        max_position_embeddings: the longest sequence that the model is meant for; nothing is allocated for it.
        tie_word_embeddings: the head is the embedding.
        use_cache: ``generate`` keeps what the layers computed of earlier tokens.

    Raises:
        ValueError: a block that is not a list of mappings.

    >>> config = CEMConfig(hidden_size=32, num_hidden_layers=2)
    >>> config.blocks == [[{"energy": "rotary_interaction"}, {"energy": "gated_silu"}]] * 2
    True
    >>> CEMConfig.from_dict(config.to_dict()).blocks == config.blocks
    True
    """

    model_type = "cem"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    block: list[dict[str, Any]] | None = None
    layers: list[list[dict[str, Any]]] | None = None
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.block is None:
            self.block = [{"energy": "rotary_interaction"}, {"energy": "gated_silu"}]
        if self.layers is not None:
            self.num_hidden_layers = len(self.layers)
        for index, parts in enumerate(self.blocks):
            if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
                raise ValueError(
                    f'block {index} is a list of parts such as [{{"energy": "rotary_interaction"}}]: got {parts!r};'
                    " put brackets around one part"
                )
        super().__post_init__(**kwargs)

    @property
    def blocks(self) -> list[list[dict[str, Any]]]:
        """The parts of each block, first block first."""
        if self.layers is not None:
            return deepcopy(self.layers)
        return [deepcopy(self.block) for _ in range(self.num_hidden_layers)]
