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

Where keys are values (``uses="tied"`` and ``"outputs"``) their mean does count, so there the moment is not centred.
Where values or outputs have rows of their own that go with those of Q and K (``"values"``, ``"outputs"``), the gain of
a pair is what the fit would lose, to leading order, if this pair alone went: half the variance of its scores under the
weights, and the share of the squared force that it writes. Without a rotation the basis of those rows follows Q and K.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .forms import ROWS, Forms, Inputs, centred_moment, second_moment


@dataclass(frozen=True)
class Cut:
    """Forms of lower rank, head by head.

    Attributes:
        q, k: for every head (O, r, W) and (r, W).
        values, outputs, shares: likewise (r, W), (O, r, W) and (r, 1), or None where the forms have no such rows.
        kept: for every head the pairs that stay, by their number, or None where nothing turns.
        diagonal: lam, refitted; (H, W) or None. With a rotation and without data it stays as it is.
    """

    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    kept: tuple[tuple[int, ...], ...] | None
    diagonal: Tensor | None
    values: tuple[Tensor, ...] | None = None
    outputs: tuple[Tensor, ...] | None = None
    shares: tuple[Tensor, ...] | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(len(k) for k in self.k)

    def padded(self, forms: Forms) -> Forms:
        """The same as forms of the old rank, with zeros in place of what went."""
        found = {name: torch.zeros_like(value) for name, value in forms.rows.items()}
        for name, rows in self.rows.items():
            for a, row in enumerate(rows):
                found[name][a][..., self.places(forms, a), :] = row
        return replace(forms, **found, diagonal=self.diagonal)

    @property
    def rows(self) -> dict[str, tuple[Tensor, ...]]:
        """The fields with rows for coordinates of the rank."""
        found = {name: getattr(self, name) for name in ROWS}
        return {name: rows for name, rows in found.items() if rows is not None}

    def places(self, forms: Forms, head: int) -> Tensor:
        """Where the rows of a head stand among those of the full rank."""
        if self.kept is None:
            return torch.arange(self.ranks[head])
        return rows_of(forms, self.kept[head])


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
    return raw, raw if forms.averages_keys else centred_moment(x, seen.causal)


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
    return (forms.scales[:, None] * found).square()


def _svd(q: Tensor, k: Tensor, left: Tensor, right: Tensor):
    """(R_x, S, R_y, U, V) of one head; q (O, R, W), k (R, W)."""
    X = torch.cat(list(q @ left), -1)
    rx = torch.linalg.qr(X.T)[1]
    ry = torch.linalg.qr((k @ right).T)[1]
    u, s, vh = torch.linalg.svd(rx @ ry.T)
    width = len(k)
    return (rx, ry, u, vh), torch.nn.functional.pad(s, (0, width - len(s)))


def _pair_gains(forms: Forms, seen: Inputs | None) -> Tensor:
    """What every pair keeps, (H, P)."""
    if forms.uses in ("scores", "tied"):
        return _score_gains(forms, seen)
    if seen is not None:
        return _lost_alone(forms, seen)
    values = forms.k if forms.values is None else forms.values
    values = values if forms.shares is None else forms.shares * values
    sizes = torch.linalg.matrix_norm(forms.writing[:, :, forms.pairs], 2).square().sum(1)
    sizes = sizes * torch.linalg.matrix_norm(values[:, forms.pairs], 2).square()
    return _score_gains(forms, seen) / 2 + sizes / sizes.sum(1, keepdim=True).clamp(min=1e-30)


