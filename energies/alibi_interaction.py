"""Interaction energy with linear biases: a head looks less at what is far away.

    E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta q_a . k_as - slope_a (t - s)),
               q_a = Q_a h,  k_as = K_a x_s
    -dE/dh   = sum_a Q_a^T sum_{s in V} p_as K_a x_s,
               p_a = softmax_s(beta q_a . k_as - slope_a (t - s))

Q, K: (heads, rank, dim); slope: (heads,), a learned number a head; beta > 0, by default
1/sqrt(rank); t and s are the positions of the token and of what it sees. The published slopes are a
geometric row, ``cem.alibi_slopes(heads)``, and are not trained; a layer draws ``slope`` at random, as
it draws every parameter, so copy them in as the example does.

A bias of all pairs of tokens is never made. -slope_a t is the same for all s and leaves the softmax
alone; slope_a s is a product of something of the head and something of the context token, one more
column of queries and keys. It is three columns, in which the digits of a float32 position survive
keys in bfloat16, and any kernel of attention takes them.

Concave in h, as the interaction energy is: the bias does not depend on h. Any step size descends.

>>> import cem, torch
>>> from cem.energies import alibi_interaction
>>> layer = cem.derive(alibi_interaction, dim=16, heads=2, rank=4)
>>> layer.slope.data.copy_(torch.tensor([float(slope) for slope in cem.alibi_slopes(2)]))
tensor([0.0625, 0.0039])
>>> layer.lowering.kernels
('matmul', 'sdpa')
>>> alibi_interaction.curvature
'concave'

Source: Press et al., Train Short, Test Long, arXiv:2108.12409, section 3, whose slopes are fixed.
"""

import torch

import cem

rank = cem.dims("rank")


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim", slope="heads")
def alibi_interaction(h, x, *, Q, K, slope, position, context_position, beta=rank**-0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta q_a . k_as - slope_a (t - s))."""
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    score = beta * torch.einsum("ar,asr->as", q, k)
    bias = torch.einsum("a,s->as", slope, position - context_position)
    return -torch.logsumexp(score - bias, dim=-1).sum() / beta
