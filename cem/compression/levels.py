"""What a cut of the scores may do to the attention weights, and what it does.

Let delta = scores - scores of the cut, for one query over all tokens that it sees, R = max delta - min delta, p and
p' the two rows of weights, TV = 1/2 sum |p - p'|.

    (i)   spectral   R <= 2 |W - W'| max|x_t| max|x_s| scale           from the matrices and a bound on the inputs
    (ii)  range      TV <= tanh(R / 4)                                 from the scores on given data
    (iii) Pinsker    TV <= (KL(p | p') / 2)^(1/2)                      from the weights on given data

Proof of (ii). p'_s / p_s = exp(-delta_s) / E_p[exp(-delta)] lies in [m, M] with M / m <= e^R. TV = E_p[(1 - p'/p)^+];
among ratios in [m, M] of mean 1 it is largest for two values, with (1 - m)(M - 1) / (M - m), which for M = m e^R is
at most tanh(R / 4). The average of values moves by at most TV times their diameter, and the log-sum-exp by at most
max|delta|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .forms import Forms, Inputs

LEVELS = ("spectral", "range", "pinsker")


@dataclass(frozen=True)
class Bounds:
    """The three levels on one set of data: means and maxima over rows (queries), heads and sequences.

    Attributes:
        rows: how many.
        tv, largest: the mean and the largest total variation that was measured.
        spectral, range, pinsker: the mean bound of each level.
        violations: rows whose total variation was above the bound, level by level; rounding of 1e-9 is allowed.
        variance: the mean over rows of the variance of delta over what is seen.
    """

    rows: int
    tv: float
    largest: float
    spectral: float
    range: float
    pinsker: float
    violations: tuple[int, int, int]
    variance: float

    def __str__(self) -> str:
        broken = ", ".join(f"{n} {name}" for n, name in zip(self.violations, LEVELS, strict=True))
        return (
            f"total variation {self.tv:.4f} (largest {self.largest:.4f}) <= Pinsker {self.pinsker:.4f}, range"
            f" {self.range:.4f}, spectral {self.spectral:.4f}; of {self.rows:,} rows above their bound: {broken}"
        )


def bounds(forms: Forms, after: Forms, seen: Inputs, *, chunk: int = 4) -> Bounds:
    """Compare the weights of two forms of a layer on data, and check every row against every bound."""
    errors = operator_norms(forms, after)  # (H, O)
    totals = torch.zeros(5, dtype=torch.float64)
    broken, largest, rows = torch.zeros(3, dtype=torch.long), 0.0, 0
    for start in range(0, len(seen.x), chunk):
        part = seen.part(slice(start, start + chunk))
        hidden = ~part.visible()
        scores, cut = (one.scores(part).masked_fill(hidden, -torch.inf) for one in (forms, after))
        log_p, log_q = scores.log_softmax(-1), cut.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        delta = (scores - cut).masked_fill(hidden, 0.0)
        high = delta.masked_fill(hidden, -torch.inf).amax(-1)
        low = delta.masked_fill(hidden, torch.inf).amin(-1)
        tv = 0.5 * (p - q).abs().sum(-1)
        kl = (p * (log_p - log_q).masked_fill(hidden, 0.0)).sum(-1).clamp(min=0)
        size = part.with_one(forms.biased).norm(dim=-1)
        reach = (size[:, :, None] * size[:, None]).masked_fill(hidden, 0.0).amax(-1)  # (B, T)
        spread = 2 * errors[None, :, :, None] * reach[:, None, None]
        found = torch.stack([torch.tanh(spread / 4), torch.tanh((high - low) / 4), (kl / 2).sqrt()])
        broken += (tv > found + 1e-9).flatten(1).sum(1)
        count = (~hidden).sum(-1)
        mean = delta.sum(-1) / count
        variance = delta.square().sum(-1) / count - mean.square()
        totals += torch.stack([tv.sum(), *found.flatten(1).sum(1), variance.sum()])
        largest, rows = max(largest, float(tv.max())), rows + tv.numel()
    tv, *levels, variance = (totals / rows).tolist()
    return Bounds(rows, tv, largest, *levels, tuple(broken.tolist()), variance)


def operator_norms(forms: Forms, after: Forms | None = None) -> Tensor:
    """For every query a bound on |score - score'| / (|x_t| |x_s|), (H, O).

    Without a rotation it is scale |W - W'|, the largest singular value, or the sum with the largest difference of the
    diagonals; with one, scale times the sum over pairs of :func:`_pair_norms`, a bound at every distance. Without
    ``after``: of W itself.
    """
    diagonal = 0.0
    if forms.diagonal is not None:
        other = 0.0 if after is None else after.diagonal
        diagonal = (forms.diagonal - other).abs().amax(1)[:, None]
    if forms.pairs is not None:
        return forms.scales[:, None] * (_pair_norms(forms, after).sum(-1) + diagonal)
    q, k = forms.q, forms.k
    if after is not None:
        q = torch.cat([q, -after.q], 2)
        k = torch.cat([k, after.k], 1)
    return forms.scales[:, None] * (_product_norm(q, k[:, None]) + diagonal)


def _pair_norms(forms: Forms, after: Forms | None) -> Tensor:
    """How much the score of each pair can change at any distance, (H, O, P).

    With complex rows q = q_1 + i q_2 and k = k_1 + i k_2 a pair adds Re(e^(i angle) conj(q x_t) (k x_s)), so it is at
    most |conj(q)^T k - conj(q')^T k'|; and at most |Q_f| |K_f| + |Q'_f| |K'_f|, which is less where a pair went.
    """
    q, k = forms.q[:, :, forms.pairs], forms.k[:, None, forms.pairs]  # (H, O, P, 2, W)
    most = torch.linalg.matrix_norm(q, 2) * torch.linalg.matrix_norm(k, 2)
    if after is None:
        return most
    other_q, other_k = after.q[:, :, forms.pairs], after.k[:, None, forms.pairs]
    most = most + torch.linalg.matrix_norm(other_q, 2) * torch.linalg.matrix_norm(other_k, 2)
    left = torch.stack([_complex(q).conj(), -_complex(other_q).conj()], -2)
    right = torch.stack([_complex(k), _complex(other_k)], -2)
    return torch.minimum(most, _product_norm(left, right))


def _complex(rows: Tensor) -> Tensor:
    return torch.complex(rows[..., 0, :], rows[..., 1, :])


def _product_norm(left: Tensor, right: Tensor) -> Tensor:
    """|left^T right| of (..., R, W), without the matrix of size W."""
    rx, ry = torch.linalg.qr(left.mT)[1], torch.linalg.qr(right.mT)[1]
    return torch.linalg.matrix_norm(rx @ ry.mT, 2)
