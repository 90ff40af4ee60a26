"""A cut that is fitted to what the layer did: what stays learns to stand in for what went.

Singular vectors and pairs are chosen as if query, key and distance were independent. They are not: attention looks at
few tokens, most of them near, and there pairs that stay can say nearly all that a lost pair said, though they turn at
other frequencies. So the cut is the start of a descent, by L-BFGS, of

    J(Q', K', lam') = sum over heads of  mean_t KL(p_t | p'_t),        p_t = softmax_s(score_ts),

in the coordinates where the second moment of what is read is the identity. Where the same matrices are values
(``uses="tied"``) the force of a head counts as well,

    u_t = Q^T R_t^T sum_s p_ts R_s K x_s + lam sum_s p_ts x_s,         + mean_t |u_t - u'_t|^2 / mean_t |u_t|^2.

Frequencies and shapes stay, so the layer is one that the cut alone could have given. Rows of zeros stay zeros: the
gradient of a row of Q' is a multiple of the same row of K', and the other way round.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .forms import Forms, Inputs, second_moment
from .truncation import Cut, rows_of, supports

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
    whole, start = (_short(one, heads) for one in (forms, found.padded(forms)))
    whiten, colour = (one.float() for one in _whitening(seen.with_one(forms.biased)))
    unknowns = {"q": start.q @ colour, "k": start.k @ colour}
    if start.diagonal is not None:
        unknowns["diagonal"] = start.diagonal  # zero where it has no support
        support = supports(forms)[heads].float()
    for value in unknowns.values():
        value.requires_grad_()

    def current() -> Forms:
        now = {"q": unknowns["q"] @ whiten, "k": unknowns["k"] @ whiten}
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
            if forms.uses == "tied":
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


def _short(forms: Forms, heads: list[int]) -> Forms:
    """Some heads, in float32."""
    diagonal = None if forms.diagonal is None else forms.diagonal[heads].float()
    return replace(forms, q=forms.q[heads].float(), k=forms.k[heads].float(), diagonal=diagonal)


def _whitening(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse root and the root of the second moment, directions of less than 1e-4 of the largest counting that."""
    values, vectors = torch.linalg.eigh(second_moment(x))
    sizes = values.clamp(min=1e-4 * values[-1]).sqrt()
    return vectors / sizes @ vectors.T, vectors * sizes @ vectors.T


def _said(forms: Forms, seen: Inputs) -> tuple[Tensor, Tensor]:
    """The logarithms of the weights (B, H, O, T, T), and the forces of the heads (B, H, T, W) where they are tied."""
    q, k = forms.features(seen)
    scores = forms.scale * (q @ k[:, :, None].mT)
    if forms.diagonal is not None:
        x = seen.x
        turned = torch.einsum("btw,hw->bhtw", x, forms.diagonal)
        scores = scores + forms.scale * (turned @ x[:, None].mT)[:, :, None]
    scores = scores + HIDDEN * (~seen.visible()).to(scores)
    log_p = scores.log_softmax(-1)
    if forms.uses != "tied":
        return log_p, log_p.new_zeros(1, len(forms.k), 1, 1)
    p = log_p.exp()
    force = torch.einsum("bhotr,horw->bhtw", forms.back(p @ k[:, :, None], seen), forms.q)
    if forms.diagonal is not None:
        mean = p.sum(2) @ seen.x[:, None]
        force = force + forms.diagonal[:, None] * mean
    return log_p, force


def _placed(forms: Forms, found: Cut, heads: list[int], now: Forms) -> Cut:
    """The cut with these values for some heads."""
    q, k = list(found.q), list(found.k)
    diagonal = None if found.diagonal is None else found.diagonal.clone()
    for n, head in enumerate(heads):
        kept = found.kept
        rows = torch.arange(found.ranks[head]) if kept is None else rows_of(forms, kept[head])
        q[head], k[head] = (one[n].detach().double()[..., rows, :] for one in (now.q, now.k))
        if diagonal is not None:
            diagonal[head] = now.diagonal[n].detach().double()
    return replace(found, q=tuple(q), k=tuple(k), diagonal=diagonal)
