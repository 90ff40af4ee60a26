"""Quadratic well: the state is drawn to a point, along some directions more than along others.

    E(h)   = 1/2 |W (h - b)|^2
    -dE/dh = W^T W (b - h)

W: (rank, dim), b: (dim). The directions that W reads are pulled to b, those in its null space are
left alone.

Convex in h with the constant Hessian W^T W: a step size up to 2/L descends, L = |W|_2^2 being its
largest eigenvalue, and a step of the preconditioner (W^T W)^-1 is at the minimum at once. Started
at standard deviation 1/sqrt(dim), |W|_2 is about 1 + sqrt(rank/dim).

>>> import cem
>>> from cem.energies import quadratic_well
>>> cem.derive(quadratic_well, dim=16, rank=4).lowering.kernels
('matmul',)
>>> quadratic_well.curvature
'convex'

Source: the smooth model problem; the bound 2/L is in Nesterov, Introductory Lectures on Convex
Optimization, 2004, section 1.2.3.
"""

import cem


@cem.energy(h="dim", W="rank dim", b="dim")
def quadratic_well(h, *, W, b):
    """E = 1/2 |W (h - b)|^2."""
    return 0.5 * (W @ (h - b)).square().sum()
