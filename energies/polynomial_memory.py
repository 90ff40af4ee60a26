"""Polynomial memory energy: the dense associative memory of degree n.

    E(h)   = -(1/n) sum_m relu(U_m . h)^n
    -dE/dh = U^T relu(U h)^(n-1)

U: (hidden, dim), one stored pattern a row; n >= 2. The layer is an MLP with one matrix whose
activation is a power of relu: n = 2 is ``plain_relu``, n = 3 the squared relu. The higher the
degree, the more the nearest pattern outweighs the others.

Concave in h, since relu(z)^n is convex, so a step of any size descends. E has no minimum: of
degree above 1 in h, it falls without end along every pattern, and a quadratic term holds it for
n = 2 at most. The memory that it comes from lives on the corners of a cube. Read the state through
a norm (``cem.derive(..., norm=torch.nn.RMSNorm)``), which keeps it on a sphere.

>>> import cem
>>> from cem.energies import plain, polynomial_memory, polynomial_memory_by
>>> cem.derive(polynomial_memory, dim=16, hidden=24).lowering.kernels
('matmul',)
>>> polynomial_memory.curvature
'concave'
>>> polynomial_memory_by(4).name
'polynomial_memory_4'
>>> polynomial_memory_by(1)
Traceback (most recent call last):
    ...
ValueError: `polynomial_memory_by` takes a degree of at least 2: got 1; type ...

Source: Krotov and Hopfield, Dense Associative Memory for Pattern Recognition, arXiv:1606.01164,
whose rectified polynomial lacks our 1/n and whose state is binary; the squared relu is the
activation of Primer (So et al., arXiv:2109.08668).
"""

from sympy import Sum

import cem

dim, hidden = cem.dims("dim hidden")
h, U = cem.state(dim), cem.parameter("U", hidden, dim)
i, m = dim.index("i"), hidden.index("m")


def polynomial_memory_by(n: int, name: str | None = None) -> cem.Energy:
    """The polynomial memory energy of degree n, at least 2; ``ValueError`` below."""
    if n < 2:
        raise ValueError(
            f"`polynomial_memory_by` takes a degree of at least 2: got {n};"
            " type `polynomial_memory_by(3)`"
        )
    overlap = Sum(U[m, i] * h[i], i)
    energy = -Sum(cem.relu(overlap) ** n, m) / n
    return cem.Energy(energy, name=name or f"polynomial_memory_{n}")


polynomial_memory = polynomial_memory_by(3)
