"""Data of a training run that is made in no time: random words as bytes."""

import random
from dataclasses import dataclass
from string import ascii_lowercase
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TinyText:
    """Stands in for ``cem.lm.Data``: `windows` windows of `context` bytes, an eighth held out."""

    source: str = "words"
    windows: int = 64
    context: int = 16

    def prepare(self):
        draw = random.Random(self.source)
        words = ["".join(draw.choices(ascii_lowercase, k=draw.randint(1, 6))) for _ in range(12)]
        count = self.windows * self.context
        text = " ".join(draw.choice(words) for _ in range(count))[:count]
        ids = torch.tensor(byte_tokenizer()(text)["input_ids"]).view(-1, self.context)
        items = []
        for row in ids:
            start = draw.randrange(self.context)  # one document ends inside of the window
            labels = row.clone()
            labels[start] = -100
            positions = torch.arange(self.context)
            positions[start:] -= start
            items.append({"input_ids": row, "labels": labels, "position_ids": positions})
        cut = self.windows // 8
        return SimpleNamespace(
            train=items[cut:],
            held_out=items[:cut],
            tokenizer=byte_tokenizer(),
            digest="tiny",
            versions={},
            bytes_per_token=1.0,
        )


def byte_tokenizer():
    """256 bytes, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")
