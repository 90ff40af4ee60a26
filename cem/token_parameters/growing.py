"""More parameter tokens for a trained layer, without a change of what it computes.

Legend: n old tokens, m new ones, I features in, O features out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .normalisers import ACTIVATIONS, NORMALISERS

if TYPE_CHECKING:
    from .attention import TokenParameterAttention

Draw = Callable[..., Tensor]
Rows = tuple[Tensor, Tensor, float]
"""Keys and values (or gains) of all tokens, and by how much the scale grows."""


def grow(
    layer: TokenParameterAttention, *, rule: str, tokens: int, generator: torch.Generator | None
) -> TokenParameterAttention:
    """See :meth:`TokenParameterAttention.grow`."""
    if rule not in RULES:
        raise ValueError(f"`rule` is one of {', '.join(RULES)}: got {rule!r}")
    if tokens <= layer.tokens:
        raise ValueError(
            f"a layer of {layer.tokens} tokens grows to more: got tokens={tokens}; type at least"
            f" `tokens={layer.tokens + 1}`"
        )
    device = layer.K.device
    source = device if generator is None else generator.device

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=source, dtype=torch.float64)
        return drawn.to(device)

    with torch.no_grad():
        own = layer.gain if layer.tie else layer.V
        found = RULES[rule](layer, layer.K.double(), own.double(), tokens - layer.tokens, draw)
        keys, values, factor = found
        grown = layer.resized(tokens, factor)
        grown.K.copy_(keys)
        (grown.gain if layer.tie else grown.V).copy_(values)
    return grown


def _frozen(layer: TokenParameterAttention, K: Tensor, V: Tensor, new: int, draw: Draw) -> Rows:
    if layer.tie or layer.normaliser == "none":
        _refuse_dead(K, "keys", "frozen")
        keys, values = K.std() * draw(new, K.shape[1]), V.new_zeros(new, *V.shape[1:])
    else:
        _check_vanishing(layer)
        _refuse_dead(V, "values", "frozen")
        keys, values = K.new_zeros(new, K.shape[1]), V.std() * draw(new, V.shape[1])
    return torch.cat((K, keys)), torch.cat((V, values)), 1.0


def _norm_matched(
    layer: TokenParameterAttention, K: Tensor, V: Tensor, new: int, draw: Draw
) -> Rows:
    if layer.normaliser != "l2_norm_gelu":
        raise ValueError(
            f"`norm_matched` keeps the norm of the scores, which only l2_norm_gelu divides by: got"
            f" normaliser={layer.normaliser!r}; type `rule='duplicate'`"
        )
    _refuse_dead(K, "keys", "norm_matched")
    _, sizes, axes = torch.linalg.svd(K, full_matrices=False)
    rank = int((sizes > sizes[0] * max(K.shape) * torch.finfo(layer.K.dtype).eps).sum())
    if new < rank:
        raise ValueError(
            f"`norm_matched` needs as many new tokens as the rank of the keys, {rank}: got {new}; type at least"
            f" `tokens={layer.tokens + rank}`"
        )
    # |a_new|^2 = (m/n) x^T K^T K x, through the singular values and right vectors of K.
    directions = torch.linalg.qr(draw(new, rank)).Q  # (m, rank), orthonormal columns
    keys = (new / layer.tokens) ** 0.5 * directions * sizes[:rank] @ axes[:rank]
    factor = 1.0 if layer.tie else _growth_of_scale(layer, new)
    values = V.new_zeros(new, *V.shape[1:])
    return torch.cat((K, keys)), torch.cat((V, values)), factor


def _duplicate(layer: TokenParameterAttention, K: Tensor, V: Tensor, new: int, draw: Draw) -> Rows:
    total = layer.tokens + new
    copy_of = torch.arange(total, device=K.device) % layer.tokens
    if layer.tie:
        weight = (draw(total) / 4).tanh() + 2  # shares of one gain, all of its sign
        sums = weight.new_zeros(layer.tokens).index_add(0, copy_of, weight)
        return K[copy_of], V[copy_of] * weight / sums[copy_of], 1.0
    copies, rest = divmod(total, layer.tokens)
    if rest:
        raise ValueError(
            f"`duplicate` copies every token equally often: got {layer.tokens} tokens and tokens={total}; type"
            f" `tokens={layer.tokens * max(2, copies)}`"
        )
    uneven = V.std() / 2 * draw(copies, *V.shape)
    values = V / copies + uneven - uneven.mean(0)
    return K[copy_of], values.flatten(0, 1), _growth_of_scale(layer, new)


def _random(layer: TokenParameterAttention, K: Tensor, V: Tensor, new: int, draw: Draw) -> Rows:
    keys = layer.key_std * draw(new, K.shape[1])
    values = V.new_ones(new) if layer.tie else layer.value_std * draw(new, V.shape[1])
    return torch.cat((K, keys)), torch.cat((V, values)), _growth_of_scale(layer, new)


RULES = {
    "frozen": _frozen,
    "norm_matched": _norm_matched,
    "duplicate": _duplicate,
    "random": _random,
}


def _growth_of_scale(layer: TokenParameterAttention, new: int) -> float:
    return (1 + new / layer.tokens) ** NORMALISERS[layer.normaliser].power


def _refuse_dead(old: Tensor, what: str, rule: str) -> None:
    """What is drawn is as large as the old ones; the other factor of the product starts at zero."""
    if not old.any():
        raise ValueError(
            f"`{rule}` draws new {what} as large as the old ones, which are all zero: new keys and values would"
            " both be zero, and get no gradient; train first, or type `rule='random'`"
        )


def _check_vanishing(layer: TokenParameterAttention) -> None:
    """A token whose key is zero scores 0 for every input: it must weigh nothing, and be able to learn."""
    if layer.normaliser == "softmax":
        raise ValueError(
            "`frozen` gives new tokens zero keys, and a softmax weighs a score of 0 by exp(0) = 1, so that the"
            " function changes; type `rule='duplicate'`"
        )
    zero = torch.zeros((), dtype=torch.float64)
    f = ACTIVATIONS[layer.activation].torch
    value, slope = f(zero).item(), torch.func.grad(f)(zero).item()
    if value or not slope:
        raise ValueError(
            "`frozen` gives new tokens zero keys, which needs an activation with f(0) = 0 and f'(0) != 0:"
            f" {layer.activation} has {value:.3g} and {slope:.3g}; type `rule='duplicate'`"
        )
