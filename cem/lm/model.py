"""A language model whose blocks are energy layers, as a model of transformers.

Legend: B batch, T tokens, S tokens so far, D dim, V vocabulary, L blocks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from cem import EnergyLayer, Routed

from .cache import CACHE, HeldByTransformers, RoutedByTransformers, hold_more
from .config import CEMConfig
from .layers import Residual, derived, llama_part, redescribed, why_no_cache
from .routed import layers_of, router_losses, seen_by
from .view import View, view_of

logger = logging.get_logger(__name__)


class CEMBlock(GradientCheckpointingLayer):
    """The parts of one block, one after the other on the state (B, T, D); what looks back is kept at ``slot``."""

    def __init__(self, config: CEMConfig, index: int, slot: int) -> None:
        super().__init__()
        self.index, self.slot = index, slot
        self.parts = nn.ModuleDict()
        for place, description in enumerate(config.blocks[index]):
            where = f"block {index}, part {place}"
            if "module" in description:
                part, name = llama_part(description, config, where, slot), description["module"]
            else:
                part = derived(description, config.hidden_size, config.norm_eps, where)
                together = "parts" in description
                usual = "routed" if together else layers_of(part)[0].energy_function.name
                name = description.get("name", usual)
                _remember(part, description, config.norm_eps)
            while name in self.parts:
                name += "_"
            self.parts[name] = part
        looking = [name for name, part in self.parts.items() for _ in looking_of(part)]
        if len(looking) > 1:
            raise ValueError(
                f"block {index} has {len(looking)} parts with a context, {' and '.join(looking)}, but a"
                " cache has one entry a block; put them into blocks of their own"
            )
        self.routed = any(isinstance(part, Routed) for part in self.parts.values())
        self.keeps = bool(looking) or self.routed

    def forward(
        self, hidden_states: Tensor, *, view: View, cache=None, past_key_values=None
    ) -> Tensor:
        h, cache = hidden_states, past_key_values if cache is None else cache
        for name, part in self.parts.items():
            inputs = {}
            if isinstance(part, Residual):
                if part.context:
                    turns = part.rotary(h, view.positions)
                    inputs = {
                        "attention_mask": view.mask,
                        "position_embeddings": turns,
                        CACHE: cache,
                    }
            elif isinstance(part, Routed):
                inputs = seen_by(part, view, cache is not None)
                if cache is not None:
                    inputs["cache"] = RoutedByTransformers(cache, self.slot, name, part, view)
            else:
                if part.energy_function.has_positions and not view.counted:
                    inputs["positions"] = view.positions
                if looking_of(part):
                    inputs["visible"] = view.visible
                    if cache is not None:
                        kinds = part.lowering.decoding.kinds
                        held = HeldByTransformers(cache, self.slot, kinds, view)
                        inputs |= {"cache": held, "visible": held.visible}
            h = part(h, **inputs)
        return h


def _remember(part: nn.Module, description: dict, eps: float) -> None:
    """How each module of the layer is drawn afresh, for weights that a checkpoint lacks."""
    for path, inner in part.named_modules():
        inner.drawn = partial(_drawn, description, layers_of(part)[0].dim, eps, path)


def _drawn(description: dict, dim: int, eps: float, path: str) -> nn.Module:
    return derived(description, dim, eps).get_submodule(path)


def looking_of(part: nn.Module) -> list[nn.Module]:
    """The layers of a part of a block that look at other tokens."""
    if isinstance(part, Residual):
        return [part] if part.context else []
    return [layer for layer in layers_of(part) if layer.energy_function.context is not None]


class CEMPreTrainedModel(PreTrainedModel):
    config_class = CEMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CEMBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CEMBlock}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        drawn = getattr(module, "drawn", None)
        if drawn is None:
            return super()._init_weights(module)
        if tensors := [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            with torch.device("cpu"):
                fresh = drawn()
            fresh = (*fresh.parameters(recurse=False), *fresh.buffers(recurse=False))
            for tensor, value in zip(tensors, fresh, strict=True):
                init.copy_(tensor, value)


class CEMModel(CEMPreTrainedModel):
    """Embedding, blocks and norm: from tokens to the states before the head.

        h_0 = embedding[token],   h_l = block_l(h_{l-1}),   out = norm(h_L)

    >>> import torch
    >>> config = CEMConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)
    >>> CEMModel(config)(torch.arange(5)[None]).last_hidden_state.shape
    torch.Size([1, 5, 16])
    """

    def __init__(self, config: CEMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList()
        for index in range(config.num_hidden_layers):
            slot = sum(block.keeps for block in self.layers)
            self.layers.append(CEMBlock(config, index, slot))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        # Why no cache can be kept, which of its layers hold more than keys, and whether positions of what it holds
        # are read.
        looking = {
            layer: block.slot
            for block in self.layers
            for part in block.parts.values()
            for layer in looking_of(part)
            if isinstance(layer, EnergyLayer)
        }
        self.no_cache = next(filter(None, map(why_no_cache, looking)), None)
        cached = {} if self.no_cache else looking
        self.stateful = [
            slot for layer, slot in cached.items() if "state" in layer.lowering.decoding.kinds
        ]
        self.routed = [block.slot for block in self.layers if block.routed]
        self.placed = any(layer.lowering.decoding.placed for layer in cached)
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
        """States before the head.

        Args:
            input_ids: tokens, (B, T); or ``inputs_embeds`` (B, T, D).
            attention_mask: (B, S), 0 at padding, or a mask (B, 1, T, S) that is already made.
            position_ids: (B, T). Where they begin anew inside a row, a new document begins, whose tokens see
                nothing of the one before.
            cache: what ``generate`` keeps; earlier versions of transformers call it ``past_key_values``.
            use_cache: make a cache if there is none.

        Raises:
            ValueError: tokens and embeddings are both given, or neither; a cache for layers that cannot use one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either `input_ids` or `inputs_embeds`: got both or neither")
        if kwargs.get("output_attentions", self.config.output_attentions):
            logger.warning_once("fused kernels keep no attention weights: `attentions` is None")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is not None and self.no_cache:
            raise ValueError(self.no_cache)
        # In training a router chooses from the whole sequence, which a cache would cut.
        use_cache = use_cache and not (self.routed and self.training)
        stateful = bool(self.stateful and (use_cache or cache is not None) or self.routed)
        view = view_of(
            self.config,
            h,
            attention_mask,
            position_ids,
            cache,
            placed=self.placed,
            stateful=stateful,
        )
        if use_cache and cache is None and not view.pairs and not self.no_cache:
            cache = DynamicCache(config=self.config)
        for block in self.layers:
            h = block(h, view=view, **{CACHE: cache})
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h), **{CACHE: cache})

    def layers_have_grown(self) -> None:
        """Write what the layers have become into the configuration; :func:`cem.grow` calls it."""
        blocks = [list(block) for block in self.config.blocks]  # one list a block
        for descriptions, block in zip(blocks, self.layers, strict=True):
            for place, (name, part) in enumerate(block.parts.items()):
                if not isinstance(part, Residual):
                    said, layers = descriptions[place], layers_of(part)
                    if "parts" in said:
                        pairs = zip(said["parts"], layers, strict=True)
                        again = [redescribed(one, layer, name) for one, layer in pairs]
                        descriptions[place] = {**said, "parts": again}
                    else:
                        descriptions[place] = redescribed(said, layers[0], name)
                    _remember(part, descriptions[place], self.config.norm_eps)
        same = self.config.layers is None and all(block == blocks[0] for block in blocks)
        self.config.block, self.config.layers = (blocks[0], None) if same else (None, blocks)


