"""Compression of trained attention: what the heads of every layer need, measured, and layers of lower rank.

    spectra(model, tokens)         the data-weighted spectrum of every head, as :class:`~cem.allocation.Heads`
    losses(model, tokens, others)  the same heads with what each rank is worth to the predictions, in nats, when fitted
    compress(layer, ranks, seen)   a layer of lower rank, cut and then fitted to what the layer did, and a
                                   :class:`Truncation` that says what that changes
    compress_model(model, plan, tokens)

The layers are those of energies with matrices Q and K (``interaction`` and its rotary, grouped, diagonal and partly
tied relatives), and attention as in Llama and GPT-2, in any model of transformers. Scores keep the scale of the full
rank. Heads of several ranks become a sum of energies, one for each rank, or :class:`LowRankAttention`; nothing is
padded, except where the width of the state counts the heads (``diagonal_plus_low_rank``): there all heads get the
room of the widest.

Scores are truncated, values and outputs of four-matrix attention stay as they are. Where the matrices that score also
average or write, the rows of all matrices that they meet are cut: of Q and K where both ties hold, of V too where Q
writes values of its own, and of W too where averages of the keys are written by W (``loosely_tied_interaction_by``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..allocation import Plan
from ..allotment import Heads
from ..layer import EnergyLayer
from .attention import LowRankAttention as LowRankAttention
from .curves import measured, worth
from .fitting import fitted
from .forms import Forms, Inputs, is_attention, read, values_apart
from .groups import of_groups as of_groups
from .layers import described as described
from .layers import rebuilt
from .levels import Bounds, bounds, operator_norms
from .power_laws import Saturation, power_law, saturation
from .truncation import Cut, cut, gains


@dataclass(frozen=True)
class Truncation:
    """What :func:`compress` did to a layer, and what follows from it.

    Attributes:
        ranks, full: of every head after, and before.
        operator: for every head (the largest over its queries) |W - W'| times the scale of the scores: no score moves
            by more than this times |x_t| |x_s|, with a rotation at any distance.
        kept: the share of the gains (:mod:`cem.compression.truncation`) that the cut keeps, before the fit: of the
            data-weighted score variance; of tied values of the mean square of the scores; with values or outputs that
            are cut too, of that and the squared force.
        parameters: of the layer, before and after, as counted.
        calibrated: the bounds on the calibration data; None without data, or where the weights are not the softmax of
            Q and K alone.
    """

    ranks: tuple[int, ...]
    full: int
    operator: tuple[float, ...]
    kept: float
    parameters: tuple[int, int]
    calibrated: Bounds | None
    forms: Forms = field(repr=False)
    cut: Forms = field(repr=False)

    def bounds(self, seen: Inputs | Tensor) -> Bounds:
        """The same comparison on other data, such as held-out text: every row against every bound.

        Raises:
            ValueError: the weights of the layer are not the softmax of Q and K alone.
        """
        self._softmax_alone()
        return bounds(self.forms, self.cut, _inputs(seen))

    def energy_bound(self, size: float, context: float) -> float:
        """How far a token's energy can move, where :meth:`bounds` speaks: the sum of |W_a - W'_a| |h| max|x_s|."""
        self._softmax_alone()
        moved = operator_norms(self.forms, self.cut) / self.forms.scales[:, None]
        return float(moved.sum()) * size * context

    def _softmax_alone(self) -> None:
        if not self.forms.alone:
            raise ValueError(
                "the weights of this layer are not the softmax of Q and K alone: got an energy with a bias, a window, a"
                " cap or a sink, or without a softmax, whose rows are not compared; compare losses"
            )


def _inputs(seen: Inputs | Tensor, causal: bool = True) -> Inputs:
    return seen if isinstance(seen, Inputs) else Inputs(seen.detach().double().cpu(), None, causal)


def compress(
    layer: nn.Module,
    ranks: int | Sequence[int],
    calibration: Inputs | Tensor | None = None,
    *,
    together: bool = False,
    steps: int = 40,
) -> tuple[nn.Module, Truncation]:
    """A layer whose heads have lower ranks: a cut, fitted to the weights that the layer gave.

    Singular vectors stay, or whole pairs of a rotation (:mod:`cem.compression.truncation`); with calibration data what
    stays is then fitted (:mod:`cem.compression.fitting`). The layer is left as it is.

    Args:
        layer: an :class:`~cem.EnergyLayer` with Q and K, or attention as in Llama or GPT-2.
        ranks: one for all heads, or one for every head with a key; 0 takes a head away.
        calibration: what the layer reads (B, T, D), after its norm, or of :func:`inputs_of`; errors are weighed
            with it. Without it all directions count alike and nothing is fitted.
        together: all heads keep the same pairs of a rotation, so that they stay one call of the kernel.
        steps: of the fit. It holds the weights of the calibration data, B H T T numbers of float32. With 0, and where
            weights are more than a softmax of Q and K (a bias, a cap, a sink), the cut stays as it is.

    Returns:
        The new layer, and the :class:`Truncation`.

    Raises:
        ValueError: ranks of another number of heads or out of range, or a layer whose scores are not bilinear.

    >>> import torch, cem
    >>> from cem.energies import interaction
    >>> layer = cem.derive(interaction, dim=16, heads=2, rank=8)
    >>> small, done = compress(layer, [4, 2], torch.randn(4, 12, 16))
    >>> [(name, tuple(p.shape)) for name, p in small.named_parameters()][:2]
    [('K_0', (1, 4, 16)), ('K_1', (1, 2, 16))]
    >>> done.parameters, done.calibrated.violations
    ((512, 192), (0, 0, 0))
    """
    forms = read(layer)
    heads = len(forms.k)
    ranks = (ranks,) * heads if isinstance(ranks, int) else tuple(map(int, ranks))
    if len(ranks) != heads or not all(0 <= r <= forms.rank and r % forms.step == 0 for r in ranks):
        steps = f" in steps of {forms.step}" if forms.step > 1 else ""
        raise ValueError(
            f"`compress` takes one rank for each of {heads} heads, from 0 to {forms.rank}{steps}: got {ranks}; type"
            f" `compress(layer, {forms.rank // 2 // forms.step * forms.step})`"
        )
    causal = getattr(layer, "causal", True)
    seen = None if calibration is None else _inputs(calibration, causal)
    found = _reduced(forms, ranks, seen, together, steps)
    after = found.padded(forms)
    made = rebuilt(layer, forms, found)
    table = gains(forms, seen, together=together)
    kept = sum(
        float(row[: rank // forms.step].sum()) for row, rank in zip(table, ranks, strict=True)
    )
    counted = tuple(sum(p.numel() for p in one.parameters()) for one in (layer, made))
    done = Truncation(
        ranks,
        forms.rank,
        tuple(operator_norms(forms, after).amax(1).tolist()),
        kept / float(table.sum()) if table.any() else 1.0,
        counted,
        bounds(forms, after, seen) if seen is not None and forms.alone else None,
        forms,
        after,
    )
    return made, done


def _reduced(
    forms: Forms, ranks: tuple[int, ...], seen: Inputs | None, together: bool, steps: int
) -> Cut:
    """The cut, and fitted where that can be."""
    found = cut(forms, ranks, seen, together=together)
    return fitted(forms, found, seen, steps) if seen is not None and forms.alone else found


# -- whole models -----------------------------------------------------------------------------------------------


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a model by their path, in order; those that were cut to several ranks are not among them.

    Raises:
        ValueError: there are none.
    """
    found = {name: module for name, module in model.named_modules() if is_attention(module)}
    if not found:
        raise ValueError(
            f"`{type(model).__name__}` has no attention whose rank can be allocated: got no `EnergyLayer` with Q and K"
            " and no attention as in Llama or GPT-2; give such a model"
        )
    return found


