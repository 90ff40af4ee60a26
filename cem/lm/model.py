"""A small language model whose blocks are energy layers."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class LanguageModel(nn.Module):
    """Tokens in, scores of the next token out; each layer moves the states down its own energy.

        h_0 = embedding[token] + position
        h_l = layer_l(h_{l-1})
        scores = norm(h_L) embedding^T

    Legend: B batch, T tokens, D dim, V vocabulary, L layers.

    Args:
        vocab: the number of different tokens, V.
        dim: the width of the state, D.
        layers: modules from (B, T, D) to (B, T, D), run in order. A layer that was made by
            ``cem.derive(energy, norm=...)`` holds its own norm and its own residual.
        max_seq: the longest sequence; each position up to it has a learned vector.

    Example:
        >>> model = LanguageModel(256, 32, [nn.Identity()], max_seq=16)
        >>> model(torch.zeros(2, 16, dtype=torch.uint8)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(self, vocab: int, dim: int, layers: Sequence[nn.Module], max_seq: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.position = nn.Parameter(torch.empty(max_seq, dim))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(dim)
        # The embedding also scores, so it starts small: the first guess is close to uniform.
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

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
        h = self.embedding(tokens.long()) + self.position[:length]  # (B, T, D)
        for layer in self.layers:
            h = layer(h)
        return F.linear(self.norm(h), self.embedding.weight)  # (B, T, V)

    def losses(self, windows: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each next token in nats, shape (B, T), for windows (B, T + 1)."""
        scores = self(windows[:, :-1])
        return F.cross_entropy(scores.mT, windows[:, 1:].long(), reduction="none")
