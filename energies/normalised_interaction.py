"""Normalised interaction: heads compare directions, and a temperature says how sharply.

    E(h | x) = -sum_a (1/beta_a) log sum_{s in V} exp(beta_a u_a . v_as),
               u_a = Q_a h / |Q_a h|,  v_as = K_a x_s / |K_a x_s|,  beta_a = beta exp(log_beta_a)
    -dE/dh   = sum_a Q_a^T (1 - u_a u_a^T) m_a / |Q_a h|,
               m_a = sum_{s in V} p_as v_as,    p_a = softmax_s(beta_a u_a . v_as)

Q, K: (heads, rank, dim); log_beta: (heads,); beta > 0, by default sqrt(rank). A score is a cosine
times beta_a, so it lies between -beta_a and beta_a however large the matrices become. For random
directions a cosine has the size 1/sqrt(rank), and sqrt(rank) gives scores of size 1.

The Jacobian of the normalisation appears in the force, which attention with normalised queries and
keys does not have: 1 - u u^T takes out of the average what only makes the query longer, since the
energy cannot see a length, and 1/|Q_a h| makes the step of a long query short. The energy has no
derivative where Q_a h = 0.

Neither convex nor concave in h: E does not change along h, and is bounded. A small step descends.

>>> import cem
>>> from cem.energies import normalised_interaction
>>> layer = cem.derive(normalised_interaction, dim=16, heads=2, rank=4)
>>> layer.lowering.kernels
('einsum', 'matmul', 'sdpa')
>>> normalised_interaction.curvature
'unknown'

The average m_a is one attention call, and the part of it along the query, u_a . m_a, is made of
its result.

Source: Henry et al., Query-Key Normalization for Transformers, arXiv:2010.04245, with one learned
number for all heads where we have beta_a; ViT-22B (Dehghani et al., arXiv:2302.05442, section 2)
normalises queries and keys by LayerNorm.
"""

import torch

import cem

rank = cem.dims("rank")


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim", log_beta="heads")
def normalised_interaction(h, x, *, Q, K, log_beta, beta=rank**0.5):
    """E = -sum_a (1/beta_a) log sum_s exp(beta_a cos(Q_a h, K_a x_s))."""
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    q = q / torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    k = k / torch.linalg.vector_norm(k, dim=-1, keepdim=True)
    sharpness = beta * torch.exp(log_beta)  # (heads,)
    score = torch.einsum("a,ar,asr->as", sharpness, q, k)
    return -(torch.logsumexp(score, dim=-1) / sharpness).sum()
