"""Grouped interaction energy: several queries share a key, and so a slot of the cache.

    E(h | x) = -(1/beta) sum_go log sum_{s in V} exp(beta q_go . k_gs),
               q_go = Q_go h,  k_gs = K_g x_s
    -dE/dh   = sum_go Q_go^T sum_{s in V} p_gos K_g x_s,    p_go = softmax_s(beta q_go . k_gs)

Q: (groups, per_group, rank, dim), K: (groups, rank, dim); beta > 0, by default 1/sqrt(rank). The
index g of the group is all that says which key a query meets. The key serves as the value, so a
decoder keeps groups * rank numbers a token, where grouped-query attention keeps twice as many. One
group is multi-query attention; one query a group is the interaction energy.

Concave in h, as the interaction energy is, so a step of any size descends.

>>> import cem
>>> from cem.energies import grouped_interaction
>>> layer = cem.derive(grouped_interaction, dim=16, groups=2, per_group=3, rank=4)
>>> layer.lowering.kernels
('matmul', 'sdpa')
>>> tuple(layer.K.shape)
(2, 4, 16)
>>> grouped_interaction.curvature
'concave'

Source: grouped queries are those of Ainslie et al., GQA, arXiv:2305.13245, one group those of
Shazeer, arXiv:1911.02150; there values and the output projection are matrices of their own.
"""

import torch

import cem

rank = cem.dims("rank")


@cem.energy(h="dim", x="seq dim", Q="groups per_group rank dim", K="groups rank dim")
def grouped_interaction(h, x, *, Q, K, beta=rank**-0.5):
    """E = -(1/beta) sum_go log sum_s exp(beta q_go . k_gs)."""
    q = torch.einsum("gord,d->gor", Q, h)
    k = torch.einsum("grd,sd->gsr", K, x)
    score = torch.einsum("gor,gsr->gos", q, k)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta
