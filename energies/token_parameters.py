"""Token-parameter energies: attention from the state to parameter tokens, values tied to keys.

With the scores a_n = K_n . h and F' = f, F(0) = 0 where the norm moves:

    token_parameters               E(h) = -(r/s) sum_n F(s a_n / r),    r = |K c|, c = frozen(h)
                                   -dE/dh = K^T f(s K h / r)
    consistent_token_parameters    E(h) = -(r/s) sum_n F(s a_n / r),    r = |K h|
                                   -dE/dh = K^T ( f(z) + u sum_n (F(z_n)/s - u_n f(z_n)) ),  u = K h / r, z = s u
    unnormalised_token_parameters  E(h) = -sum_n gain_n F(a_n)
                                   -dE/dh = K^T ( gain * f(K h) )

K: (tokens, dim); gain: (tokens,); the scale s > 0, by default sqrt(tokens). f is gelu, or another
activation by ``token_parameters_by``. r^2 has eps added, so that a state of zeros has a step.

The first is the layer of Tokenformer with its values tied to its keys: f(s a / |a|). No function of
the state has that step as its gradient, since its Jacobian is not symmetric; it differs by a
matrix of rank two, because |a| moves with the state. Read at the frozen state, the norm is part of the
context, s/r an inverse temperature for each token, and the layer is what one gradient step gives. In the
second energy the norm moves, which adds the term with u. The third has no norm; its gains of both
signs are an MLP whose down projection is a rescaled up projection, every such MLP that is a gradient.

With relu the first is concave, since F is convex: every step descends. gelu falls below -0.75.

>>> import cem
>>> from cem.energies import token_parameters, token_parameters_by, token_parameters_relu
>>> cem.derive(token_parameters, dim=16, tokens=24).lowering.kernels
('matmul',)
>>> token_parameters.curvature, token_parameters_relu.curvature
('unknown', 'concave')
>>> token_parameters_by(cem.silu).name
'token_parameters_silu'

Source: Wang et al., TokenFormer, arXiv:2410.23168, equations 4 to 6, with values of its own where we
have the keys; :mod:`cem.token_parameters` has that layer, and how it grows.
"""

import torch
from sympy import Expr, Function, Sum, sqrt

import cem

dim, tokens = cem.dims("dim tokens")
h, K = cem.state(dim), cem.parameter("K", tokens, dim)
gain = cem.parameter("gain", tokens)
i, n = dim.index("i"), tokens.index("n")
scale = cem.scalar("scale", default=tokens**0.5, positive=True)
eps = cem.scalar("eps", default=1e-12, positive=True)
score = Sum(K[n, i] * h[i], i)


def norm(score: Expr) -> Expr:
    """The norm of the scores, for a state of zeros the root of eps."""
    return sqrt(Sum(score**2, n) + eps)


def token_parameters_by(f: type[Function], name: str | None = None) -> cem.Energy:
    """The energy at a frozen temperature with the activation f, a word that has an antiderivative."""
    r = norm(cem.frozen(score))
    value = Sum(cem.antiderivative(f)(scale * score / r), n)
    return cem.Energy(-r / scale * value, name=name or f"token_parameters_{f.__name__}")


def consistent_token_parameters_by(f: type[Function], name: str | None = None) -> cem.Energy:
    """The energy whose temperature moves with the state."""
    r, F = norm(score), cem.antiderivative(f)
    start = F(torch.zeros((), dtype=torch.float64, device="cpu")).item()
    value = Sum(F(scale * score / r) - start, n)
    return cem.Energy(-r / scale * value, name=name or f"consistent_token_parameters_{f.__name__}")


def unnormalised_token_parameters_by(f: type[Function], name: str | None = None) -> cem.Energy:
    """The energy without a norm, one gain a token."""
    value = -Sum(gain[n] * cem.antiderivative(f)(score), n)
    return cem.Energy(value, name=name or f"unnormalised_token_parameters_{f.__name__}")


token_parameters = token_parameters_by(cem.gelu, "token_parameters")
token_parameters_relu = token_parameters_by(cem.relu)
consistent_token_parameters = consistent_token_parameters_by(
    cem.gelu, "consistent_token_parameters"
)
unnormalised_token_parameters = unnormalised_token_parameters_by(
    cem.gelu, "unnormalised_token_parameters"
)
