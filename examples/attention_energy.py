"""Rotary attention from an energy, in the torch pen.

The energy of a token is a log-sum-exp over the tokens that it may see; its gradient is multi-head
attention with values tied to keys, turned as the keys are and back again. A head has a slope by
which what is further away counts less. Expected last line:

    largest difference from hand-written attention below 1e-5: True
"""

import torch
from torch.nn import functional as F

import cem


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim", log_slope="heads")
def interaction(h, x, *, Q, K, log_slope, position, context_position, beta=1.0):
    q = cem.rope(torch.einsum("ard,d->ar", Q, h), position)
    k = cem.rope(torch.einsum("ard,sd->asr", K, x), context_position)
    far = log_slope.exp()[:, None] * (position - context_position)
    return -torch.logsumexp(beta * torch.einsum("ar,asr->as", q, k) - far, dim=-1).sum() / beta


def turned(q, way=1):
    """The rotation of rotary attention on (..., T, rank); with way=-1 back again."""
    T, rank = q.shape[-2:]
    angles = way * torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, rank, 2) / rank)
    a, b = q.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def by_hand(h, Q, K, slope, beta):
    """The same layer as a person would write it: h (B, T, dim), Q and K (heads, rank, dim)."""
    q = turned(torch.einsum("ard,btd->batr", Q, h))
    k = turned(torch.einsum("ard,bsd->basr", K, h))
    T = h.shape[1]
    far = torch.arange(T)[:, None] - torch.arange(T)
    bias = (-slope[:, None, None] * far).masked_fill(far < 0, -torch.inf)
    mixed = turned(F.scaled_dot_product_attention(q, k, k, attn_mask=bias, scale=beta), -1)
    return h + torch.einsum("ard,batr->btd", Q, mixed)


def main():
    beta = 32**-0.5
    layer = cem.derive(interaction, dim=128, heads=4, rank=32, beta=beta)
    print(layer.derivation)
    h = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))
    difference = (layer(h) - by_hand(h, layer.Q, layer.K, layer.log_slope.exp(), beta)).abs().max()
    print(f"largest difference from hand-written attention below 1e-5: {bool(difference < 1e-5)}")


if __name__ == "__main__":
    main()
