"""Structured interactions: what head a knows of a pair of tokens is one matrix W_a.

    E(h | x) = -sum_a (1/beta_a) log sum_{s in V} exp(beta_a h^T W_a x_s)
    -dE/dh   = sum_a W_a m_a,    m_a = sum_{s in V} p_as x_s,    p_a = softmax_s(beta_a h^T W_a x_s)

Every structure of W_a is one expression, and the force is W_a times an average of the context:

    energy                       W_a                             numbers      beta_a
    dense_interaction            any                             H D D        beta
    interaction                  Q_a^T K_a                       2 H R D      beta
    diagonal_interaction         diag(lam_a) on a slice          D            beta
    diagonal_plus_low_rank       diag(lam_a) + Q_a^T K_a         2 H R D + D  beta
    symmetric_interaction        Q_a^T diag(sigma_a) Q_a         H R D + H R  beta
    symmetrised_interaction      (Q_a^T K_a + K_a^T Q_a) / 2     2 H R D      beta
    collaborative_interaction    Q^T diag(sigma_a) K             2 R D + H R  beta
    tempered_interaction         Q^T K                           2 R D + H    beta exp(log_beta_a)

H heads, R rank, D dim. W: (heads, dim, dim); Q, K: (heads, rank, dim), without the heads where they
share one; lam: (heads, block) with dim = heads * block; sigma: (heads, rank); log_beta: (heads,).
beta > 0 is 1/sqrt(rank) by default, 1/sqrt(dim) for the dense matrix and 1 for the diagonal.

* symmetric: a token sees in another what the other sees in it, with one matrix that reads, keys
  and writes. Where sigma >= 0 the token is drawn to what is like it, where sigma < 0 away from it.
* symmetrised: Q_a^T K_a without its skew part (Q_a^T K_a - K_a^T Q_a) / 2. The query is
  [Q h ; K h], the key [K x ; Q x], of twice the width.
* diagonal: lam starts at zero, so the layer starts as the identity.
* tempered: heads differ in how sharply they look. The sign of a temperature is known, because its
  logarithm is the parameter.

Concave in h, all of them: W_a does not depend on h, so the scores are linear in it.

>>> import cem
>>> from cem import energies
>>> layer = cem.derive(energies.symmetric_interaction, dim=16, heads=2, rank=4)
>>> layer.lowering.kernels
('matmul', 'sdpa')
>>> {name: tuple(p.shape) for name, p in layer.named_parameters()}
{'Q': (2, 4, 16), 'sigma': (2, 4)}
>>> energies.dense_interaction.curvature, energies.tempered_interaction.curvature
('concave', 'concave')

Source: the energy is that of Energy Transformer (Hoover et al., arXiv:2302.07253) with other W_a;
projections that the heads share, weighted by a vector for each head, are collaborative attention
(Cordonnier, Loukas and Jaggi, arXiv:2006.16362), there for queries and keys alone.
"""

import torch

import cem

dim, rank = cem.dims("dim rank")


@cem.energy(h="dim", x="seq dim", W="heads dim dim")
def dense_interaction(h, x, *, W, beta=dim**-0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta h^T W_a x_s)."""
    score = torch.einsum("i,aij,sj->as", h, W, x)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta


@cem.energy(h="(heads block)", x="seq (heads block)", lam="heads block")
def diagonal_interaction(h, x, *, lam, beta=1.0):
    """E = -(1/beta) sum_a log sum_s exp(beta sum_b lam_ab h_ab x_sab)."""
    own_h = h.unflatten(0, lam.shape)  # (heads, block)
    own_x = x.unflatten(1, lam.shape)  # (seq, heads, block)
    score = torch.einsum("ab,ab,sab->as", lam, own_h, own_x)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", sigma="heads rank")
def symmetric_interaction(h, x, *, Q, sigma, beta=rank**-0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta sum_r sigma_ar (Q_a h)_r (Q_a x_s)_r)."""
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", Q, x)
    score = torch.einsum("ar,ar,asr->as", sigma, q, k)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim")
def symmetrised_interaction(h, x, *, Q, K, beta=rank**-0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta (Q_a h . K_a x_s + K_a h . Q_a x_s) / 2)."""
    forth = torch.einsum("ard,d,arj,sj->as", Q, h, K, x)
    back = torch.einsum("ard,d,arj,sj->as", K, h, Q, x)
    return -torch.logsumexp(beta * (forth + back) / 2, dim=-1).sum() / beta


@cem.energy(h="dim", x="seq dim", Q="rank dim", K="rank dim", sigma="heads rank")
def collaborative_interaction(h, x, *, Q, K, sigma, beta=rank**-0.5):
    """E = -(1/beta) sum_a log sum_s exp(beta sum_r sigma_ar (Q h)_r (K x_s)_r)."""
    score = torch.einsum("ar,r,sr->as", sigma, Q @ h, x @ K.T)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta


@cem.energy(h="dim", x="seq dim", Q="rank dim", K="rank dim", log_beta="heads")
def tempered_interaction(h, x, *, Q, K, log_beta, beta=rank**-0.5):
    """E = -sum_a (1/beta_a) log sum_s exp(beta_a Q h . K x_s), beta_a = beta exp(log_beta_a)."""
    sharpness = beta * torch.exp(log_beta)
    score = torch.einsum("a,s->as", sharpness, x @ K.T @ (Q @ h))
    return -(torch.logsumexp(score, dim=-1) / sharpness).sum()
