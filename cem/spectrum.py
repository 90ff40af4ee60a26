"""The extreme eigenvalues of each token's Hessian, measured at one state.

Legend: T tokens, D dim, K iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Curvature:
    """Estimates of the extreme eigenvalues of d2E/dh2 of every token.

    Attributes:
        smallest, largest: shape (..., T), in units of energy per unit of state squared. Lanczos finds them from
            inside: ``smallest`` is never below the true one and ``largest`` never above it, up to rounding.
        safe_step: shape (..., T), 2 / (largest * p) with p the largest eigenvalue of P: above this step size the
            quadratic model of the energy at h has a direction that climbs. inf where ``largest`` is not
            positive; nan behind a norm, where the step does not follow the gradient for h, and where P may be
            negative.
    """

    smallest: Tensor
    largest: Tensor
    safe_step: Tensor


def curvature(
    layer,
    h: Tensor,
    *,
    frozen: Tensor | None = None,
    context: Tensor | None = None,
    iterations: int = 32,
    generator: torch.Generator | None = None,
    **inputs: Tensor | None,
) -> Curvature:
    """The extreme eigenvalues of each token's d2E/dh2 at fixed context and gates, by Lanczos iterations.

    Every token's energy depends on its own state alone, so one Hessian-vector product of the sum of all energies
    serves all tokens. The basis is orthogonalised in full, and its Rayleigh quotient is diagonalised: with
    ``iterations >= dim`` the result is exact. Behind a norm the Hessian is that of h -> E(norm(h)).

    Args:
        layer: an :class:`~cem.EnergyLayer`.
        h: states, shape (..., T, D); float64 gives the most digits.
        frozen, context, **inputs: as in ``layer.energy``; the first two are ``h`` if None.
        iterations: how many Hessian-vector products to take, K.
        generator: where the first vectors are drawn from.

    Raises:
        ValueError: ``iterations`` is not positive.

    >>> import torch, cem
    >>> from cem.energies import memory
    >>> layer = cem.derive(memory, dim=8, hidden=5, dtype=torch.float64)
    >>> found = curvature(layer, torch.randn(3, 8, dtype=torch.float64))
    >>> found.largest.shape, bool((found.largest <= 1 + 1e-9).all())  # 1 - beta Cov(U)
    (torch.Size([3]), True)

    Source: Golub and Van Loan, Matrix Computations, 2013, sections 10.1 and 10.3.
    """
    if iterations < 1:
        raise ValueError(
            f"`curvature` needs at least one iteration: got {iterations}; type `iterations=32`"
        )
    h = h.detach()
    if context is None and layer.energy_function.context is not None:
        context = h if layer.context_dim == layer.dim else None
    inputs["context"] = context
    gates = h if frozen is None else frozen
    with torch.enable_grad():
        z = h.clone().requires_grad_()
        total = layer.energy(z, frozen=gates, **inputs).sum()
        slope = _gradient(total, z, create_graph=True)

        def product(v: Tensor) -> Tensor:
            return _gradient(slope, z, v, retain_graph=True).detach()

        steps = min(iterations, h.shape[-1])
        smallest, largest = _extremes(product, h, steps, generator)
    return Curvature(smallest, largest, 2.0 / (largest * _stretch(layer)).clamp_min(0.0))


def _stretch(layer) -> float:
    """The largest eigenvalue of P; nan where the step does not follow P times the gradient for h."""
    P = layer.preconditioner
    if isinstance(layer.norm, nn.Identity) and P is None:
        return 1.0
    if isinstance(layer.norm, nn.Identity) and getattr(P, "definite", False):
        return P.largest_eigenvalue()
    return math.nan


def _gradient(output: Tensor, z: Tensor, v: Tensor | None = None, **options) -> Tensor:
    """The gradient for z; zeros where the output does not depend on it."""
    if not output.requires_grad:
        return torch.zeros_like(z)
    (found,) = torch.autograd.grad(output, z, v, materialize_grads=True, **options)
    return found


def _extremes(
    product: Callable[[Tensor], Tensor], like: Tensor, steps: int, generator
) -> tuple[Tensor, Tensor]:
    """The smallest and the largest Ritz value of a symmetric map of the last axis, batched over the others."""
    basis: list[Tensor] = []
    images: list[Tensor] = []
    v = _unit(_draw(like, generator), basis, like, generator)
    for _ in range(steps):
        basis.append(v)
        images.append(product(v))
        v = _unit(images[-1], basis, like, generator)
    Q, A = torch.stack(basis, -2), torch.stack(images, -2)  # (..., T, K, D)
    projected = Q @ A.mT  # (..., T, K, K)
    values = torch.linalg.eigvalsh((projected + projected.mT) / 2)
    return values[..., 0], values[..., -1]


def _draw(like: Tensor, generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _unit(v: Tensor, basis: list[Tensor], like: Tensor, generator) -> Tensor:
    """v made orthogonal to a basis and of length 1; a fresh direction where nothing of it is left."""
    if len(basis) == like.shape[-1]:
        return v
    length = v.norm(dim=-1, keepdim=True)
    rest = _orthogonal(v, basis)
    # What cancels to rounding spans an invariant space: a new direction keeps the search going.
    spent = rest.norm(dim=-1, keepdim=True) <= 1e3 * torch.finfo(v.dtype).eps * length
    rest = torch.where(spent, _orthogonal(_draw(like, generator), basis), rest)
    return rest / rest.norm(dim=-1, keepdim=True)


def _orthogonal(v: Tensor, basis: list[Tensor]) -> Tensor:
    """v less its part in the span of a basis, taken away twice for the digits that cancel."""
    if not basis:
        return v
    Q = torch.stack(basis, -2)  # (..., T, K, D)
    for _ in range(2):
        v = v - ((Q @ v[..., None]) * Q).sum(-2)
    return v
