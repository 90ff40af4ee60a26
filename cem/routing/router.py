"""Which tokens are chosen, and with which weights.

Legend: B batch, T tokens, S tokens so far (T of them new), D dim, K chosen tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .running import ROUNDING, kept_of, running_choice, running_soft_top_k
from .top_k import soft_top_k, soft_top_k_level

CAUSAL = (None, "threshold", "fixed", "predictor")
REMEMBERED = 100
"""Calls of training over which a router averages its level."""


class Choice(NamedTuple):
    """The chosen tokens of every sequence, in their order.

    Attributes:
        index: their places (B, K), ascending; None where all are chosen.
        weight: lam (B, K) or (B, T), 0 where nothing stands at a place.
        present: bool (B, K), where sequences have different numbers of them; those that are not come last. Else None.
    """

    index: Tensor | None
    weight: Tensor
    present: Tensor | None

    def in_order(self) -> Choice:
        """The same with all places ascending."""
        if self.present is None:
            return self
        index, order = self.index.sort(-1)
        return Choice(index, self.weight.gather(1, order), self.present.gather(1, order))


class Router(nn.Module):
    """Scores of tokens, and the choice by them: by score, with the weights of the soft top-k.

    Args:
        dim: the width D.
        capacity: the share of the tokens that are chosen (a float up to 1.0), or their number (an int).
        scores: ``"learned"`` for u . w, a callable from states (B, T, D) to (B, T), or None where these are given.
        causal: as in :class:`~cem.Routed`.
        eps: the temperature of the weights.

    Attributes:
        loss: the cross entropy of the predictor in the last call of training, to be added to the loss; None before.
        threshold, level: of ``"fixed"``: a token is chosen from this score on, with weight
            min(1, exp((s + level) / eps)). Without calibration all are chosen, with weight 1.
    """

    def __init__(
        self,
        dim: int,
        capacity: float | int,
        *,
        scores: str | Callable[[Tensor], Tensor] | None,
        causal: str | None,
        eps: float,
    ) -> None:
        super().__init__()
        whole = isinstance(capacity, int) and not isinstance(capacity, bool)
        if not (whole and capacity >= 1 or isinstance(capacity, float) and 0 < capacity <= 1):
            raise ValueError(
                "`capacity` is a share of the tokens, above 0 and up to 1.0, or a whole number of them:"
                f" got {capacity!r}; type `capacity=0.25`"
            )
        if causal not in CAUSAL:
            raise ValueError(
                f'`causal` is None, "threshold", "fixed" or "predictor": got {causal!r}; type `causal="threshold"`'
            )
        if causal and whole:
            raise ValueError(
                f"a causal router does not know how many tokens follow: got capacity={capacity}, a number of them; type"
                " a share such as `capacity=0.25`"
            )
        if not eps > 0:
            raise ValueError(f"`eps` is a positive temperature: got {eps}; type `eps=0.1`")
        self.dim, self.capacity, self.causal, self.eps = dim, capacity, causal, eps
        self.scores, self.loss = None if isinstance(scores, str) else scores, None
        if scores == "learned":
            self.weight = nn.Parameter(torch.empty(dim))
        if causal == "predictor":
            self.predictor = nn.Linear(dim, 1)
        if causal in ("fixed", "predictor"):
            self.register_buffer("threshold", torch.full((1,), -math.inf))
            self.register_buffer("level", torch.full((1,), math.inf))
            self.register_buffer("calls", torch.zeros(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scores of variance 1 at the start, from states of variance 1; everything is chosen in decoding."""
        if hasattr(self, "weight"):
            nn.init.normal_(self.weight, std=self.dim**-0.5)
        if self.causal == "predictor":
            nn.init.zeros_(self.predictor.weight)
            nn.init.ones_(self.predictor.bias)
        if self.causal in ("fixed", "predictor"):
            self.threshold.fill_(-math.inf)
            self.level.fill_(math.inf)
            self.calls.zero_()

    def forward(self, h: Tensor, u: Tensor) -> Tensor:
        """Scores (B, T) of states h, read as u = norm(h), in float32 at least."""
        if self.scores is not None:
            s = self.scores(h)
        else:
            wide = torch.promote_types(u.dtype, torch.float32)
            s = u.to(wide) @ self.weight.to(wide)
        if s.shape != h.shape[:-1]:
            raise ValueError(
                f"`scores` gives one number a token, {tuple(h.shape[:-1])}: got {tuple(s.shape)}; did you forget"
                " `.squeeze(-1)`?"
            )
        return s.to(torch.promote_types(s.dtype, torch.float32))

    def choose(
        self, scores: Tensor, u: Tensor, real: Tensor | None = None, *, every: bool = False
    ) -> Choice:
        """The choice among the last T tokens.

        Args:
            scores: (B, S) of all tokens so far; of the last T alone where earlier ones are not compared with.
            u: (B, T, D), what the new tokens are read as.
            real: bool (B, S), False for padding, which is not chosen.
            every: choose all tokens, with the weights of the soft top-k.
        """
        S, T = scores.shape[1], u.shape[1]
        if self.causal == "threshold":
            chosen = running_choice(scores.detach(), self.capacity, T, real)
            index, present = _gathered(chosen)
            weight = running_soft_top_k(scores, index + (S - T), self.capacity, self.eps, real)
        elif self.causal == "fixed" or (self.causal and not self.training):
            own = scores[:, S - T :]
            if self.causal == "fixed":
                chosen = own >= self.threshold
            else:
                chosen = self.predictor(u)[..., 0] > 0
            chosen = chosen if real is None else chosen & real[:, -T:]
            index, present = _gathered(chosen)
            weight = ((own.gather(1, index) + self.level) / self.eps).clamp(max=0).exp()
        else:
            index, weight, present = self._of_the_sequence(scores, real, every)
            if self.causal:
                self._learn(scores, u, index, present, real)
        if present is not None:
            weight = weight.masked_fill(~present, 0)
        elif index.shape[1] == T:
            index = None
        return Choice(index, weight, present)

    def kept(self, real: Tensor | None, count: int) -> int | Tensor:
        """How many of ``count`` tokens are chosen; where some are padding, of each sequence, (B,)."""
        if real is None:
            if isinstance(self.capacity, int):
                return min(count, self.capacity)
            return max(1, math.ceil(count * self.capacity - ROUNDING))
        if isinstance(self.capacity, int):
            return real.sum(-1).clamp(max=self.capacity)
        return kept_of(self.capacity, real.sum(-1))

    def _of_the_sequence(self, scores: Tensor, real: Tensor | None, every: bool) -> tuple:
        B, T = scores.shape
        most = self.kept(None, T)
        k = most if real is None else self.kept(real, T)
        weight = soft_top_k(scores, k, self.eps, mask=real)
        if every:
            return torch.arange(T, device=scores.device).expand(B, T), weight, None
        masked = scores if real is None else scores.masked_fill(~real, -torch.inf)
        index = masked.topk(most, sorted=real is not None).indices
        present = None
        if real is not None:
            places = torch.arange(most, device=scores.device)
            there = places < torch.minimum(k, real.sum(-1))[:, None]
            if not there.all():
                order = index.masked_fill(~there, T).argsort(dim=-1, stable=True)
                index, present = index.gather(1, order), there
        if present is None:
            index = index.sort(-1).values
        return index, weight.gather(1, index), present

    def _learn(self, scores: Tensor, u: Tensor, index: Tensor, present, real) -> None:
        """The loss of the predictor, which does not reach the states, and the average of the level."""
        member = torch.zeros_like(scores)
        member.scatter_(1, index, 1.0 if present is None else present.to(scores.dtype))
        logits = self.predictor(u.detach())[..., 0].to(scores.dtype)
        self.loss = F.binary_cross_entropy_with_logits(
            logits, member, weight=None if real is None else real.to(scores.dtype)
        )
        with torch.no_grad():
            masked = scores if real is None else scores.masked_fill(~real, -torch.inf)
            k = torch.as_tensor(self.kept(real, scores.shape[1])).to(scores).expand(len(scores))
            level = soft_top_k_level(masked, k, self.eps).mean()
            if level.isfinite():
                self.calls += 1
                rate = 1 / self.calls.clamp(max=REMEMBERED)
                start = torch.where(self.calls == 1, level, self.level)
                self.level.copy_(start.lerp(level.to(start.dtype), rate.to(start.dtype)))

    @torch.no_grad()
    def calibrate(self, scores: Tensor, real: Tensor | None = None) -> None:
        """Set threshold and level to those of the top-k over all the given scores together."""
        flat = scores.flatten() if real is None else scores[real]
        k = self.kept(None, len(flat))
        self.threshold.fill_(flat.topk(k).values[-1])
        self.level.fill_(soft_top_k_level(flat, torch.tensor(k).to(flat), self.eps))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "loss": None}  # a copy carries no graph

    def extra_repr(self) -> str:
        return f"dim={self.dim}, capacity={self.capacity}, causal={self.causal!r}, eps={self.eps:g}"


def _gathered(chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    """Places (B, K) of what is chosen, (B, T), in their order, and which of them are, where numbers differ."""
    counts = chosen.sum(-1)
    most = int(counts.max())
    index = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    return index, None if bool((counts == most).all()) else chosen.gather(1, index)
