"""Preconditioners: linear maps P of the gradient, the identity at the start and positive semi-definite.

Every one is called as ``P(gradient, h, step)``. Most need the gradient alone; :class:`NormJacobian` depends on the
state, and a list of preconditioners, one a step, on the step.

Legend: D dim, R rank.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ONE = math.log(math.e - 1.0)
"""softplus of this is 1."""

_THREE_QUARTERS = math.log(math.expm1(0.75))
"""softplus of this is 3/4."""


class AbstractPreconditioner(nn.Module, abc.ABC):
    """The interface of a preconditioner: a matrix P (D, D), never formed.

    Attributes:
        dim: the width D of the state.
        definite: whether P is positive semi-definite whatever its parameters are: what descent rests on.
        scalar: whether P is a multiple of the identity: what descent behind a norm rests on.
    """

    definite: bool = False
    scalar: bool = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abc.abstractmethod
    def forward(self, gradient: Tensor, h: Tensor | None = None, step: int = 0) -> Tensor:
        """P times the gradient, shape (..., D).

        Args:
            gradient: shape (..., D).
            h: the state at which the gradient was taken, before any norm, shape (..., D).
            step: which of the layer's steps this is, counted from 0.
        """

    def dense(self, h: Tensor | None = None, step: int = 0) -> Tensor:
        """The matrix P, shape (D, D), for tests and pictures; h (D,) where P depends on the state."""
        like = next(self.parameters(), torch.empty(()) if h is None else h)
        return self(torch.eye(self.dim, dtype=like.dtype, device=like.device), h, step).T

    def largest_eigenvalue(self) -> float:
        """The largest eigenvalue of P, rounded up; inf where P is not finite."""
        P = self.dense().detach().double()
        if not P.isfinite().all():
            return math.inf
        return float(torch.linalg.eigvalsh(P)[-1]) * (1 + 1e-9)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" if self.definite else f"dim={self.dim}, signed=True"


class ScaledIdentity(AbstractPreconditioner):
    """P = softplus(d) I with one learned number d; softplus(d) = 1 at the start.

    >>> import cem
    >>> cem.ScaledIdentity(2).dense().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    definite = True
    scalar = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.d = nn.Parameter(torch.tensor([_ONE]))

    def forward(self, gradient: Tensor, h: Tensor | None = None, step: int = 0) -> Tensor:
        return gradient * F.softplus(self.d).to(gradient.dtype)


