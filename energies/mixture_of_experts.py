"""Mixture-of-experts energy: the router is no matrix, it is the softmax of the experts.

    E(h)   = -(1/beta) log sum_e exp(beta v_e),    v_e = 1/2 sum_m g(G_em . c) (U_em . h)^2
    -dE/dh = sum_e p_e U_e^T ( g(G_e c) * U_e h ),    p = softmax_e(beta v_e),    c = frozen(h)

U, G: (experts, hidden, dim); g is an activation; beta > 0, by default 1/sqrt(hidden). -v_e is the
gated energy of expert e, and E is their soft minimum: min_e(-v_e) - log(experts) / beta <= E <=
min_e(-v_e). Deriving it gives the layer of a softmax mixture: every expert's force, weighted by
its share. Large beta routes a token to the expert of lowest energy; at small beta the force is
the mean of all.

Every expert is computed for every token: the weights are soft, no token is dropped.

Where no gate is negative (relu, sigmoid) the v_e are convex, so is their log-sum-exp, and E is
concave: a step of any size descends. silu and gelu have negative gates and promise nothing.

>>> import cem
>>> from cem.energies import mixture_of_experts, mixture_of_experts_by
>>> layer = cem.derive(mixture_of_experts, dim=16, experts=4, hidden=8)
>>> layer.lowering.kernels
('einsum', 'matmul')
>>> mixture_of_experts.curvature, mixture_of_experts_by(cem.relu).curvature
('unknown', 'concave')

Source: adaptive mixtures of local experts minimise such a soft minimum of the experts' errors
(Jacobs, Jordan, Nowlan and Hinton, Neural Computation 3, 1991, equation 1.3), with weights of a
gating network beside it; the experts are gated linear units (Shazeer, arXiv:2002.05202).
"""

from sympy import Function, Sum

import cem

dim, hidden, experts = cem.dims("dim hidden experts")
h = cem.state(dim)
U, G = cem.parameter("U", experts, hidden, dim), cem.parameter("G", experts, hidden, dim)
beta = cem.scalar("beta", default=hidden**-0.5, positive=True)
i, m, e = dim.index("i"), hidden.index("m"), experts.index("e")


def mixture_of_experts_by(g: type[Function], name: str | None = None) -> cem.Energy:
    """The mixture of gated energies with the activation g, a word such as ``cem.silu``."""
    gate = g(Sum(G[e, m, i] * cem.frozen(h)[i], i))
    up = Sum(U[e, m, i] * h[i], i)
    value = Sum(gate * up**2, m) / 2
    name = name or f"mixture_of_experts_{g.__name__}"
    return cem.Energy(-cem.logsumexp(beta * value, e) / beta, name=name)


mixture_of_experts_silu = mixture_of_experts_by(cem.silu)
mixture_of_experts_relu = mixture_of_experts_by(cem.relu)

mixture_of_experts = mixture_of_experts_silu
