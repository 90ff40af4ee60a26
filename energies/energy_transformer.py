"""The energy of a block of Energy Transformer: attention to the others, and a memory.

    E(h | x) = -(1/beta) sum_a log sum_{s in V, s != t} exp(beta q_a . k_as) - 1/2 sum_m relu(xi_m . h)^2,
               q_a = Q_a h,  k_as = K_a x_s

Q, K: (heads, rank, dim), of the paper W^Q and W^K; xi: (hidden, dim), one memory a row; beta > 0, by
default 1/sqrt(rank); t is the position of the token, which does not look at its own. Read through a
norm, g = norm(h), and differentiated for all tokens together, it is the layer of the paper, whose
step moves each token C:

    -d/dg_C sum_B E_B = sum_a Q_a^T sum_{s != C} p_aCs K_a g_s        the token looks
                      + sum_a K_a^T sum_{t != C} p_atC Q_a g_t        the token is looked at
                      + xi^T relu(xi g_C)                             the memory,
    p_at = softmax_{s != t}(beta q_at . k_as)

That is ``joint=True``; without it the second line is missing, tokens descend their own energies, and
the layer may be causal. The step goes h+ = h - step_size dE/dg, with the paper's alpha as step size
and its number of iterations as ``steps``.

Concave in h at a fixed context, as a sum of two such energies. The sum of the energies in the states
of all tokens is not, so of a joint step only this is known: a small enough one lowers the sum.

>>> import cem, torch
>>> from cem.energies import energy_transformer
>>> layer = cem.derive(
...     energy_transformer,
...     joint=True,
...     causal=False,
...     norm=torch.nn.LayerNorm(16),
...     steps=12,
...     update=cem.GradientDescent(0.1),
...     dim=16,
...     heads=2,
...     rank=4,
...     hidden=24,
... )
>>> layer.lowering.kernels
('matmul', 'sdpa', 'transposed_sdpa')
>>> h = torch.randn(1, 5, 16)
>>> bool(layer.energy(layer(h)).sum() < layer.energy(h).sum())
True
>>> energy_transformer.curvature
'concave'

Source: Hoover et al., Energy Transformer, arXiv:2302.07253, equations 1 and 4 to 8; the LayerNorm of its
equation 1 has one gain for all coordinates, which makes it a gradient.
"""

import sympy
from sympy import Sum

import cem

dim, heads, rank, hidden = cem.dims("dim heads rank hidden")
h, x = cem.state(dim), cem.context(dim)
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
xi = cem.parameter("xi", hidden, dim)
beta = cem.scalar("beta", default=rank**-0.5, positive=True)
i, a, r, m, s = (
    size.index(name) for size, name in zip((dim, heads, rank, hidden, x), "iarms", strict=True)
)

score = beta * Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, i] * x[s, i], i), r)
others = cem.only(sympy.Ne(cem.position(h), cem.position(s)))
attention = -Sum(cem.logsumexp(score + others, s), a) / beta
memory = -Sum(cem.relu(Sum(xi[m, i] * h[i], i)) ** 2, m) / 2

energy_transformer = cem.Energy(attention + memory, name="energy_transformer")
