"""Time whole language models against Llama: ``python -m benchmarks.models``; README.md says what and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from cem.hf import CEMConfig, CEMForCausalLM, CEMModel
from cem.lm.model import CACHE
from cem.lm.presets import preset

from . import layers
from .report import Row, of_pair
from .settings import Settings
from .timing import interleave

TOKENS = 8  # written in one sample of generate
GENERATE, ATTENTION = 1.0, 1.3


def models(settings: Settings, **changes) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Tied attention and tied gated MLPs, and Llama, of one depth, width, heads and hidden units."""
    sizes = {
        "vocab_size": settings.vocab,
        "hidden_size": settings.dim,
        "num_hidden_layers": settings.depth,
        "max_position_embeddings": 2 * max(settings.model_contexts),
    }
    block = [
        {"energy": "rotary_interaction", "heads": settings.heads, "rank": settings.rank},
        {"energy": "gated_silu", "hidden": settings.hidden},
    ]
    llama = preset(
        "llama-tiny",
        num_attention_heads=settings.heads,
        head_dim=settings.rank,
        intermediate_size=settings.hidden,
        **sizes,
    )
    torch.manual_seed(settings.seed)
    ours = CEMForCausalLM(CEMConfig(block=block, **sizes | changes))
    return tuple(
        model.to(settings.device, settings.torch_dtype) for model in (ours, LlamaForCausalLM(llama))
    )


def training_step(model: PreTrainedModel, ids: torch.Tensor, settings: Settings):
    """One step of AdamW on a batch, as a function."""
    run = torch.compile(model) if settings.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        run(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def operations(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Floating-point operations of a training step, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def training(settings: Settings) -> Iterator[Row]:
    """Tokens a second in training, at equal depth and width."""
    title = "Tokens a second in training of tied layers / Llama, equal depth and width"
    for seq in settings.model_seqs:
        ours, llama = models(settings)
        ids = torch.randint(settings.vocab, (settings.batch, seq), device=settings.device)
        counted = operations(llama, ids) / operations(ours, ids)
        pair = interleave(
            training_step(llama, ids, settings), training_step(ours, ids, settings), settings
        )
        tokens = settings.batch * seq
        theirs, mine = (f"{tokens / seconds:,.0f}" for seconds in pair.medians)
        row = of_pair(title, f"T = {seq}, counted operations say {counted:.3f}", pair, least=1.0)
        detail = row.detail | {"counted": counted}
        yield replace(row, medians=f"{mine} / {theirs} tokens/s", detail=detail)


def _filled(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    """A cache of every token but the last."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], logits_to_keep=1, **{CACHE: cache})
    return cache


def _bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def generate(settings: Settings) -> Iterator[Row]:
    """Tokens a second of ``generate`` after a prompt, and the bytes of the cache."""
    for context in settings.model_contexts:
        sides, held = [], []
        for model in models(settings):
            model.eval()
            ids = torch.randint(settings.vocab, (1, context), device=settings.device)
            cache = _filled(model, ids)
            held.append(_bytes(cache))

            def write(model=model, ids=ids, cache=cache) -> None:
                options = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False}
                model.generate(ids, **{CACHE: cache}, **options)
                cache.crop(-TOKENS)

            sides.append(write)
        pair = interleave(sides[1], sides[0], settings)
        theirs, mine = (f"{TOKENS / seconds:,.0f}" for seconds in pair.medians)
        title = "Tokens a second of generate() of tied layers / Llama, equal depth and width"
        row = of_pair(title, f"context {context}", pair, least=GENERATE)
        yield replace(row, medians=f"{mine} / {theirs} tokens/s")
        yield Row(
            "Bytes of the cache of tied attention / Llama's",
            f"context {context}",
            held[0] / held[1],
            least=0.5,
            most=0.5,
            medians=f"{held[0]:,} / {held[1]:,} bytes",
        )


def attention(settings: Settings) -> Iterator[Row]:
    """One token through the attention of one block, with its cache."""
    tied = {"energy": "rotary_interaction", "heads": settings.heads, "rank": settings.rank}
    untied = {"module": "attention", "heads": settings.heads, "rank": settings.rank}
    for context in settings.model_contexts:
        sides = [_one_token(settings, part, context) for part in (untied, tied)]
        pair = interleave(*sides, settings)
        title = "Time of Llama's attention / tied attention, one token with a cache of transformers"
        yield of_pair(
            title, f"context {context}", pair, least=ATTENTION if context >= 8192 else None
        )


def _one_token(settings: Settings, part: dict, context: int):
    config = CEMConfig(hidden_size=settings.dim, num_hidden_layers=1, block=[part])
    model = CEMModel(config).to(settings.device, settings.torch_dtype).eval()
    like = {"device": settings.device, "dtype": settings.torch_dtype}
    cache = DynamicCache(config=config)
    shape = (1, settings.heads, context, settings.rank)
    kept = torch.randn(shape, **like)
    cache.update(kept, kept[..., :0] if "energy" in part else torch.randn(shape, **like), 0)
    h = torch.randn(1, 1, settings.dim, **like)

    @torch.no_grad()
    def step() -> None:
        model(inputs_embeds=h, **{CACHE: cache})
        cache.crop(-1)

    return step


SECTIONS = {"training": training, "generate": generate, "attention": attention}


def main(argv: list[str] | None = None) -> dict | None:
    return layers.main(argv, "benchmarks.models", SECTIONS)


if __name__ == "__main__":
    main()