def _lost_alone(forms: Forms, seen: Inputs) -> Tensor:
    """Half the variance of the scores of each pair under the weights, and its share of the square of the force."""
    written = forms.writing[:, :, forms.pairs]  # (H, O, P, 2, W)
    squares = torch.einsum("hopiw,hopjw->hopij", written, written)
    varied, moved, whole = 0.0, 0.0, 0.0
    for n in range(len(seen.x)):
        one = seen.part(slice(n, n + 1))
        p = forms.scores(one).masked_fill(~one.visible(), -torch.inf).softmax(-1)
        q, k = (value[..., forms.pairs] for value in forms.features(one))  # (..., T, P, 2)
        mean = (p @ k.flatten(-2)[:, :, None]).unflatten(-1, (-1, 2))
        second = k[..., None] * k[..., None, :]
        second = (p @ second.flatten(-3)[:, :, None]).unflatten(-1, (-1, 2, 2))
        spread = second - mean[..., None] * mean[..., None, :]
        varied = varied + torch.einsum("bhotpi,bhotpij,bhotpj->hp", q, spread, q)
        average = forms.averages(p, one)[..., forms.pairs]
        moved = moved + torch.einsum("bhotpi,hopij,bhotpj->hp", average, squares, average)
        whole = whole + forms.forces(p, one).square().sum((0, 2, 3))
    varied = varied * forms.scales[:, None].square() / (2 * seen.x.shape[0] * seen.x.shape[1])
    return varied.clamp(min=0) + moved / whole[:, None].clamp(min=1e-30)


def _score_gains(forms: Forms, seen: Inputs | None) -> Tensor:
    """The variance of the scores of each pair, over all that is seen, (H, P)."""
    first, second = forms.pairs.T
    scales = forms.scales[:, None].square()
    if seen is None:
        of_q = torch.stack([forms.q[:, :, first], forms.q[:, :, second]], -2)  # (H, O, P, 2, W)
        of_k = torch.stack([forms.k[:, first], forms.k[:, second]], -2)
        sizes = torch.linalg.matrix_norm(of_q, 2).square().sum(1)
        return scales * sizes * torch.linalg.matrix_norm(of_k, 2).square()
    q, k = forms.features(seen)
    q = torch.stack([q[..., first], q[..., second]], -1)  # (B, H, O, T, P, 2)
    k = torch.stack([k[..., first], k[..., second]], -1)  # (B, H, T, P, 2)
    cq = torch.einsum("bhotpi,bhotpj->hpij", q, q) / (q.shape[0] * q.shape[3])
    if forms.averages_keys:
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
    return scales * torch.einsum("hpij,hpji->hp", cq, ck)


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
        places = [rows_of(forms, row) for row in kept]
        rows = {
            name: tuple(value[a][..., row, :] for a, row in enumerate(places))
            for name, value in forms.rows.items()
        }
        found = Cut(**rows, kept=kept, diagonal=forms.diagonal)
        if forms.diagonal is None or seen is None:
            return found
        return replace(found, diagonal=forms.diagonal + _refit_turned(forms, found, seen))
    left, right = moments(forms, seen)
    halves = root(left), root(right)
    rows = {name: [] for name in forms.rows}
    for a, rank in enumerate(ranks):
        (rx, ry, u, vh), s = _svd(forms.q[a], forms.k[a], *halves)
        size = s[:rank].clamp(min=torch.finfo(s.dtype).tiny).rsqrt()
        size = torch.where(s[:rank] > 1e-14 * s[0].clamp(min=1e-300), size, 0.0)[:, None]
        asking, asked = size * (vh[:rank] @ ry), size * (u[:, :rank].T @ rx)
        for name, value in forms.rows.items():
            rows[name].append((asking if name in ("q", "outputs") else asked) @ value[a])
    diagonal = forms.diagonal
    if diagonal is not None:
        diagonal = diagonal + _refit(forms, rows["q"], rows["k"], left, right)
    return Cut(**{n: tuple(v) for n, v in rows.items()}, kept=None, diagonal=diagonal)


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
        lost = (whole.scores(one) - rest.scores(one))[0].mean(1)  # (H, T, S)
        lost = lost / forms.scales[:, None, None]
        if not forms.averages_keys:
            lost = lost - (share * lost).sum(-1, keepdim=True)
        for a, row in enumerate(own):
            x = one.x[0][:, row]
            seen_squares = (share @ (x[:, :, None] * x[:, None]).flatten(1)).unflatten(
                1, (width, -1)
            )
            if not forms.averages_keys:
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
