"""Attention from tokens to parameters (Tokenformer), how it grows, and which of its layers descend an energy.

    y = V^T w(K x)

K: (tokens, in_features), one key a row; V: (tokens, out_features); w normalises a row of scores.

>>> import torch
>>> from cem.token_parameters import TokenParameterAttention
>>> layer = TokenParameterAttention(16, 16, tokens=64)
>>> x = torch.randn(2, 5, 16)
>>> grown = layer.grow(tokens=96)  # a new layer: the same function, with 32 tokens that can learn
>>> torch.allclose(grown(x), layer(x), atol=1e-6)
True
>>> layer.potential.label, TokenParameterAttention(16, 16, tokens=64, tie=True).potential.label
('none', 'frozen-context')

Source: Wang et al., TokenFormer, arXiv:2410.23168.
"""

from .attention import TokenParameterAttention
from .block import TokenformerBlock, tokenformer
from .potential import Potential, potential

__all__ = ["Potential", "TokenParameterAttention", "TokenformerBlock", "potential", "tokenformer"]
