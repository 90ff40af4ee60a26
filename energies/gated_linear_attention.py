"""Gated linear attention energy: linear attention whose past decays is its gradient step.

    E(h | x) = -1/2 sum_a sum_{s in V} d_as (q_a . k_as)^2,   q_a = Q_a h,  k_as = K_a x_s
    -dE/dh   = sum_a Q_a^T sum_{s in V} d_as (q_a . k_as) k_as
    d_as     = prod_{u in V, u > s} sigmoid(G_a x_u + bias_a)

Q, K: (heads, rank, dim), G: (heads, dim), bias: (heads,). What a head keeps of a token is the product
of the gates of the tokens after it, so the sum over the past is a state of rank x rank numbers that
each token first shrinks and then adds to: memory and time are linear in the sequence, and a decoder
keeps the state instead of the keys.

Concave in h, since every d_as >= 0: a step of any size lowers the energy while the context stays
where it is. With G = 0 the decay of a head is one number, as in a retentive network.

>>> import cem
>>> from cem.energies import gated_linear_attention
>>> cem.derive(gated_linear_attention, dim=16, heads=2, rank=8).lowering.kernels
('linear_attention', 'matmul')
>>> gated_linear_attention.curvature
'concave'

Source: Yang et al., Gated Linear Attention Transformers, arXiv:2312.06635, with one gate a head as
in Mamba-2 (arXiv:2405.21060) and with the values tied to the keys.
"""

import torch

import cem


@cem.energy(
    h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim", G="heads dim", bias="heads"
)
def gated_linear_attention(h, x, *, Q, K, G, bias):
    """E = -1/2 sum_a sum_s d_as (q_a . k_as)^2."""
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    gate = torch.nn.functional.logsigmoid(torch.einsum("ad,sd->as", G, x) + bias[:, None])
    return -0.5 * (cem.decay(gate) * torch.einsum("ar,asr->as", q, k).square()).sum()
