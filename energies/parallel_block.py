"""Parallel block: attention and a gated MLP in one step, because their energies are added.

    E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta q_a . k_as)
               - 1/2 sum_m g(G_m . c) (U_m . h)^2
    -dE/dh   = sum_a Q_a^T sum_{s in V} p_as K_a x_s + U^T ( g(G c) * U h ),    c = frozen(h)

Q, K: (heads, rank, dim); U, G: (hidden, dim); g is silu; beta > 0, by default 1/sqrt(rank). The
gradient of a sum is the sum of the gradients, so one step moves along both forces, each taken at
the same state, where two layers one after another would take the second at a state that the first
has moved. One energy means one number per token that either force may lower. Any two energies of
one state add up in this way: ``interaction + 0.5 * gated_relu``.

A sum of concave energies is concave. silu has negative gates, so this one promises nothing beyond
small steps; with ``gated_relu`` in the place of ``gated`` a step of any size descends.

>>> import cem
>>> from cem.energies import gated_relu, interaction, parallel_block
>>> layer = cem.derive(parallel_block, dim=16, heads=2, rank=4, hidden=24)
>>> layer.lowering.kernels
('matmul', 'sdpa')
>>> sorted(name for name, _ in layer.named_parameters())
['G', 'K', 'Q', 'U']
>>> parallel_block.curvature, (interaction + gated_relu).curvature
('unknown', 'concave')

Source: attention and MLP side by side are those of GPT-J (Wang and Komatsuzaki, 2021) and PaLM
(Chowdhery et al., arXiv:2204.02311, section 2); the sum of an attention and a memory energy is
Energy Transformer (Hoover et al., arXiv:2302.07253).
"""

from .gated import gated
from .interaction import interaction

parallel_block = (interaction + gated).renamed("parallel_block")
