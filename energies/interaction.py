"""Interaction energy: weight-tied multi-head attention is its gradient step.

    E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta q_a . k_as),   q_a = Q_a h,  k_as = K_a x_s
    -dE/dh   = sum_a Q_a^T sum_{s in V} p_as K_a x_s,    p_a = softmax_s(beta q_a . k_as)

Q, K: (heads, rank, dim); beta > 0, by default 1/sqrt(rank). Two matrices where attention has
four: the values are the keys, and the output projection is the query projection transposed.

Concave in h: a log-sum-exp of scores that are linear in h is convex, and the sign turns it over.
So a step of any size lowers the energy while the context stays where it is.

>>> import cem
>>> from cem.energies import interaction
>>> cem.derive(interaction, dim=16, heads=2, rank=8).lowering.kernels
('matmul', 'sdpa')
>>> interaction.curvature
'concave'

Source: the attention energy of Energy Transformer (Hoover et al., arXiv:2302.07253), there one
energy of all tokens together, here a conditional energy of one token with the others held fixed.
"""

import torch

import cem

rank = cem.dims("rank")


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim")
def interaction(h, x, *, Q, K, beta=rank**-0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta q_a . k_as)."""
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    score = torch.einsum("ar,asr->as", q, k)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta
