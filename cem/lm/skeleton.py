"""What the files of an exported model hold beside its layers, as ``string.Template`` texts."""

CONFIGURATION = '''"""The configuration of a language model of energy layers."""

from transformers import PreTrainedConfig


class CEMConfig(PreTrainedConfig):
    """Sizes and token numbers; the layers themselves are written out in ``modeling_cem.py``."""

    model_type = "cem"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = $vocab_size
    hidden_size: int = $hidden_size
    num_hidden_layers: int = $num_hidden_layers
    norm_eps: float = $norm_eps
    initializer_range: float = $initializer_range
    max_position_embeddings: int = $max_position_embeddings
    tie_word_embeddings: bool = $tie_word_embeddings
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
'''

IMPORTS = """
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs
"""
"""What the texts below import; an exported file keeps the names that it uses."""

MODELING = '''"""A language model whose layers are steps down energies: h+ = h - step_size * P dE/dh.

Derived from the energies, whose formulas stand at the layers; needs torch and transformers alone.

Legend: B batch, T tokens, S tokens so far, D dim, H heads.
"""

$imports

# transformers 5.24 calls the cache of a forward pass `cache`, earlier versions `past_key_values`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


$parts


$blocks


class CEMBlock(GradientCheckpointingLayer):
    """The parts of one block, one after the other on the state (B, T, D)."""

    def __init__(self, config: CEMConfig, index: int) -> None:
        super().__init__()
        parts = {name: part(config, $slot) for name, part in BLOCKS[index].items()}
        self.parts = nn.ModuleDict(parts)

    def forward(self, hidden_states: Tensor, **inputs) -> Tensor:
        h = hidden_states
        for part in self.parts.values():
            h = part(h, **inputs)
        return h


class CEMPreTrainedModel(PreTrainedModel):
    config_class = CEMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CEMBlock"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CEMBlock}


class CEMModel(CEMPreTrainedModel):
    """Embedding, blocks and norm: from tokens to the states before the head."""

    def __init__(self, config: CEMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(CEMBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either `input_ids` or `inputs_embeds`: got both or neither")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        T = S = h.shape[1]
        seen = 0
        if cache is not None:
            seen, S = cache.get_seq_length(), cache.get_mask_sizes(T, 0)[0]
        if position_ids is None:
            position_ids = seen + torch.arange(T, device=h.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        visible = mask if mask is None or mask.dtype == torch.bool else mask == 0
        if mask is None and S > T and (T > 1 or isinstance(seen, Tensor) or S > seen + T):
            # A kernel's own causality is for T = S, and a cache with room to spare gives back too much.
            latest = seen + torch.arange(T, device=h.device)
            visible = (torch.arange(S, device=h.device) <= latest[:, None])[None, None]
        dtype = torch.promote_types(h.dtype, torch.float32)
        inputs = {"visible": visible, "positions": position_ids.to(dtype), CACHE: cache}
$extra        for block in self.layers:
            h = block(h, **inputs, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h), **{CACHE: cache})


class CEMForCausalLM(CEMPreTrainedModel, GenerationMixin):
    """A :class:`CEMModel` with a head: scores of the next token, the loss, and ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CEMConfig) -> None:
        super().__init__(config)
        self.model = CEMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

$forward'''

MASK = """        inputs["mask"] = mask
"""

PLACES = """        # Positions of all tokens that a cache gives back: beside padding they are counted without it.
        places = inputs["positions"]
        if cache is not None:
            places = torch.arange(S, device=h.device)[None]
            if attention_mask is not None and attention_mask.dim() == 2:
                known = (attention_mask.cumsum(-1) - 1).clamp(min=0)
                later = places.expand(len(known), -1)[:, known.shape[1] :]
                places = torch.cat([known, later], 1)
        inputs["places"] = places.to(dtype)
"""

LLAMA = {
    "attention": '''class $name(nn.Module):
    """h + attention(norm(h)), as in Llama."""

    def __init__(self, config: CEMConfig, index: int) -> None:
        super().__init__()
        its = LlamaConfig(
            hidden_size=$hidden_size,
            num_attention_heads=$num_attention_heads,
            num_key_value_heads=$num_key_value_heads,
            head_dim=$head_dim,
            rope_parameters=$rope_parameters,
            attn_implementation=config._attn_implementation,
        )
        self.norm = LlamaRMSNorm($hidden_size, eps=$rms_norm_eps)
        self.module = LlamaAttention(its, index)
        self.rotary = LlamaRotaryEmbedding(its)

    def forward(self, h: Tensor, *, mask: Tensor | None, positions: Tensor, **kwargs) -> Tensor:
        turns = self.rotary(h, positions)
        inputs = {"attention_mask": mask, "position_embeddings": turns, CACHE: kwargs[CACHE]}
        return h + self.module(self.norm(h), **inputs)[0]
''',
    "mlp": '''class $name(nn.Module):
    """h + mlp(norm(h)), as in Llama."""

    def __init__(self, config: CEMConfig, index: int) -> None:
        super().__init__()
        its = LlamaConfig(
            hidden_size=$hidden_size,
            intermediate_size=$intermediate_size,
            num_attention_heads=$num_attention_heads,
        )
        self.norm = LlamaRMSNorm($hidden_size, eps=$rms_norm_eps)
        self.module = LlamaMLP(its)

    def forward(self, h: Tensor, **kwargs) -> Tensor:
        return h + self.module(self.norm(h))
''',
}
