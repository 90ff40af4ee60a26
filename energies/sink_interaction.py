"""Interaction energy with a sink: a head may look at nothing.

    E(h | x) = -(1/beta) sum_a log( exp(b_a) + sum_{s in V} exp(beta q_a . k_as) )
             = -(1/beta) sum_a ( b_a + softplus(L_a - b_a) ),
               L_a = log sum_{s in V} exp(beta q_a . k_as),   q_a = Q_a h,  k_as = K_a x_s
    -dE/dh   = sum_a sigmoid(L_a - b_a) Q_a^T sum_{s in V} p_as K_a x_s,
               p_a = softmax_s(beta q_a . k_as)

Q, K: (heads, rank, dim); b: (heads,), the logit of the sink, learned; beta > 0, by default
1/sqrt(rank). The sink is one more thing to look at, with nothing in it: it takes its share of the
weights, and the share of the tokens is the gate sigmoid(L_a - b_a). At b = 0 the weights are
exp(z_s) / (1 + sum exp(z_u)), the softmax off by one; as b falls the sink goes away and the energy
becomes the interaction energy.

The gate needs the log-sum-exp, which the kernel of attention has anyway: nothing of all pairs of
tokens is made. A token that sees nothing stays where it is.

Concave in h: the logarithm of a sum of exponentials of affine functions is convex, and b is one of
them. A step of any size descends. No force is longer than that of the interaction energy.

>>> import cem
>>> from cem.energies import sink_interaction
>>> layer = cem.derive(sink_interaction, dim=16, heads=2, rank=4)
>>> layer.lowering.kernels
('matmul', 'sdpa')
>>> sink_interaction.curvature
'concave'

Source: the learned logit is that of gpt-oss (OpenAI, arXiv:2508.10925); b = 0 is the SoftMax1 of
Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453, section 3.3,
after Miller, Attention Is Off By One, 2023.
"""

import torch

import cem

rank = cem.dims("rank")


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim", b="heads")
def sink_interaction(h, x, *, Q, K, b, beta=rank**-0.5):
    """E = -(1/beta) sum_a (b_a + softplus(L_a - b_a)), L_a = log sum_s exp(beta q_a . k_as)."""
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    L = torch.logsumexp(beta * torch.einsum("ar,asr->as", q, k), dim=-1)  # (heads,)
    return -(b + torch.nn.functional.softplus(L - b)).sum() / beta
