"""The best forms of lower rank: singular vectors of the data-weighted forms, or whole pairs of a rotation.

Without a rotation, head a of queries o has A = [C^(1/2) Q_o^T K Cx^(1/2)]_o, the queries below each other, with C the
second moment of what is read and Cx the centred moment of what is looked at (both the identity without data). With
thin QR factors X^T = U_x R_x of X = [Q_o C^(1/2)]_o and Y^T = U_y R_y of Y = K Cx^(1/2), and R_x R_y^T = U S V^T of
size rank, the cut

    Q' = S_r^(-1/2) V_r^T R_y Q,    K' = S_r^(-1/2) U_r^T R_x K

has [C^(1/2) Q'^T K' Cx^(1/2)] = A_r, the best approximation of rank r of A (Eckart and Young), and needs no inverse
of a moment. Its error is sigma_{r+1} in the operator norm and (sigma_{r+1}^2 + ...)^(1/2) in the Frobenius norm; the
square of the latter is the expected variance of the lost scores over what a token sees, where query and key are
independent.

With a rotation the form of two tokens depends on their distance, and a cut that holds at every distance keeps whole
pairs of coordinates. The gain of a pair is trace(C_q C_k) with the 2 x 2 moments of its turned queries and its
turned, centred keys.

Where values are tied to keys (``uses="tied"``) the mean of the keys does count, so there the moment is not centred.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .forms import Forms, Inputs, centred_moment, second_moment


@dataclass(frozen=True)
class Cut:
    """Forms of lower rank, head by head.

    Attributes:
        q, k: for every head (O, r, W) and (r, W).
        kept: for every head the pairs that stay, by their number, or None where nothing turns.
        diagonal: lam, refitted; (H, W) or None.
    """

    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    kept: tuple[tuple[int, ...], ...] | None
    diagonal: Tensor | None

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(len(k) for k in self.k)

    def padded(self, forms: Forms) -> Forms:
        """The same as forms of the old rank, with zeros in place of what went."""
        q, k = torch.zeros_like(forms.q), torch.zeros_like(forms.k)
        for a, rank in enumerate(self.ranks):
            rows = torch.arange(rank) if self.kept is None else rows_of(forms, self.kept[a])
            q[a, :, rows], k[a, rows] = self.q[a], self.k[a]
        return replace(forms, q=q, k=k, diagonal=self.diagonal)


def rows_of(forms: Forms, kept) -> Tensor:
    """The coordinates of some pairs: the first of each, then the second of each."""
    return forms.pairs[torch.tensor(kept, dtype=torch.long)].T.reshape(-1)


def moments(forms: Forms, seen: Inputs | None) -> tuple[Tensor, Tensor]:
    """C and Cx, (W, W); the identity without data."""
    if seen is None:
        one = torch.eye(forms.q.shape[-1], dtype=torch.float64)
        return one, one
    x = seen.with_one(forms.biased)
    raw = second_moment(x)
    return raw, raw if forms.uses == "tied" else centred_moment(x, seen.causal)


def root(moment: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def gains(forms: Forms, seen: Inputs | None = None, *, together: bool = False) -> Tensor:
    """What each step keeps, squared singular values or gains of pairs, largest first, (H, rank / step).

    Pairs that all heads keep ``together`` stand in one order, that of their sums.
    """
    if forms.pairs is not None:
        table = _pair_gains(forms, seen)
        return table.gather(1, _order(table, together))
    left, right = map(root, moments(forms, seen))
    found = torch.stack([_svd(q, k, left, right)[1] for q, k in zip(forms.q, forms.k, strict=True)])
    return (forms.scale * found).square()


def _svd(q: Tensor, k: Tensor, left: Tensor, right: Tensor):
    """(R_x, S, R_y, U, V) of one head; q (O, R, W), k (R, W)."""
    X = torch.cat(list(q @ left), -1)
    rx = torch.linalg.qr(X.T)[1]
    ry = torch.linalg.qr((k @ right).T)[1]
    u, s, vh = torch.linalg.svd(rx @ ry.T)
    width = len(k)
    return (rx, ry, u, vh), torch.nn.functional.pad(s, (0, width - len(s)))


def _pair_gains(forms: Forms, seen: Inputs | None) -> Tensor:
    first, second = forms.pairs.T
    if seen is None:
        of_q = torch.stack([forms.q[:, :, first], forms.q[:, :, second]], -2)  # (H, O, P, 2, W)
        of_k = torch.stack([forms.k[:, first], forms.k[:, second]], -2)
        sizes = torch.linalg.matrix_norm(of_q, 2).square().sum(1)
        return forms.scale**2 * sizes * torch.linalg.matrix_norm(of_k, 2).square()
    q, k = forms.features(seen)
    q = torch.stack([q[..., first], q[..., second]], -1)  # (B, H, O, T, P, 2)
    k = torch.stack([k[..., first], k[..., second]], -1)  # (B, H, T, P, 2)
    cq = torch.einsum("bhotpi,bhotpj->hpij", q, q) / (q.shape[0] * q.shape[3])
    if forms.uses == "tied":
        ck = torch.einsum("bhtpi,bhtpj->hpij", k, k) / (k.shape[0] * k.shape[2])
    else:
        heads, pairs = k.shape[1], k.shape[3]
        rows = k.permute(1, 3, 0, 2, 4)  # (H, P, B, T, 2)
        ck = torch.stack(
            [
                torch.stack([centred_moment(rows[h, p], seen.causal) for p in range(pairs)])
                for h in range(heads)
            ]
        )
    return forms.scale**2 * torch.einsum("hpij,hpji->hp", cq, ck)


def _order(table: Tensor, together: bool) -> Tensor:
    """The pairs of each head, those that keep most first; those that keep most of all heads if ``together``."""
    table = table.sum(0, keepdim=True).expand_as(table) if together else table
    return table.argsort(dim=1, descending=True, stable=True)


def cut(
    forms: Forms, ranks: tuple[int, ...], seen: Inputs | None = None, *, together: bool = False
) -> Cut:
    """The best forms of these ranks.

    Args:
        forms: of the layer.
        ranks: one a head, each a multiple of ``forms.step``.
        seen: what the layer reads on calibration data, to weigh errors with; all directions count alike without.
        together: all heads keep the same pairs of a rotation, those of the largest sum.
    """
    if forms.pairs is not None:
        order = _order(_pair_gains(forms, seen), together)
        kept = tuple(tuple(sorted(order[a, : rank // 2].tolist())) for a, rank in enumerate(ranks))
        rows = [rows_of(forms, row) for row in kept]
        q = tuple(forms.q[a, :, row] for a, row in enumerate(rows))
        return Cut(q, tuple(forms.k[a, row] for a, row in enumerate(rows)), kept, forms.diagonal)
    left, right = moments(forms, seen)
    halves = root(left), root(right)
    q, k = [], []
    for a, rank in enumerate(ranks):
        (rx, ry, u, vh), s = _svd(forms.q[a], forms.k[a], *halves)
        size = s[:rank].clamp(min=torch.finfo(s.dtype).tiny).rsqrt()
        size = torch.where(s[:rank] > 1e-14 * s[0].clamp(min=1e-300), size, 0.0)[:, None]
        q.append(size * (vh[:rank] @ ry) @ forms.q[a])
        k.append(size * (u[:, :rank].T @ rx) @ forms.k[a])
    diagonal = forms.diagonal
    if diagonal is not None:
        diagonal = diagonal + _refit(forms, q, k, left, right)
    return Cut(tuple(q), tuple(k), None, diagonal)


def _refit(forms: Forms, q, k, left: Tensor, right: Tensor) -> Tensor:
    """The diagonals that come nearest to what the cut left over: diag(W - W_r), weighted by the data.

    The minimum of |C^(1/2) (W - W_r - diag(d)) Cx^(1/2)|_F solves (C * Cx) d = diag(C (W - W_r) Cx) on the support.
    """
    found = torch.zeros_like(forms.diagonal)
    for a, row in enumerate(forms.diagonal):
        rest = forms.q[a, 0].T @ forms.k[a] - q[a][0].T @ k[a]
        own = support(forms, a, len(row))
        system = (left * right)[own][:, own]
        wanted = (left @ rest @ right).diagonal()[own]
        found[a, own] = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:, 0]
    return found


def support(forms: Forms, head: int, width: int) -> Tensor:
    """The coordinates that the diagonal of a head may use: its own block, or all."""
    if not forms.blocked:
        return torch.arange(width)
    block = width // len(forms.k)
    return torch.arange(head * block, (head + 1) * block)
