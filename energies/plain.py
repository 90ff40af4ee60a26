"""Plain energy: an MLP with one matrix, its down projection being its up projection transposed.

    E(h)   = -sum_m F(U_m . h),    F' = f
    -dE/dh = U^T f(U h)

U: (hidden, dim); F is the antiderivative of the activation f, in closed form (relu: relu(z)^2 / 2;
gelu: ((z^2 - 1) Phi(z) + z phi(z)) / 2; silu and softplus: through the dilogarithm).

The Hessian is -U^T diag(f'(U h)) U, so E is concave where f is nondecreasing, as relu and
softplus are. gelu falls below -0.75 and silu below -1.28; their energies are neither convex nor
concave in general.

>>> import cem
>>> from cem.energies import plain, plain_by, plain_gelu
>>> cem.derive(plain, dim=16, hidden=24).lowering.kernels
('matmul',)
>>> plain.curvature, plain_gelu.curvature
('concave', 'unknown')
>>> import sympy
>>> plain_by(sympy.tanh).name
'plain_tanh'

Source: with F(z) = relu(z)^2 / 2 this is the Hopfield energy of Energy Transformer (Hoover et al.,
arXiv:2302.07253); gelu is that of Hendrycks and Gimpel, arXiv:1606.08415.
"""

from sympy import Function, Sum

import cem

dim, hidden = cem.dims("dim hidden")
h, U = cem.state(dim), cem.parameter("U", hidden, dim)
i, m = dim.index("i"), hidden.index("m")


def plain_by(f: type[Function], name: str | None = None) -> cem.Energy:
    """The plain energy with the activation f, a word that has an antiderivative."""
    up = Sum(U[m, i] * h[i], i)
    return cem.Energy(-Sum(cem.antiderivative(f)(up), m), name=name or f"plain_{f.__name__}")


plain_relu = plain_by(cem.relu)
plain_gelu = plain_by(cem.gelu)
plain_silu = plain_by(cem.silu)
plain_softplus = plain_by(cem.softplus)

plain = plain_relu
