"""Soft-capped interaction: no score leaves the interval from -cap to cap.

    E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(z_as),
               z_as = cap tanh(beta q_a . k_as / cap),  q_a = Q_a h,  k_as = K_a x_s
    -dE/dh   = sum_a Q_a^T sum_{s in V} p_as (1 - (z_as / cap)^2) K_a x_s,    p_a = softmax_s(z_as)

Q, K: (heads, rank, dim); beta > 0, by default 1/sqrt(rank); cap > 0, by default 50. As cap grows
this becomes the interaction energy.

The derivative of the cap multiplies the weights: a pair whose score is at the cap exerts no force,
and the weights of a token no longer add up to 1. Attention with capped scores keeps them at 1, so
it is not a gradient. The product of weight and derivative belongs to a pair of tokens, no kernel
takes it, and so the softmax is written out over all pairs.

Neither convex nor concave in h in general. A small step descends.

>>> import cem
>>> from cem.energies import soft_capped_interaction
>>> layer = cem.derive(soft_capped_interaction, dim=16, heads=2, rank=4, cap=20.0)
>>> layer.lowering.kernels
('dense_softmax', 'einsum', 'matmul')
>>> soft_capped_interaction.curvature
'unknown'

Source: logit soft-capping of Gemma 2 (arXiv:2408.00118, section 2), which caps attention at 50.
"""

import torch

import cem

rank = cem.dims("rank")


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim")
def soft_capped_interaction(h, x, *, Q, K, beta=rank**-0.5, cap=50.0):
    """E = -(1/beta) sum_a log sum_s exp(cap tanh(beta q_a . k_as / cap))."""
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    score = cap * torch.tanh(beta * torch.einsum("ar,asr->as", q, k) / cap)
    return -torch.logsumexp(score, dim=-1).sum() / beta
