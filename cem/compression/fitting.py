"""A cut that is fitted to what the layer did: what stays learns to stand in for what went.

Singular vectors and pairs are chosen as if query, key and distance were independent. They are not: attention looks at
few tokens, most of them near, and there pairs that stay can say nearly all that a lost pair said, though they turn at
other frequencies. So the cut is the start of a descent, by L-BFGS, of

    J(Q', K', lam') = sum over heads of  mean_t KL(p_t | p'_t),        p_t = softmax_s(score_ts),

in the coordinates where the second moment of what is read is the identity. Where a row of the rank also averages or
writes (all ``uses`` but ``"scores"``) the force u_t of a head counts as well (:mod:`cem.compression.forms`),

    + mean_t |u_t - u'_t|^2 / mean_t |u_t|^2,

and rows of V' and W' and shares w' are fitted beside those of Q' and K'.

Frequencies and shapes stay, so the layer is one that the cut alone could have given. Rows of zeros stay zeros: the
gradient of a row of Q' is a combination of the same rows of K' and V', and so on.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .forms import Forms, Inputs, second_moment
from .truncation import Cut, supports

SCORES = 1 << 20
"""Of one piece of the calibration data, so that a piece stays in the cache of a processor."""
HIDDEN = -1e30


def fitted(forms: Forms, found: Cut, seen: Inputs, steps: int) -> Cut:
    """The cut after some steps of the descent, never above its start. Heads that kept all or nothing stay.

    Args:
        forms: of the layer, its scores and nothing else (``forms.alone``).
        found: the cut to begin with.
        seen: what the layer reads on calibration data.
        steps: of L-BFGS, in float32; none leaves the cut as it is.
    """
    heads = [head for head, rank in enumerate(found.ranks) if 0 < rank < forms.rank]
    if not heads or not steps:
        return found
    whole, start = (one.each(lambda v: v[heads].float()) for one in (forms, found.padded(forms)))
    whiten, colour = (one.float() for one in _whitening(seen.with_one(forms.biased)))
    reading = {"q", "k", "values"}
    unknowns = {n: v @ colour if n in reading else v.clone() for n, v in start.rows.items()}
    if start.diagonal is not None:
        unknowns["diagonal"] = start.diagonal  # zero where it has no support
        support = supports(forms)[heads].float()
    for value in unknowns.values():
        value.requires_grad_()

    def current() -> Forms:
        now = {n: v @ whiten if n in reading else v for n, v in unknowns.items()}
        if start.diagonal is not None:
            now["diagonal"] = support * unknowns["diagonal"]
        return replace(start, **now)

    size = max(1, SCORES // (forms.q[heads, ..., 0, 0].numel() * seen.x.shape[1] ** 2))
    pieces = [seen.part(slice(n, n + size), torch.float32) for n in range(0, len(seen.x), size)]
    wanted, entropy, forces = [], 0.0, 0.0
    with torch.no_grad():
        for piece in pieces:
            log_p, force = _said(whole, piece)
            wanted.append((log_p.exp(), force))
            entropy -= (wanted[-1][0] * log_p).sum().item()
            forces = forces + force.square().sum((0, 2, 3))  # (H,)
    rows = seen.x.shape[0] * seen.x.shape[1]

    def loss() -> float:
        optimizer.zero_grad()
        total = entropy / rows
        for piece, (p, force) in zip(pieces, wanted, strict=True):
            log_q, other = _said(current(), piece)
            lost = -(p * log_q).sum() / rows
            if forms.uses != "scores":
                lost = (
                    lost + ((force - other).square().sum((0, 2, 3)) / forces.clamp(min=1e-30)).sum()
                )
            lost.backward()
            total += lost.item()
        return total

    optimizer = torch.optim.LBFGS(
        unknowns.values(), max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
    )
    optimizer.step(loss)
    return _placed(forms, found, heads, current())


def _whitening(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse root and the root of the second moment, directions of less than 1e-4 of the largest counting that."""
    values, vectors = torch.linalg.eigh(second_moment(x))
    sizes = values.clamp(min=1e-4 * values[-1]).sqrt()
    return vectors / sizes @ vectors.T, vectors * sizes @ vectors.T


def _said(forms: Forms, seen: Inputs) -> tuple[Tensor, Tensor]:
    """The logarithms of the weights (B, H, O, T, T), and the forces of the heads (B, H, T, W) where the rank writes."""
    scores = forms.scores(seen)
    log_p = (scores + HIDDEN * (~seen.visible()).to(scores)).log_softmax(-1)
    if forms.uses == "scores":
        return log_p, log_p.new_zeros(1, len(forms.k), 1, 1)
    return log_p, forms.forces(log_p.exp(), seen)


def _placed(forms: Forms, found: Cut, heads: list[int], now: Forms) -> Cut:
    """The cut with these values for some heads."""
    placed = {name: list(rows) for name, rows in found.rows.items()}
    diagonal = None if found.diagonal is None else found.diagonal.clone()
    for n, head in enumerate(heads):
        for name, rows in placed.items():
            fitted = getattr(now, name)[n].detach().double()
            rows[head] = fitted[..., found.places(forms, head), :]
        if diagonal is not None:
            diagonal[head] = now.diagonal[n].detach().double()
    return replace(found, **{n: tuple(rows) for n, rows in placed.items()}, diagonal=diagonal)
