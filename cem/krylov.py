"""Linear systems of one matrix a token, by products with the matrix.

Legend: B batch, T tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]
"""A linear map of every token: (..., D) -> (..., D)."""


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _ratio(above: Tensor, below: Tensor, where: Tensor) -> Tensor:
    """above / below, and 0 elsewhere, also in the derivative."""
    return torch.where(where, above / torch.where(where, below, 1.0), 0.0)


def conjugate_gradients(
    apply: Apply, b: Tensor, iterations: int, tolerance: float, *, early: bool = False
) -> Tensor:
    """x with A x = b for every token, (..., D), for symmetric positive definite A.

    A token whose residual is below ``tolerance`` times |b| stands still. ``early`` leaves the loop when all do, which
    reads data: without it the program is the same for every input, and differentiable.

    >>> import torch
    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradients(lambda v: v @ A, torch.tensor([3.0, 4.0]), iterations=2, tolerance=0.0)
    tensor([1.0000, 1.0000])

    Source: Nocedal and Wright, Numerical Optimization, 2006, algorithm 5.2.
    """
    x, residual = torch.zeros_like(b), b
    p, size = residual, _dot(residual, residual)
    enough = tolerance**2 * size
    for _ in range(iterations):
        active = size > enough
        if early and not bool(active.any()):
            break
        image = apply(p)
        curved = _dot(p, image)
        active = active & (curved > 0)
        alpha = _ratio(size, curved, active)
        x, residual = x + alpha * p, residual - alpha * image
        left = _dot(residual, residual)
        p, size = residual + _ratio(left, size, active) * p, left
    return x


def conjugate_residuals(apply: Apply, b: Tensor, iterations: int, tolerance: float) -> Tensor:
    """x with A x = b for every token, (..., D), for any A that can be inverted.

    Generalised conjugate residuals: every direction is kept, their images are orthogonal, and the residual never
    grows. It ends when |A x - b| <= tolerance |b| for all tokens.

    Source: Eisenstat, Elman and Schultz, Variational iterative methods for nonsymmetric systems, 1983.
    """
    x, residual = torch.zeros_like(b), b
    enough = tolerance**2 * _dot(b, b)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(iterations):
        if not bool((_dot(residual, residual) > enough).any()):
            break
        p, image = residual, apply(residual)
        for other, its_image, size in kept:
            share = _ratio(_dot(image, its_image), size, size > 0)
            p, image = p - share * other, image - share * its_image
        size = _dot(image, image)
        kept.append((p, image, size))
        alpha = _ratio(_dot(residual, image), size, size > 0)
        x, residual = x + alpha * p, residual - alpha * image
    return x
