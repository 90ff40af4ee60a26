"""Sparse coding energy: the state is a code from which a dictionary rebuilds a signal.

    E(h)   = 1/2 |y - D h|^2,    y = A c,    c = frozen(h)
    -dE/dh = D^T ( y - D h )

D: (features, dim), the dictionary, one atom a column; A: (features, dim) reads the signal y that the
code has to explain from the token as it was at the input of the layer. With ``refresh="layer"``,
the default, y stays while the code moves, however many steps are taken.

This is the smooth half of the lasso. Iterative shrinkage-thresholding adds the other half,
lambda |h|_1, by a proximal step:

    h+ = prox(h - eta D^T (D h - y)),    prox(z) = sign(z) relu(|z| - eta lambda).

A step is (1 - eta D^T D) h + eta D^T A c: one matrix for the code, one for the signal, as in
learned shrinkage-thresholding, but both made of D and A.

Convex in h with the constant Hessian D^T D: a step size up to 2/L descends, L = |D|_2^2. Started at
standard deviation 1/sqrt(dim), L is about (1 + sqrt(features/dim))^2, so 4 for a square dictionary:
the default step size 1 is too large for it, 1/4 is not.

>>> import cem
>>> from cem.energies import sparse_coding
>>> step = cem.GradientDescent(0.25)
>>> cem.derive(sparse_coding, dim=16, features=8, steps=3, update=step).lowering.kernels
('matmul',)
>>> sparse_coding.curvature
'convex'

Source: Gregor and LeCun, Learning Fast Approximations of Sparse Coding, ICML 2010 (there W_d is
our D, W_e and S are free); Beck and Teboulle, A Fast Iterative Shrinkage-Thresholding Algorithm,
SIAM J. Imaging Sciences 2, 2009.
"""

import torch

import cem


@cem.energy(h="dim", D="features dim", A="features dim")
def sparse_coding(h, *, D, A):
    """E = 1/2 |A c - D h|^2, c = frozen(h)."""
    signal = torch.mv(A, h.detach())
    return 0.5 * (signal - D @ h).square().sum()
