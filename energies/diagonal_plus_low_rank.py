"""Diagonal plus low rank: an interaction energy whose heads also compare coordinates as they are.

    E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta h^T W_a x_s),
               W_a = diag(lam_a) + Q_a^T K_a
    -dE/dh   = sum_a ( lam_a * m_a + Q_a^T K_a m_a ),    m_a = sum_{s in V} p_as x_s,
               p_a = softmax_s(beta h^T W_a x_s)

Q, K: (heads, rank, dim); beta > 0, by default 1/sqrt(rank). The diagonal has one of two supports:

* block, ``diagonal_plus_low_rank``: dim = heads * block and lam: (heads, block). Head a owns the
  coordinates from a * block to (a + 1) * block; lam_a is zero elsewhere. Together the heads own
  every coordinate once.
* full, ``diagonal_plus_low_rank_full``: lam: (heads, dim). Every head sees every coordinate.

``rotary_diagonal_plus_low_rank`` is the first with rotary positions in its low-rank part, so the
diagonal compares and copies content whatever the distance.

One attention call computes each: the query [lam_a * h ; Q_a h] meets [x_s ; K_a x_s], which is
key and value (with the slice of head a alone, in the block support). At lam = 0 both are the
interaction energy.

Concave in h, as the interaction energy is: W_a does not depend on h.

>>> import cem
>>> from cem.energies import diagonal_plus_low_rank
>>> layer = cem.derive(diagonal_plus_low_rank, dim=16, heads=2, rank=4)
>>> layer.lowering.kernels
('matmul', 'sdpa')
>>> layer.lam.shape
torch.Size([2, 8])
>>> diagonal_plus_low_rank.curvature
'concave'

Source: the interaction energy is that of Energy Transformer (Hoover et al., arXiv:2302.07253).
"""

import torch

import cem

rank = cem.dims("rank")

OWN_BLOCKS = {
    "h": "(heads block)",
    "x": "seq (heads block)",
    "Q": "heads rank (heads block)",
    "K": "heads rank (heads block)",
    "lam": "heads block",
}


def own_score(h, x, lam):
    """sum_b lam_ab h_ab x_sab, (heads, seq): what the diagonal of a head's own block says."""
    own_h = h.unflatten(0, lam.shape)  # (heads, block)
    own_x = x.unflatten(1, lam.shape)  # (seq, heads, block)
    return torch.einsum("ab,ab,sab->as", lam, own_h, own_x)


@cem.energy(**OWN_BLOCKS)
def diagonal_plus_low_rank(h, x, *, Q, K, lam, beta=rank**-0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta (q_a . k_as + sum_b lam_ab h_ab x_sab))."""
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    score = torch.einsum("ar,asr->as", q, k) + own_score(h, x, lam)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim", lam="heads dim")
def diagonal_plus_low_rank_full(h, x, *, Q, K, lam, beta=rank**-0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta (q_a . k_as + sum_d lam_ad h_d x_sd))."""
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    score = torch.einsum("ar,asr->as", q, k) + torch.einsum("ad,d,sd->as", lam, h, x)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta


@cem.energy(**OWN_BLOCKS)
def rotary_diagonal_plus_low_rank(h, x, *, Q, K, lam, position, context_position, beta=rank**-0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta (R_t q_a . R_s k_as + sum_b lam_ab h_ab x_sab))."""
    q = cem.rope(torch.einsum("ard,d->ar", Q, h), position)
    k = cem.rope(torch.einsum("ard,sd->asr", K, x), context_position)
    score = torch.einsum("ar,asr->as", q, k) + own_score(h, x, lam)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta
