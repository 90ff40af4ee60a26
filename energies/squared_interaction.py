"""Squared interaction: the score enters squared, not exponentiated, which makes attention linear.

    E(h | x) = -1/2 sum_a sum_{s in V} (q_a . k_as)^2,    q_a = Q_a h,  k_as = K_a x_s
    -dE/dh   = sum_a Q_a^T M_a Q_a h,    M_a = sum_{s in V} k_as k_as^T

Q, K: (heads, rank, dim). Every pair of tokens is weighted by its score, nothing is normalised, and
so the context enters through the matrix M_a alone, of shape (rank, rank): a sum over the past that
a decoder carries along in the place of a cache that grows. The key is the value.

M_a is positive semi-definite and E quadratic, with the Hessian -sum_a Q_a^T M_a Q_a: concave, so a
step of any size descends. The force grows with the number of visible tokens, as E does.

>>> import cem
>>> from cem.energies import squared_interaction
>>> layer = cem.derive(squared_interaction, dim=16, heads=2, rank=4)
>>> layer.lowering.kernels
('linear_attention', 'matmul')
>>> squared_interaction.curvature
'concave'

Source: the layer is linear attention (Katharopoulos et al., arXiv:2006.16236) without its
normaliser, with the identity as feature map and the values tied to the keys.
"""

import torch

import cem


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim")
def squared_interaction(h, x, *, Q, K):
    """E = -1/2 sum_a sum_s (q_a . k_as)^2."""
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    return -0.5 * torch.einsum("ar,asr->as", q, k).square().sum()