class Diagonal(AbstractPreconditioner):
    """P = diag(softplus(d)) with a learned vector d (D,); the identity at the start.

    Args:
        dim: the width of the state.
        signed: P = diag(1 + d) instead, which may turn signs: a step is then no longer sure to go down.

    >>> import cem
    >>> cem.Diagonal(2).dense().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, dim: int, *, signed: bool = False) -> None:
        super().__init__(dim)
        self.definite = not signed
        self.d = nn.Parameter(torch.full((dim,), 0.0 if signed else _ONE))

    def forward(self, gradient: Tensor, h: Tensor | None = None, step: int = 0) -> Tensor:
        diagonal = F.softplus(self.d) if self.definite else 1.0 + self.d
        return gradient * diagonal.to(gradient.dtype)


class DiagonalPlusLowRank(AbstractPreconditioner):
    """P = diag(softplus(d)) + V V^T with learned d (D,) and V (D, R); the identity at the start.

    P is positive semi-definite for every d and V. V = 0 would be the identity too, and would stay: dP = dV V^T +
    V dV^T vanishes there. V starts with orthogonal rows instead, so that V V^T is diagonal and d makes up for it:
    column r of V is 1/2 at one coordinate c_r, the c_r are spread evenly over the D, and softplus(d) is 3/4 at the
    c_r and 1 elsewhere. Then P = I, and dP/dV is not zero: a change of V[i, r] adds to the entries (i, c_r) and
    (c_r, i) of P, for every i and r.

    Args:
        dim: the width of the state.
        rank: R, between 1 and ``dim``. It costs 2 D R multiplications a token.
        signed: P = diag(1 + d) + U V^T instead, with U (D, R) zero and V (D, R) random at the start. It is not
            symmetric, and a step is no longer sure to go down.

    Raises:
        ValueError: a rank that is not between 1 and ``dim``.

    >>> import torch, cem
    >>> part = cem.DiagonalPlusLowRank(4, rank=2)
    >>> torch.allclose(part.dense(), torch.eye(4))
    True
    >>> part(torch.ones(4)).sum().backward()
    >>> bool((part.V.grad != 0).all())
    True
    """

    def __init__(self, dim: int, rank: int, *, signed: bool = False) -> None:
        super().__init__(dim)
        if not 1 <= rank <= dim:
            raise ValueError(
                f"`DiagonalPlusLowRank` of dim={dim} has a rank between 1 and {dim}: got {rank}; type"
                f" `cem.DiagonalPlusLowRank({dim}, rank={min(4, dim)})`"
            )
        self.definite, self.rank = not signed, rank
        if signed:
            self.d = nn.Parameter(torch.zeros(dim))
            self.U = nn.Parameter(torch.zeros(dim, rank))
            self.V = nn.Parameter(torch.randn(dim, rank) * dim**-0.5)
            return
        column = torch.arange(rank)
        chosen = column * dim // rank
        d, V = torch.full((dim,), _ONE), torch.zeros(dim, rank)
        d[chosen] = _THREE_QUARTERS
        V[chosen, column] = 0.5
        self.d, self.V = nn.Parameter(d), nn.Parameter(V)

    def forward(self, gradient: Tensor, h: Tensor | None = None, step: int = 0) -> Tensor:
        dtype = gradient.dtype
        V = self.V.to(dtype)
        if self.definite:
            return gradient * F.softplus(self.d).to(dtype) + ((gradient @ V) @ V.T).to(dtype)
        low = ((gradient @ V) @ self.U.to(dtype).T).to(dtype)
        return gradient * (1.0 + self.d).to(dtype) + low

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}{'' if self.definite else ', signed=True'}"


class BlockDiagonal(AbstractPreconditioner):
    """P = diag(L_1 L_1^T, ..., L_n L_n^T): each block of D/n coordinates has a matrix of its own.

    The blocks may be those of the heads. L (n, D/n, D/n) is learned and starts with identities, where dP = dL +
    dL^T is not zero.

    Args:
        dim: the width of the state.
        blocks: n, which divides ``dim``.

    Raises:
        ValueError: blocks that do not divide ``dim``.

    >>> import cem
    >>> cem.BlockDiagonal(2, blocks=1).dense().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    definite = True

    def __init__(self, dim: int, blocks: int) -> None:
        super().__init__(dim)
        if blocks < 1 or dim % blocks:
            raise ValueError(
                f"`BlockDiagonal` splits dim={dim} into equal blocks: got blocks={blocks}; type a divisor of {dim}"
            )
        self.blocks = blocks
        self.L = nn.Parameter(torch.eye(dim // blocks).repeat(blocks, 1, 1))

    def forward(self, gradient: Tensor, h: Tensor | None = None, step: int = 0) -> Tensor:
        L = self.L.to(gradient.dtype)
        parts = gradient.unflatten(-1, (self.blocks, -1)).unsqueeze(-2)  # (..., n, 1, D/n)
        parts = (parts @ L) @ L.mT
        return parts.flatten(-3).to(gradient.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, blocks={self.blocks}"


class NormJacobian(AbstractPreconditioner):
    """P = J(h)^T with J the Jacobian of a norm at the state: the step of the true gradient through the norm.

    A layer with a norm in front takes dE/dg at g = norm(h) and subtracts it from h. With this P it subtracts

        d/dh E(norm(h) | x) = J(h)^T dE/dg,

    the gradient of E(norm(h)) with respect to h, with context and gates fixed, so that a small enough step goes down
    whatever the norm is: dE/dt = -|J^T dE/dg|^2. For a norm without a gain J is symmetric and positive
    semi-definite. It is not the identity at the start, and has no parameters of its own.

        RMSNorm      J^T u = s (v - h (h.v) s^2 / D),                  v = gain * u,  s = (mean(h^2) + eps)^(-1/2)
        LayerNorm    J^T u = s (v - mean(v) - c (c.v) s^2 / D),        c = h - mean(h),  s of c

    Anything else is differentiated by ``torch.func.vjp``, which cannot stand inside ``checkpoint=True``.

    Args:
        norm: the norm of the layer, the very module.

    >>> import torch, cem
    >>> from cem.energies import interaction
    >>> norm = torch.nn.RMSNorm(16)
    >>> layer = cem.derive(
    ...     interaction, dim=16, heads=2, rank=8, norm=norm, preconditioner=cem.NormJacobian(norm)
    ... )
    >>> h = torch.randn(1, 5, 16, requires_grad=True)
    >>> energy = layer.energy(h, context=h.detach(), frozen=h.detach())
    >>> (slope,) = torch.autograd.grad(energy.sum(), h)
    >>> torch.allclose(layer(h), h - slope, atol=1e-5)
    True
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(getattr(norm, "normalized_shape", (None,))[-1])
        self.norm = norm
        self.definite = _is_known(norm) and norm.weight is None

    def forward(self, gradient: Tensor, h: Tensor | None = None, step: int = 0) -> Tensor:
        if h is None:
            raise ValueError(
                "`NormJacobian` depends on the state: got none; call it with `(gradient, h)`"
            )
        return pull_back(self.norm, gradient, h)

    def largest_eigenvalue(self) -> float:
        """No number serves all states."""
        return math.inf

    def extra_repr(self) -> str:
        return ""


def _is_known(norm: nn.Module) -> bool:
    return type(norm) in (nn.RMSNorm, nn.LayerNorm) and len(norm.normalized_shape) == 1


def pull_back(norm: nn.Module, gradient: Tensor, h: Tensor) -> Tensor:
    """J(h)^T times a gradient (..., D) at norm(h), with J the Jacobian of the norm; see :class:`NormJacobian`."""
    if type(norm) is nn.Identity:
        return gradient
    if not _is_known(norm):
        return torch.func.vjp(norm, h.expand_as(gradient))[1](gradient)[0].to(gradient.dtype)
    dtype = torch.promote_types(h.dtype, torch.float32)
    v, c = gradient.to(dtype), h.to(dtype)
    v = v if norm.weight is None else v * norm.weight.to(dtype)
    if isinstance(norm, nn.LayerNorm):
        v, c = v - v.mean(-1, keepdim=True), c - c.mean(-1, keepdim=True)
    eps = torch.finfo(h.dtype).eps if norm.eps is None else norm.eps
    s2 = 1.0 / (c.square().mean(-1, keepdim=True) + eps)
    v = v - c * ((c * v).mean(-1, keepdim=True) * s2)
    return (v * s2.sqrt()).to(gradient.dtype)


class PerStep(AbstractPreconditioner):
    """One preconditioner a step; what ``cem.derive(..., preconditioner=[P0, P1])`` makes of a list."""

    def __init__(self, parts: Sequence[AbstractPreconditioner]) -> None:
        super().__init__(parts[0].dim)
        self.parts = nn.ModuleList(parts)
        self.definite = all(part.definite for part in parts)
        self.scalar = all(part.scalar for part in parts)

    def forward(self, gradient: Tensor, h: Tensor | None = None, step: int = 0) -> Tensor:
        return self.parts[step](gradient, h, step)

    def largest_eigenvalue(self) -> float:
        """The largest of all parts."""
        return max(part.largest_eigenvalue() for part in self.parts)

    def extra_repr(self) -> str:
        return ""


def preconditioner_of(
    given: AbstractPreconditioner | Callable[[int], AbstractPreconditioner] | Sequence | None,
    width: int,
    steps: int,
    norm: nn.Module,
) -> AbstractPreconditioner | None:
    """The preconditioner of a layer from the argument of ``derive``, checked.

    A module is taken as it is, a class is called with the width of the state, a list holds one of either a step.
    """
    if given is None:
        return None
    if isinstance(given, list | tuple | nn.ModuleList):
        if len(given) != steps:
            raise ValueError(
                f"a list of preconditioners has one a step: got {len(given)} of them and steps={steps}; type"
                f" `steps={len(given)}`"
            )
        return PerStep([preconditioner_of(one, width, 1, norm) for one in given])
    part = given if isinstance(given, nn.Module) else given(width)
    if not isinstance(part, AbstractPreconditioner):
        raise TypeError(
            f"`preconditioner` is a preconditioner: got {type(part).__name__}; type `preconditioner=cem.Diagonal`"
        )
    if part.dim not in (width, None):
        fitting = part.extra_repr().replace(f"dim={part.dim}", str(width), 1)
        raise ValueError(
            f"the preconditioner has dim={part.dim} and the state {width}: got {part}; type"
            f" `cem.{type(part).__name__}({fitting})`"
        )
    if isinstance(part, NormJacobian) and part.norm is not norm:
        raise ValueError(
            f"`NormJacobian` is that of the layer's own norm: got {part.norm} where the layer has {norm}; type"
            " `derive(..., norm=norm, preconditioner=cem.NormJacobian(norm))`"
        )
    return part
