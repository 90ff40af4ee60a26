"""A small language model whose blocks are energy layers."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class LanguageModel(nn.Module):
    """Tokens in, scores of the next token out; each layer moves the states down its own energy.

        h_0 = embedding[token] + position + sum_k earlier_k[token k places before]
        h_l = layer_l(h_{l-1})
        scores = norm(h_L) embedding^T

    Legend: B batch, T tokens, D dim, V vocabulary, L layers.

    Args:
        vocab: the number of different tokens, V.
        dim: the width of the state, D.
        layers: modules from (B, T, D) to (B, T, D), run in order. A layer that was made by
            ``cem.derive(energy, norm=...)`` holds its own norm and its own residual.
        max_seq: the longest sequence; each position up to it has a learned vector.
        recent: how many of the last tokens the first state is made of, the token itself included.
            More than one tells a layer without relative positions what stands right before.

    Example:
        >>> model = LanguageModel(256, 32, [nn.Identity()], max_seq=16)
        >>> model(torch.zeros(2, 16, dtype=torch.uint8)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(
        self, vocab: int, dim: int, layers: Sequence[nn.Module], max_seq: int, *, recent: int = 1
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.earlier = nn.ModuleList(nn.Embedding(vocab, dim) for _ in range(1, recent))
        self.position = nn.Parameter(torch.empty(max_seq, dim))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(dim)
        # The embedding also scores, so it starts small: the first guess is close to uniform.
        for start in (self.position, self.embedding.weight, *self.earlier.parameters()):
            nn.init.normal_(start, std=0.05)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores (log-odds) of the next token, shape (B, T, V), for integer tokens (B, T).

        Raises:
            ValueError: there are more than `max_seq` tokens.
        """
        length, longest = tokens.shape[-1], len(self.position)
        if length > longest:
            raise ValueError(
                f"the model reads at most {longest} tokens: got {length}; "
                f"make it with `max_seq={length}`"
            )
        tokens = tokens.long()
        h = self.embedding(tokens) + self.position[:length]  # (B, T, D)
        for k, table in zip(range(1, length), self.earlier, strict=False):
            h = h + F.pad(table(tokens[:, :-k]), (0, 0, k, 0))
        for layer in self.layers:
            h = layer(h)
        return F.linear(self.norm(h), self.embedding.weight)  # (B, T, V)

    def losses(self, windows: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each next token in nats, shape (B, T), for windows (B, T + 1)."""
        scores = self(windows[:, :-1])
        return F.cross_entropy(scores.mT, windows[:, 1:].long(), reduction="none")