@torch.no_grad()
def inputs_of(model: nn.Module, tokens: Tensor) -> dict[str, Inputs]:
    """What every attention layer of a language model reads on tokens (B, T), as :func:`compress` takes it.

    ``model(input_ids=tokens)`` is called once; each row is one text from its beginning. Of a layer behind a router that
    is given a context, it is the context.
    """
    found: dict[str, Inputs] = {}
    hooks = []

    def listen(name: str, module: nn.Module) -> None:
        def before(module, args, kwargs):
            h = args[0] if args else kwargs["hidden_states"]
            turns = kwargs.get("position_embeddings")
            if isinstance(module, EnergyLayer):
                context = kwargs.get("context")
                x, causal = module.norm(h if context is None else context), module.causal
            else:
                x, causal = h, True
                if turns is not None:
                    turns = tuple(turn.chunk(2, -1)[0].double().cpu() for turn in turns)
            found[name] = Inputs(x.detach().double().cpu(), turns, causal)

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

    for name, module in attentions(model).items():
        listen(name, module)
    try:
        _call(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _call(model: nn.Module, tokens: Tensor):
    device = next(model.parameters()).device
    return model(input_ids=tokens.to(device), use_cache=False)


def spectra(
    model: nn.Module, tokens: Tensor | None = None, *, together: bool = False
) -> list[Heads]:
    """The heads of every attention layer with what each step of their rank keeps, for :func:`cem.allocation.allocate`.

    Args:
        model: a language model of transformers, of energy layers or not.
        tokens: calibration text, (B, T); the spectra are those of the matrices alone without it.
        together: all heads of a layer keep the same pairs of a rotation, so gains are in their common order.

    Raises:
        ValueError: no attention, or scores that are not bilinear.
    """
    seen = {} if tokens is None else inputs_of(model, tokens)
    return [
        _heads(name, read(module), seen.get(name), together, _value_rank(module))
        for name, module in attentions(model).items()
    ]


def _value_rank(module: nn.Module) -> int | None:
    apart = isinstance(module, EnergyLayer) and values_apart(module)
    return module.V.shape[-2] if apart else None


def _heads(
    name: str,
    forms: Forms,
    seen: Inputs | None,
    together: bool = False,
    value_rank: int | None = None,
) -> Heads:
    rows = gains(forms, seen, together=together).clamp(min=0).tolist()
    return Heads(
        name,
        forms.q.shape[-1] - forms.biased,
        len(forms.k),
        forms.rank,
        queries=forms.q.shape[1],
        uses=forms.uses,
        step=forms.step,
        gains=tuple(map(tuple, rows)),
        value_rank=value_rank,
    )


@torch.no_grad()
def losses(
    model: nn.Module, tokens: Tensor, others: Tensor, *, together: bool = False, steps: int = 40
) -> list[Heads]:
    """The heads of every attention layer with what each step of their rank is worth to the model, in nats a token.

    One head at a time is cut and fitted as :func:`compress` does it, at a few ranks, and the whole model is asked what
    it then says of other text:

        L(r) = mean_t KL(P_t | P'_t),      P_t the probabilities of the next token,

    which is what the loss rises by where P is right, and never negative. Gains are the falls of L, made convex
    (:mod:`cem.compression.curves`). A head takes five fits, of it alone, and six passes over ``others``.

    Args:
        model: as in :func:`spectra`.
        tokens: calibration text, (B, T), that the cuts are fitted to.
        others: text to measure on that no cut was fitted to, (B, T). Its predictions are held, B T vocabulary numbers.
        together: as in :func:`spectra`.
        steps: of the fit, as of :func:`compress`; 0 measures the cut alone.

    Raises:
        ValueError: as :func:`spectra`.
    """
    seen, layers, found = inputs_of(model, tokens), attentions(model), []
    log_p = _predictions(model, others)
    for heads in spectra(model, together=together):
        module, name = layers[heads.name], heads.name
        forms, ranks, rows = read(module), measured(heads.rank, heads.step), []
        for head in range(heads.heads):
            lost = []
            for rank in ranks:
                kept = tuple(rank if one == head else heads.rank for one in range(heads.heads))
                one = _reduced(forms, kept, seen[name], together, steps)
                with replaced(model, {name: rebuilt(module, forms, one)}):
                    log_q = _predictions(model, others)
                lost.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
            rows.append(worth(ranks, lost, heads.rank, heads.step))
        found.append(replace(heads, gains=tuple(rows)))
    return found


def _predictions(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = _call(model, tokens).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def cross_entropy(model: nn.Module, tokens: Tensor) -> float:
    """The mean loss of the next token, in nats, each row of tokens (B, T) a text from its beginning."""
    logits = _call(model, tokens).logits[:, :-1].float()
    target = tokens[:, 1:].to(logits.device)
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()))


