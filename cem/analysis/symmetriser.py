"""The constant preconditioner that makes an update most nearly a gradient.

Legend: D dim, N states, R dimension of the space that the update moves in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .readings import rows

KINDS = ("full", "diagonal")
# A full P is a vector of D^2 entries, and its equations a matrix of D^4.
MOST = 48


@dataclass(frozen=True)
class Symmetriser:
    """A constant matrix P with P J as symmetric as it can be, so that u is nearly P^-1 times a gradient.

    Attributes:
        P: (D, D), |P| = sqrt(D), trace not negative. It is 0 across what the update never moves along.
        before: |J - J^T| / |J| over all states.
        after: the same of P J; rounding where a constant preconditioner exists.
        null_space: the dimension of the space of all P with P J symmetric at every state; 0 where there is none.
        rank: R, the dimension of the space that J reaches.
        definite: whether P + P^T has no negative eigenvalue, so that the update descends.
    """

    P: Tensor
    before: float
    after: float
    null_space: int
    rank: int
    definite: bool

    @property
    def preconditioner(self) -> Tensor:
        """M = P^-1, with which u = M grad: the inverse on what the update moves along, (D, D), |M| = sqrt(D)."""
        M = torch.linalg.pinv(self.P, rtol=1e-9)
        return M * (len(M) ** 0.5 / M.norm())

    def __str__(self) -> str:
        sign = "positive semi-definite" if self.definite else "indefinite"
        return f"antisymmetry {self.before:.3g} -> {self.after:.3g}, null space of dimension {self.null_space}, {sign}"


def best_preconditioner(
    update: nn.Module | Callable[..., Tensor],
    h: Tensor,
    *,
    kind: str = "full",
    tolerance: float = 1e-6,
    **options,
) -> Symmetriser:
    """The constant P that makes P J(h) most nearly symmetric at all the states at once.

    If u = M grad Phi with one matrix M, then P = M^-1 makes P J a Hessian. The pairs P J - (P J)^T are linear in P, so
    the P with the smallest

        sum_n |P J_n - (P J_n)^T|^2 / sum_n |P J_n|^2

    is an eigenvector. Where several P make it 0, it is the one nearest to the identity; a gradient itself has P = I.
    Heads that move the state in independent spaces may be weighed one by one, so the null space of such attention has
    one dimension a head. Without a null space P may be singular and prove nothing: compare ``after`` with ``before``.

    Args:
        update, h: as in :func:`~cem.analysis.antisymmetry`; more states than D say more.
        kind: ``"full"``, or ``"diagonal"`` for P = diag(p), which any D can afford.
        tolerance: of the singular values, relative to the largest, that count as 0.
        **options: of :func:`~cem.analysis.antisymmetry`: ``reading``, ``hold``, ``tokens``, ...

    Raises:
        ValueError: another kind; ``"full"`` where D is more than 48.

    >>> import torch, cem
    >>> from cem.analysis import best_preconditioner
    >>> from cem.energies import memory
    >>> layer = cem.derive(memory, dim=4, hidden=9, preconditioner=cem.Diagonal, dtype=torch.float64)
    >>> layer.preconditioner.d.data = torch.tensor([0.0, 1.0, 2.0, 3.0]).double()
    >>> found = best_preconditioner(layer, torch.randn(20, 4, dtype=torch.float64))
    >>> found.null_space, found.definite, found.after < 1e-9 < found.before
    (1, True, True)
    >>> M = torch.nn.functional.softplus(layer.preconditioner.d).diag()
    >>> torch.allclose(found.preconditioner / found.preconditioner[0, 0], M / M[0, 0])
    True
    """
    if kind not in KINDS:
        raise ValueError(f'`kind` is "full" or "diagonal": got {kind!r}; type `kind="full"`')
    with rows(update, h, **options) as found:
        dim = found.at.shape[1]
        if kind == "full" and dim > MOST:
            raise ValueError(
                f'a full P has at most {MOST} rows: got states of {dim}; type `kind="diagonal"`'
            )
        J = found.jacobian().double()
    norm = J.square().sum().sqrt()
    J = J / norm.clamp_min(torch.finfo(J.dtype).tiny)
    solve = _full if kind == "full" else _diagonal
    P, null_space, rank = solve(J, tolerance**2)
    P = P * (dim**0.5 / P.norm())
    P = P if P.trace() >= 0 else -P
    values = torch.linalg.eigvalsh((P + P.mT) / 2)
    definite = bool(values[0] >= -1e-9 * values.abs().max())
    return Symmetriser(P.to(h.dtype), _relative(J), _relative(P @ J), null_space, rank, definite)


def _relative(J: Tensor) -> float:
    size = J.square().sum()
    return float(((J - J.mT).square().sum() / size).sqrt()) if size > 0 else 0.0


def _full(J: Tensor, tolerance: float) -> tuple[Tensor, int, int]:
    """P = A U^T with U an orthonormal basis of what J reaches: other directions would count as solutions."""
    dim = J.shape[1]
    U, spread, _ = torch.linalg.svd(J.transpose(0, 1).flatten(1), full_matrices=False)
    U = U[:, spread > 1e-7 * spread[0]] if spread[0] > 0 else U  # (D, R)
    B = U.mT @ J  # (N, R, D)
    reach = torch.einsum("njk,nlk->jl", B, B)
    crossed = torch.einsum("njk,nli->ijkl", B, B).flatten(0, 1).flatten(1)  # tr(A B A B)
    size = torch.kron(torch.eye(dim, dtype=J.dtype, device=J.device), reach)  # |A B|^2
    chosen, null_space = _smallest(size, (crossed + crossed.mT) / 2, U.flatten(), tolerance)
    return chosen.view(dim, -1) @ U.mT, null_space, U.shape[1]


def _diagonal(J: Tensor, tolerance: float) -> tuple[Tensor, int, int]:
    size = J.square().sum((0, 2))
    moved = size > 1e-14 * size.max()
    crossed = (J * J.mT).sum(0)[moved][:, moved]
    p = torch.zeros_like(size)
    p[moved], null_space = _smallest(
        size[moved].diag(), crossed, torch.ones_like(size[moved]), tolerance
    )
    return p.diag(), null_space, int(moved.sum())


def _smallest(size: Tensor, crossed: Tensor, near: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """The x with the least 2 x^T (size - crossed) x / x^T size x, that nearest to ``near`` among equals at 0."""
    root = torch.linalg.cholesky(size)
    half = torch.linalg.solve_triangular(root, crossed, upper=False)
    whitened = torch.linalg.solve_triangular(root, half.mT, upper=False)  # 1 where P J is symmetric
    values, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
    null_space = int((1 - values <= tolerance).sum())
    kept = vectors[:, -max(null_space, 1) :]
    basis = torch.linalg.solve_triangular(root.mT, kept, upper=True)
    if null_space < 2:
        return basis[:, 0], null_space
    return basis @ torch.linalg.lstsq(basis, near).solution, null_space
