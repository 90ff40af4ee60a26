"""Subspace compression: attention in which each head has one matrix, the basis of a subspace.

    E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta (U_a h) . (U_a x_s))
    -dE/dh   = sum_a U_a^T sum_{s in V} p_as U_a x_s,    p_a = softmax_s(beta (U_a h) . (U_a x_s))

U: (heads, rank, dim), a row for each direction of the subspace of head a; beta > 0, by default
1/sqrt(rank). Query, key and value are one projection, and its transpose writes: one matrix where
attention has four, and one tensor in a decoder's cache. It is ``symmetric_interaction`` at
sigma = 1 and the interaction energy at Q = K.

The force is the subspace attention operator MSSA of CRATE to the letter, as long as the context is
held fixed, also where the context token is the state itself. What CRATE has beside it:

* its operator is an approximate gradient step on the coding rate of all tokens together, up to
  constants sum_a log det(1 + (U_a Z)(U_a Z)^T), whose inverse matrix is expanded to first order and
  then replaced by a softmax. Of that rate it is not the gradient; of E it is, exactly;
* the expansion leaves a term along the state, (1 - k) h + k MSSA(h): a step of size k on
  E + |h|^2 / 2;
* in training the transpose that writes becomes a matrix (and a bias) of its own, and then it is
  no gradient in h; LayerNorm stands in front, and nothing is masked.

Concave in h, so a step of any size descends.

>>> import cem
>>> from cem.energies import subspace_compression
>>> layer = cem.derive(subspace_compression, dim=16, heads=4, rank=4)
>>> layer.lowering.kernels
('matmul', 'sdpa')
>>> subspace_compression.curvature
'concave'

Source: Yu et al., White-Box Transformers via Sparse Rate Reduction, arXiv:2306.01129 and
arXiv:2311.13110, where the columns of U_k are our rows of U_a; its program scales the scores by
1/sqrt(rank).
"""

import torch

import cem

rank = cem.dims("rank")


@cem.energy(h="dim", x="seq dim", U="heads rank dim")
def subspace_compression(h, x, *, U, beta=rank**-0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta (U_a h) . (U_a x_s))."""
    own = torch.einsum("ard,d->ar", U, h)
    seen = torch.einsum("ard,sd->asr", U, x)
    score = torch.einsum("ar,asr->as", own, seen)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta
