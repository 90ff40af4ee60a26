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

A diagonal beside the form takes up what it can of what went.

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
        diagonal: lam, refitted; (H, W) or None. With a rotation and without data it stays as it is.
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
        k = tuple(forms.k[a, row] for a, row in enumerate(rows))
        found = Cut(q, k, kept, forms.diagonal)
        if forms.diagonal is None or seen is None:
            return found
        return replace(found, diagonal=forms.diagonal + _refit_turned(forms, found, seen))
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
    for a in range(len(forms.k)):
        rest = forms.q[a, 0].T @ forms.k[a] - q[a][0].T @ k[a]
        own = supports(forms)[a]
        system = (left * right)[own][:, own]
        wanted = (left @ rest @ right).diagonal()[own]
        found[a, own] = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:, 0]
    return found


def _refit_turned(forms: Forms, found: Cut, seen: Inputs) -> Tensor:
    """The same where positions turn, so that what the cut left over depends on the distance: over pairs of tokens.

    With l_ts the lost score, the least squares of it on x_tb x_sb, the mean over t of that over what t sees:

        min_d  mean_ts ( l_ts - sum_b d_b x_tb x_sb )^2

    Both are centred over s for each t, unless values are tied, as the moments of the other refit are.
    """
    whole, rest = replace(forms, diagonal=None), replace(found.padded(forms), diagonal=None)
    result, own = torch.zeros_like(forms.diagonal), supports(forms)
    visible = seen.visible().to(seen.x)
    share = visible / visible.sum(1, keepdim=True)  # (T, S)
    width = int(own[0].sum())
    systems = seen.x.new_zeros(len(own), width, width)
    wanted = seen.x.new_zeros(len(own), width)
    for n in range(len(seen.x)):
        one = seen.part(slice(n, n + 1))
        lost = (whole.scores(one) - rest.scores(one))[0].mean(1) / forms.scale  # (H, T, S)
        if forms.uses != "tied":
            lost = lost - (share * lost).sum(-1, keepdim=True)
        for a, row in enumerate(own):
            x = one.x[0][:, row]
            seen_squares = (share @ (x[:, :, None] * x[:, None]).flatten(1)).unflatten(
                1, (width, -1)
            )
            if forms.uses != "tied":
                mean = share @ x
                seen_squares = seen_squares - mean[:, :, None] * mean[:, None]
            systems[a] += (x[:, :, None] * x[:, None] * seen_squares).sum(0)
            wanted[a] += (x * ((share * lost[a]) @ x)).sum(0)
    for a, row in enumerate(own):
        solved = torch.linalg.lstsq(systems[a], wanted[a][:, None], driver="gelsd").solution
        result[a, row] = solved[:, 0]
    return result


def supports(forms: Forms) -> Tensor:
    """The coordinates that the diagonal of each head may use, its own block or all, (H, W)."""
    heads, width = forms.diagonal.shape
    if not forms.blocked:
        return torch.ones(heads, width, dtype=torch.bool)
    return torch.eye(heads, dtype=torch.bool).repeat_interleave(width // heads, 1)
