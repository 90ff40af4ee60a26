"""Interaction energy: weight-tied multi-head attention is its gradient step.

    E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta sum_r q_ar k_asr),    q = Q h,  k = K x
    -dE/dh   = sum_a Q_a^T sum_{s in V} p_as K_a x_s,    p_a = softmax_s(beta sum_r q_ar k_asr)

Q, K: (heads, rank, dim). Two matrices where attention has four: the values are the keys, the output projection
is the query projection transposed. Concave in h for beta > 0.

Source: the interaction term of Energy Transformer (Hoover et al., arXiv:2302.07253, eq. 4), taken as a
conditional energy of one token; retrieval form in Ramsauer et al., arXiv:2008.02217.
"""

import torch

import cem


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim")
def interaction(h, x, *, Q, K, beta=cem.dims("rank") ** -0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta q_a . k_as).

    >>> import cem
    >>> from cem.energies import interaction
    >>> cem.derive(interaction, dim=16, heads=2, rank=8).lowering.kernels
    ('matmul', 'sdpa')
    """
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    score = torch.einsum("ar,asr->as", q, k)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta
