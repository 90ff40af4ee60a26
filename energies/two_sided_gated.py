"""Two-sided gated energy: a gated MLP that reads and writes through both of its matrices.

    E(h)   = -sum_m F(G_m . h) (U_m . h),    F' = f
    -dE/dh = U^T F(G h) + G^T ( f(G h) * U h )

U, G: (hidden, dim); F is the antiderivative of the activation f:

    f = relu       F(z) = relu(z)^2 / 2
    f = gelu       F(z) = ((z^2 - 1) Phi(z) + z phi(z)) / 2
    f = silu       F(z) = z softplus(z) + Li2(-exp(z))
    f = sigmoid    F(z) = softplus(z)

Nothing is frozen: the gradient is that of the whole energy, so its Jacobian is symmetric. The
price is the second term, one more product with each matrix than the gated energy.

Neither convex nor concave in general, and odd in U: replacing U by -U turns E into -E.

>>> import cem
>>> from cem.energies import two_sided_gated, two_sided_gated_by
>>> cem.derive(two_sided_gated, dim=16, hidden=24).lowering.kernels
('matmul',)
>>> two_sided_gated_by(cem.softplus).name
'two_sided_gated_softplus'

Source: the second term is a gated linear unit (Shazeer, arXiv:2002.05202) with its down
projection tied to the gate; gelu is that of Hendrycks and Gimpel, arXiv:1606.08415.
"""

from sympy import Function, Sum

import cem

dim, hidden = cem.dims("dim hidden")
h = cem.state(dim)
U, G = cem.parameter("U", hidden, dim), cem.parameter("G", hidden, dim)
i, m = dim.index("i"), hidden.index("m")


def two_sided_gated_by(f: type[Function], name: str | None = None) -> cem.Energy:
    """The two-sided gated energy with the activation f, a word that has an antiderivative."""
    gate = cem.antiderivative(f)(Sum(G[m, i] * h[i], i))
    up = Sum(U[m, i] * h[i], i)
    return cem.Energy(-Sum(gate * up, m), name=name or f"two_sided_gated_{f.__name__}")


two_sided_gated_silu = two_sided_gated_by(cem.silu)
two_sided_gated_gelu = two_sided_gated_by(cem.gelu)
two_sided_gated_relu = two_sided_gated_by(cem.relu)
two_sided_gated_sigmoid = two_sided_gated_by(cem.sigmoid)

two_sided_gated = two_sided_gated_silu
