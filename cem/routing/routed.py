"""Routed: every token takes a light step, the few that a router chooses also the heavy one.

Legend: B batch, T tokens, S tokens so far, D dim, K chosen tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layer import EnergyLayer
from .adapter import Adapter
from .cache import RoutedCache, new_cache
from .potential import Potential, energy_of, potential_of
from .router import Choice, Router
from .rows import Given, Rows, looks, stages_of, step_some

WEIGHTS = ("soft", "straight_through", "dense")
CONTEXTS = ("all", "selected")


class Routed(nn.Module):
    """A layer for a share of the tokens, and an adapter for all (conditional adapters, CoDA).

        u = norm(x)                           s = score(x), lam = soft top-k of s, P = places of the k largest s
        y_i = x_i + A(u_i) + m_i (F(x)_i - x_i)           m_i = lam_i for i in P, 0 otherwise

    The rows of P are gathered, go through the layer F, and are put back: the others cost the adapter and a score.
    A stack is routed once: the rows go through all of its layers and the difference is added. With k = T, and an
    adapter as it starts, y = F(x) to the last bit.

    Args:
        layer: an :class:`~cem.EnergyLayer`; an ``nn.Sequential`` of them; or any module from states (B, K, D) to the
            next states, which is called with the rows alone: it works token by token, or mixes what was chosen.
        capacity: the share of tokens that is chosen, a float up to 1.0, rounded up, or their number, an int.
        adapter: A, an :class:`Adapter` or another branch from u to (B, T, D); nothing if None.
        scores: ``"learned"``: u . w. ``"energy"``: s_i = E_i(x_i), the energies of the layer, which costs a pass over
            all tokens. Or a callable from states (B, T, D) to scores (B, T); a module is registered.
        weight: ``"soft"``: m = lam. ``"straight_through"``: m = 1 in value and lam in its derivative. ``"dense"``:
            m = lam for all tokens, with nothing skipped.
        context: what the rows see: ``"all"`` tokens, those that do not move as well (k-to-all: block-coordinate
            descent of the same conditional energies), or the ``"selected"`` ones (k-to-k: other energies).
        causal: None chooses the best of a sequence, so a token's part depends on later ones: refused for a causal
            layer with a context. Without looking ahead: ``"threshold"``, the best share of the tokens up to each one,
            with its weight in their soft top-k; ``"fixed"``, from the score on that :meth:`calibrate` found;
            ``"predictor"``: in training the best of the sequence, while a linear predictor learns from ``router.loss``
            who they are, and in evaluation those that it predicts.
        eps: the temperature of the soft top-k, in units of the scores.
        norm: what router and adapter read states through, a module or a class called with D; RMSNorm with a gain
            if None.
        dim: D, where neither the layer nor the adapter tells.
        branch: the layer gives what is to be added and not the next state.

    Attributes:
        choice: the :class:`~cem.routing.Choice` of the last call, without its graph.
        potential: a :class:`Potential`.

    Raises:
        ValueError: an unknown option, a causal layer that would look ahead, energies of something that has none.

    >>> import torch, cem
    >>> from cem.energies import interaction, gated_silu
    >>> heavy = torch.nn.Sequential(
    ...     cem.derive(interaction, dim=32, heads=2, rank=16, norm=torch.nn.RMSNorm),
    ...     cem.derive(gated_silu, dim=32, hidden=64, norm=torch.nn.RMSNorm),
    ... )
    >>> block = cem.Routed(heavy, 0.25, cem.Adapter(32, bottleneck=8), causal="threshold")
    >>> tokens = torch.randn(2, 40, 32)
    >>> block(tokens).shape, block.choice.index.shape[1] < 20
    (torch.Size([2, 40, 32]), True)
    >>> cache = block.init_cache(batch=2, max_seq=64)
    >>> parts = [block(tokens[:, :30], cache=cache), block(tokens[:, 30:], cache=cache)]
    >>> torch.allclose(torch.cat(parts, 1), block(tokens), atol=1e-5)
    True
    >>> cem.Routed(heavy, 1.0, causal="threshold")(tokens).equal(heavy(tokens))
    True

    Source: Lei et al., Conditional Adapters, arXiv:2304.04947, for encoders. The causal forms, and energies as scores,
    are ours.
    """

    def __init__(
        self,
        layer: nn.Module,
        capacity: float | int,
        adapter: nn.Module | None = None,
        *,
        scores: str | Callable[[Tensor], Tensor] = "learned",
        weight: str = "soft",
        context: str = "all",
        causal: str | None = None,
        eps: float = 0.1,
        norm: nn.Module | Callable[[int], nn.Module] | None = None,
        dim: int | None = None,
        branch: bool = False,
    ) -> None:
        super().__init__()
        stages = stages_of(layer)
        _check(stages, scores, weight, context, causal, branch)
        known = [part.dim for part in (*stages, adapter) if isinstance(part, EnergyLayer | Adapter)]
        dim = next(iter(known), dim)
        if dim is None:
            raise ValueError(
                f"the width of {type(layer).__name__} is not known: got no `dim`; type `dim=256`"
            )
        if not isinstance(norm, nn.Module):
            norm = nn.RMSNorm(dim) if norm is None else norm(dim)
        self.layer, self.adapter, self.norm = layer, adapter, norm
        self.weight, self.context, self.branch = weight, context, branch
        self.scored = scores if isinstance(scores, str) else "callable"
        given = None if scores == "energy" else scores
        self.router = Router(dim, capacity, scores=given, causal=causal, eps=eps)
        self.choice: Choice | None = None

    def forward(
        self,
        h: Tensor,
        *,
        context: Tensor | None = None,
        visible: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: RoutedCache | None = None,
    ) -> Tensor:
        """The next states, shape (..., T, D).

        Args:
            h: states, shape (..., T, D).
            context: other tokens to look at, (..., S, D), for layers that are not causal.
            visible: bool, (..., T) with False for padding, which is not chosen, or (..., T, S).
            positions: whole numbers (T,) or (..., T); 0, 1, ... if None. The rows keep theirs.
            document_ids: whole numbers (..., T). The choice is among all tokens of the sequence.
            cache: of :meth:`init_cache`; ``visible`` is then (..., S), over all tokens so far.
        """
        shape = h.shape
        past = None if cache is None else cache.length
        given = Given.read(h, context, visible, positions, document_ids, past)
        h = h.reshape(-1, *shape[-2:])
        if cache is not None:
            return self._decode(h, cache, given).reshape(shape)
        self._refuse(given.context)
        u = self.norm(h)
        s, real = self.scores(h, u, given), given.real
        choice = self.choose(s, u, real)
        rows = given.rows(choice)
        if choice.index is not None and not choice.index.shape[1]:
            return self._lightly(h, u).reshape(shape)
        before = rows.take(h)
        after = rows.through(stages_of(self.layer), h, self.context == "selected")
        return self._join(h, u, rows, before, after, choice).reshape(shape)

    def _refuse(self, context: Tensor | None) -> None:
        """``ValueError`` for a context that is given to causal layers."""
        for stage in stages_of(self.layer) if context is not None else ():
            if looks(stage) and stage.causal:
                raise ValueError(
                    f"layer `{stage.energy_function.name}` is causal, so it looks at its own tokens: got `context`;"
                    " derive it with `causal=False`"
                )

    def scores(self, h: Tensor, u: Tensor, given: Given) -> Tensor:
        """Scores (B, T) of states (B, T, D), read as u = norm(h)."""
        if self.scored != "energy":
            return self.router(h, u)
        s = self.layer.energy(h, **given.rows(None).inputs(self.layer, h, False))
        return s.to(torch.promote_types(s.dtype, torch.float32))

    def choose(self, s: Tensor, u: Tensor, real: Tensor | None) -> Choice:
        """The choice by scores (B, S) among the tokens u (B, T, D) that are ``real``, (B, S)."""
        choice = self.router.choose(s, u, real, every=self.weight == "dense")
        self.choice = choice._replace(weight=choice.weight.detach())
        # A causal layer counts the places of its rows from the end of the context, so all of them must be in order.
        return choice.in_order() if self.context == "all" else choice

    def _join(
        self, h: Tensor, u: Tensor, rows: Rows, before: Tensor, after: Tensor, choice: Choice
    ) -> Tensor:
        """x + A(u) + m (F(x) - x), where m = 1 gives F(x) to the last bit."""
        after = before + after if self.branch else after
        weight = choice.weight
        if self.weight == "straight_through":
            through = 1 + (weight - weight.detach())
            weight = through if choice.present is None else through * choice.present
        after = after.to(before.dtype)  # autocast may have changed it
        after = torch.lerp(before, after, weight[..., None].to(before.dtype))
        return self._lightly(rows.put(h, after), u)

    def _lightly(self, h: Tensor, u: Tensor) -> Tensor:
        return h if self.adapter is None else h + self.adapter(u)

    def _decode(self, h: Tensor, cache: RoutedCache, given: Given) -> Tensor:
        B, T = h.shape[:2]
        if self.training and self.router.causal == "predictor":
            raise ValueError(
                "a router that learns to predict chooses from whole sequences: got `cache` in training; type"
                " `routed.eval()`"
            )
        cache.check(B, T, given)
        u = self.norm(h)
        s, real = cache.scores_with(self.scores(h, u, given)), given.real
        choice = self.choose(s, u, real)
        chosen = given.rows(choice)
        before = rows = chosen.take(h)
        state, selected = h, self.context == "selected"
        seen = cache.seen_with(choice, T) if selected else real
        for place, (stage, held) in enumerate(
            zip(stages_of(self.layer), cache.layers, strict=True)
        ):
            if place and held is not None:
                state = chosen.moved(h, rows)
            if held is not None and not selected:
                rows = step_some(stage, held, state, rows, chosen, real)
            elif rows.shape[1]:
                inputs = chosen.inputs(stage, state, True) if held is None else {}
                if held is not None:
                    inputs = {"cache": held, "visible": seen}
                    if stage.reader.placed:
                        inputs["positions"] = chosen.along(chosen.positions)
                rows = stage(rows, **inputs)
        cache.length += T
        return self._join(h, u, chosen, before, rows, choice)

    def init_cache(self, batch: int, max_seq: int) -> RoutedCache:
        """An empty cache for ``batch`` sequences of up to ``max_seq`` tokens.

        With ``context="all"`` it holds what the layers compute from all tokens as context, with ``"selected"`` from the
        chosen ones alone: columns are shared by the sequences, so one holds what any of them chose.

        Raises:
            ValueError: a router that looks ahead; a layer that no cache serves; an ordinary module, which may look
                at other tokens; energies as scores of a layer with a context.
        """
        return new_cache(self, batch, max_seq)

    def calibrate(self, h: Tensor, **inputs: Tensor | None) -> None:
        """Set the threshold of ``causal="fixed"`` so that it chooses the share of the tokens of ``h``.

        ``inputs`` as in :meth:`forward`. Before, all tokens are chosen, with weight 1.
        """
        if self.router.causal != "fixed":
            raise ValueError(
                f"only a fixed threshold is calibrated: got causal={self.router.causal!r}; type"
                ' `Routed(..., causal="fixed")`'
            )
        names = ("context", "visible", "positions", "document_ids")
        given = Given.read(h, *(inputs.get(name) for name in names))
        with torch.no_grad():
            h = h.reshape(-1, *h.shape[-2:])
            self.router.calibrate(self.scores(h, self.norm(h), given), given.real)

    @property
    def potential(self) -> Potential:
        """Whether the whole step is the gradient of a potential, and of which kind."""
        return potential_of(self)

    def energy(self, h: Tensor, *, at: Tensor | None = None, **inputs: Tensor | None) -> Tensor:
        """V with y - x = -dV/dx, one number a sequence, shape (...); see :attr:`potential`.

            V = step_size * sum_i m_i E_i(x_i) + sum_i E_light(x_i)         scores other than energies
            V = step_size * v(E_1(x_1), ..., E_T(x_T)) + sum_i E_light(x_i)  energies as scores; v: soft_top_k_sum

        Args:
            h: states (..., T, D).
            at: states at which context, gates, choice and weights are taken; ``h`` if None.
            inputs: as in :meth:`forward`, without a cache.

        Raises:
            ValueError: a step without a potential, with the reason.
        """
        given = Given.read(h, **inputs)
        self._refuse(given.context)
        return energy_of(self, h, h if at is None else at, given)

    def extra_repr(self) -> str:
        return f"scores={self.scored!r}, weight={self.weight!r}, context={self.context!r}"


def _check(
    stages: list, scores, weight: str, context: str, causal: str | None, branch: bool
) -> None:
    """Refuse, with ``ValueError``, options that do not fit together."""
    if weight not in WEIGHTS:
        raise ValueError(f'`weight` is one of {WEIGHTS}: got {weight!r}; type `weight="soft"`')
    if context not in CONTEXTS:
        raise ValueError(f'`context` is "all" or "selected": got {context!r}; type `context="all"`')
    if not callable(scores) and scores not in ("learned", "energy"):
        raise ValueError(
            f'`scores` is "learned", "energy" or a callable: got {scores!r}; type `scores="learned"`'
        )
    if weight == "dense" and causal:
        raise ValueError(
            f"weights of all tokens come from the whole sequence: got weight='dense' and causal={causal!r}; type"
            ' `weight="soft"`'
        )
    energies = [stage for stage in stages if isinstance(stage, EnergyLayer)]
    if scores == "energy" and not (len(stages) == len(energies) == 1):
        raise ValueError(
            f"energies are the scores of one layer of energies: got {[type(stage).__name__ for stage in stages]}; type"
            ' `scores="learned"`'
        )
    if branch and energies:
        raise ValueError(
            "layers of energies give the next states: got branch=True; type `branch=False`"
        )
    for layer in filter(looks, energies):
        name = layer.energy_function.name
        if layer.causal and causal is None:
            raise ValueError(
                f"layer `{name}` is causal, and the best of a whole sequence depend on its end: got causal=None; type"
                ' `causal="threshold"`, or derive the layer with `causal=False`'
            )
        if layer.moving and context == "all":
            raise ValueError(
                f"layer `{name}` moves its context, which is its own states: got context='all'; type"
                ' `context="selected"`'
            )