class CEMForCausalLM(CEMPreTrainedModel, GenerationMixin):
    """A :class:`CEMModel` with a head: scores of the next token, the loss, and ``generate``.

    >>> import torch
    >>> model = CEMForCausalLM(CEMConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)).eval()
    >>> tokens = torch.arange(5)[None]
    >>> model(tokens, labels=tokens).loss.shape
    torch.Size([])
    >>> model.generate(tokens, max_new_tokens=3, do_sample=False).shape
    torch.Size([1, 8])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CEMConfig) -> None:
        super().__init__(config)
        self.model = CEMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = bool(self.model.stateful)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if self.model.no_cache:
            if "inputs_embeds" in model_kwargs:
                raise ValueError(
                    f"`generate` goes on from `inputs_embeds` with a cache only: got them, but {self.model.no_cache};"
                    " give `input_ids`"
                )
            logger.warning_once(f"`generate` runs without a cache: {self.model.no_cache}")
            generation_config.use_cache = False
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        more = (*self.model.stateful, *self.model.routed)
        for slot in more if CACHE in model_kwargs else ():
            hold_more(model_kwargs[CACHE], slot)

    def _loss_function(self, *, labels: Tensor, num_items_in_batch=None, **inputs) -> Tensor:
        """That of transformers; in training its derivative, not its value, also trains the predictors of routers."""
        loss = ForCausalLMLoss(labels=labels, num_items_in_batch=num_items_in_batch, **inputs)
        if not (self.training and self.model.routed):
            return loss
        parts = (part for block in self.model.layers for part in block.parts.values())
        losses = [each for part in parts for each in router_losses(part)]
        if not losses:
            return loss
        own = torch.stack([each.to(loss) for each in losses]).sum()
        if num_items_in_batch is not None:  # of all the batches of a step
            own = own * ((labels[:, 1:] != -100).sum() / num_items_in_batch)
        return loss + (own - own.detach())

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Scores (log-odds) of the next token, (B, T, V), and the mean cross entropy in nats if there are labels.

        Args:
            labels: (B, T), the tokens themselves, which are compared with the scores one place before; -100 where
                nothing is to be predicted.
            logits_to_keep: compute the scores of the last tokens only, or of those with the given places.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )


class CEMForSequenceClassification(GenericForSequenceClassification, CEMPreTrainedModel):
    """A :class:`CEMModel` with one set of scores a sequence, read at its last token."""


class CEMForTokenClassification(GenericForTokenClassification, CEMPreTrainedModel):
    """A :class:`CEMModel` with one set of scores a token."""


class CEMForQuestionAnswering(GenericForQuestionAnswering, CEMPreTrainedModel):
    """A :class:`CEMModel` with scores of where an answer begins and ends."""


AutoConfig.register("cem", CEMConfig, exist_ok=True)
AutoModel.register(CEMConfig, CEMModel, exist_ok=True)
AutoModelForCausalLM.register(CEMConfig, CEMForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(CEMConfig, CEMForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(CEMConfig, CEMForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(CEMConfig, CEMForQuestionAnswering, exist_ok=True)
