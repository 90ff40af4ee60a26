"""A Transformer layer whose five projections attend to parameters.

Legend: B batch, T tokens, D dim, H heads, R head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import TokenParameterAttention


class TokenformerBlock(nn.Module):
    """The layer of Tokenformer: attention whose q, k, v and o attend to parameters, then an MLP that does.

        u = LN(x);  x <- x + P_o(attention(P_q(u), P_k(u), P_v(u)));  x <- x + P_ffn(LN(x))

    LN has neither gain nor bias. Attention is causal, with rotary positions on the first ``rotary`` of each head, the
    coordinate n of that part paired with the one half of it further (GPT-NeoX).

    Args:
        dim: the width of x.
        heads: of the attention among tokens.
        tokens: parameter tokens of q, k, v and o.
        ffn_tokens: those of the MLP; four times as many if None.
        rotary, base: the share of each head that is turned, and the base of its frequencies.
        eps: of the norms.
        layers: of the whole model, for the scale of the values at the start.
        **options: of :class:`TokenParameterAttention`: its normaliser, activation, device, dtype, ...

    Shape: (..., T, dim) -> (..., T, dim).

    Raises:
        ValueError: a width that the heads do not divide, or an odd number of coordinates to turn.

    >>> import torch
    >>> block = TokenformerBlock(32, heads=2, tokens=32)
    >>> block(torch.randn(2, 7, 32)).shape, block.grow(tokens=48).ffn
    (torch.Size([2, 7, 32]),
     TokenParameterAttention(32, 32, tokens=192, normaliser=l2_norm_gelu, activation=gelu, tie=False))

    Source: Wang et al., TokenFormer, arXiv:2410.23168, section 3.2, and its published code.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        tokens: int,
        ffn_tokens: int | None = None,
        *,
        rotary: float = 0.25,
        base: float = 10000.0,
        eps: float = 1e-5,
        **options,
    ) -> None:
        super().__init__()
        turned = int(dim // heads * rotary)
        if dim % heads or turned % 2:
            raise ValueError(
                f"heads share the width, and each turns pairs: got dim={dim}, heads={heads} and {turned} coordinates"
                " to turn; choose a multiple of the heads and an even number"
            )
        self.dim, self.heads, self.turned, self.base, self.eps = dim, heads, turned, base, eps
        self.q, self.k, self.v, self.o = (
            TokenParameterAttention(dim, dim, tokens, **options) for _ in range(4)
        )
        ffn_tokens = 4 * tokens if ffn_tokens is None else ffn_tokens
        self.ffn = TokenParameterAttention(dim, dim, ffn_tokens, **options)

    def forward(self, x: Tensor, *, positions: Tensor | None = None) -> Tensor:
        """The next states, (..., T, dim); ``positions`` are whole numbers (T,) or (..., T), 0, 1, ... if None."""
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
        u = F.layer_norm(x, (self.dim,), eps=self.eps)
        turn = self.rotation(positions, x.dtype)
        q, k, v = (self.split(part(u)) for part in (self.q, self.k, self.v))  # (..., H, T, R)
        mixed = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.o(mixed.transpose(-3, -2).flatten(-2))
        return x + self.ffn(F.layer_norm(x, (self.dim,), eps=self.eps))

    def split(self, x: Tensor) -> Tensor:
        """(..., T, H R) -> (..., H, T, R)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The rotation by positions (..., T), as a function of (..., H, T, R)."""
        wide = torch.promote_types(dtype, torch.float32)
        n = torch.arange(0, self.turned, 2, device=positions.device, dtype=wide)
        angle = positions.unsqueeze(-1) * self.base ** (-n / max(self.turned, 1))  # (..., T, n)
        cos, sin = (z.unsqueeze(-3).to(dtype) for z in (angle.cos(), angle.sin()))

        def turn(q: Tensor) -> Tensor:
            a, b, rest = q.split((len(n), len(n), q.shape[-1] - self.turned), -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

        return turn

    def grow(
        self,
        *,
        rule: str = "frozen",
        tokens: int,
        ffn_tokens: int | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenformerBlock:
        """A new block with more parameter tokens, see :meth:`TokenParameterAttention.grow`.

        ``ffn_tokens`` keep their ratio to ``tokens`` if None.
        """
        if ffn_tokens is None:
            ffn_tokens = self.ffn.tokens * tokens // self.q.tokens
        grown = copy.deepcopy(self)
        for name, part in self.named_children():
            size = ffn_tokens if name == "ffn" else tokens
            setattr(grown, name, part.grow(rule=rule, tokens=size, generator=generator))
        return grown


def tokenformer(
    dim: int, heads: int, layers: int, tokens: int, ffn_tokens: int | None = None, **options
) -> nn.Sequential:
    """A stack of :class:`TokenformerBlock` with a LayerNorm at the end: (..., T, dim) -> (..., T, dim).

    >>> import torch
    >>> model = tokenformer(32, heads=2, layers=3, tokens=16)
    >>> model(torch.randn(1, 5, 32)).shape
    torch.Size([1, 5, 32])
    """
    blocks = (
        TokenformerBlock(dim, heads, tokens, ffn_tokens, layers=layers, **options)
        for _ in range(layers)
    )
    like = {name: options[name] for name in ("device", "dtype") if name in options}
    return nn.Sequential(*blocks, nn.LayerNorm(dim, **like))