@contextmanager
def replaced(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """The model with other layers at some paths, for the time of a block."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield model
    finally:
        for name, layer in before.items():
            model.set_submodule(name, layer)


def compress_model(
    model: nn.Module, plan: Plan, tokens: Tensor | None = None, *, steps: int = 40
) -> dict[str, Truncation]:
    """Cut every attention layer of a model, in place, to the ranks of a plan.

    Args:
        model: that the plan was made for.
        plan: its layers are named as :func:`spectra` names them.
        tokens: calibration text, (B, T); all layers are cut by what they read before any is.
        steps: of the fit of every layer, as of :func:`compress`.

    Returns:
        A :class:`Truncation` for every layer, by its path.

    Raises:
        ValueError: a plan for other layers.
    """
    layers = attentions(model)
    named = [layer.name for layer in plan.layers]
    if named != list(layers):
        raise ValueError(
            f"the plan is for the layers {', '.join(named)}: got a model with {', '.join(layers)}; make the plan from"
            " `spectra(model, tokens)`"
        )
    seen = {} if tokens is None else inputs_of(model, tokens)
    done = {}
    for layer in plan.layers:
        module = layers[layer.name]
        new, done[layer.name] = compress(
            module, layer.ranks, seen.get(layer.name), together=layer.together, steps=steps
        )
        model.set_submodule(layer.name, new)
    return done


__all__ = [
    "Bounds",
    "Cut",
    "Inputs",
    "LowRankAttention",
    "Saturation",
    "Truncation",
    "attentions",
    "compress",
    "compress_model",
    "cross_entropy",
    "inputs_of",
    "losses",
    "of_groups",
    "power_law",
    "replaced",
    "saturation",
    "spectra",
]
