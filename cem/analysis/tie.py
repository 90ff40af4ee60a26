"""The energy layer nearest to given weights: values tied to keys, what is written tied to what is read.

Legend: B batch, T tokens, D dim, H heads, R rank of a head, M hidden units, N tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sympy import Sum
from torch import Tensor, nn

from ..energy import Energy
from ..language import words
from ..language.positions import rope
from ..language.reductions import logsumexp
from ..language.symbols import context, dims, frozen, parameter, scalar, state
from ..layer import EnergyLayer, derive

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
GATES = (words.silu, words.gelu, words.gelu_tanh, words.relu, words.sigmoid)


def weighed_interaction(frequencies: tuple[float, ...] | None = None) -> Energy:
    """E = -(1/beta) sum_go w_go log sum_s exp(beta q_go . k_gs), rotary with these frequencies: heads with a sign."""
    dim, groups, per_group, rank = dims("dim groups per_group rank")
    h, x = state(dim), context(dim)
    Q, K = (
        parameter("Q", groups, per_group, rank, dim),
        parameter("K", groups, rank, dim),
    )
    w = parameter("w", groups, per_group)
    beta = scalar("beta", default=rank**-0.5, positive=True)
    i, r, s = dim.index("i"), rank.index("r"), x.index("s")
    g, o = groups.index("g"), per_group.index("o")
    q, k = Sum(Q[g, o, r, i] * h[i], i), Sum(K[g, r, i] * x[s, i], i)
    if frequencies is not None:
        q, k = rope(q, r, h, frequencies=frequencies), rope(k, r, s, frequencies=frequencies)
    score = logsumexp(beta * Sum(q * k, r), s)
    return Energy(-Sum(w[g, o] * score, g, o) / beta, name="weighed_interaction")


def weighed_gated(gate) -> Energy:
    """E = -1/2 sum_m w_m g(G_m . c) (U_m . h)^2, c = frozen(h), g a word: hidden units with a sign."""
    dim, hidden = dims("dim hidden")
    h = state(dim)
    U, G = parameter("U", hidden, dim), parameter("G", hidden, dim)
    w = parameter("w", hidden)
    i, m = dim.index("i"), hidden.index("m")
    opened = gate(Sum(G[m, i] * frozen(h)[i], i))
    return Energy(-Sum(w[m] * opened * Sum(U[m, i] * h[i], i) ** 2, m) / 2, name="weighed_gated")


@dataclass(frozen=True)
class Tie:
    """How far what is written is from a multiple of what is read, head by head or hidden unit by hidden unit.

    Attributes:
        shares: the best factor of each, w; a positive one descends its term of the energy, a negative one climbs it.
        errors: the relative error that the factor leaves, between 0 (tied) and 1 (orthogonal).
        step: the best factor for all.
        error, error_of_step: relative errors of the whole, with a factor each and with one for all.
        nearest: of heads, the relative error of the nearest tied head when its scores may change as well, else None.
    """

    shares: Tensor
    errors: Tensor
    step: float
    error: float
    error_of_step: float
    nearest: Tensor | None = None


def _tie(dot: Tensor, written: Tensor, read: Tensor, left, nearest: Tensor | None = None) -> Tie:
    """From <written, read>, |written|^2 and |read|^2 of each, and what is left of |written|^2 by factors."""
    shares, total, step = dot / read, written.sum(), dot.sum() / read.sum()
    rest = left(shares)
    return Tie(
        shares,
        (rest / written).sqrt(),
        float(step),
        float((rest.sum() / total).sqrt()),
        float((left(step.expand_as(shares)).sum() / total).sqrt()),
        nearest,
    )


def fit_tied(q: Tensor, k: Tensor, v: Tensor, o: Tensor, *, heads: int) -> Tie:
    """How nearly attention weights are tied: O_a V_a against a multiple of Q_a^T K_a, both (D, D), of every head.

    The interaction energy moves a token by sum_a w_a Q_a^T sum_s p_as K_a x_s where attention moves it by
    sum_a O_a sum_s p_as V_a x_s, with the same p. So w_a = <O V, Q^T K> / |Q^T K|^2 and the error is the sine of their
    angle, Frobenius products, which cost R x R matrices. ``nearest`` lets the scores move too: M of rank R with the
    least |M - A|^2 + |M - B|^2, where A and B are Q^T K and +-O V of norm 1, is the singular value decomposition of
    their mean cut at R; its root mean square error. With rotary positions this compares at distance 0.

    Args:
        q, k, v, o: weights as ``nn.Linear`` holds them: (H R, D), (G R, D), (G R', D) and (D, H R'), G dividing H.
        heads: H.

    Raises:
        ValueError: shapes that do not fit.

    >>> import torch
    >>> q, k = torch.randn(8, 6), torch.randn(8, 6)
    >>> found = fit_tied(q, k, v=k, o=2 * q.T, heads=2)
    >>> torch.allclose(found.shares, torch.tensor(2.0)), found.error < 1e-5
    (True, True)
    """
    dim = q.shape[1]
    rank = q.shape[0] // heads
    fits = q.shape[0] == heads * rank and k.shape[1] == v.shape[1] == dim and k.shape[0] % rank == 0
    groups = k.shape[0] // rank if fits and k.shape[0] else 0
    if not groups or heads % groups or o.shape != (dim, heads * (v.shape[0] // groups)):
        raise ValueError(
            f"weights of {heads} heads are q (H R, D), k (G R, D), v (G R', D), o (D, H R'): got"
            f" {', '.join(str(tuple(x.shape)) for x in (q, k, v, o))}; give them as `nn.Linear.weight` holds them"
        )
    q, o = (
        q.unflatten(0, (heads, -1)),
        o.unflatten(1, (heads, -1)).transpose(0, 1),
    )  # (H, R, D), (H, D, R')
    k, v = (x.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0) for x in (k, v))

    def values(left: Tensor, right: Tensor) -> Tensor:
        """The singular values of left right, of (H, D, 2R) and (H, 2R, D)."""
        return torch.linalg.svdvals(torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT)

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        """The singular values of a Q^T K + b O V."""
        a, b = a[:, None, None], b[:, None, None]
        return values(torch.cat([a * q.mT, b * o], 2), torch.cat([k, v], 1))

    one = q.new_ones(heads)
    read, written = (mixed(a, b).square().sum(1) for a, b in ((one, 0 * one), (0 * one, one)))
    dot = ((o.mT @ q.mT) * (v @ k.mT)).sum((1, 2))
    sign = torch.where(dot < 0, -1.0, 1.0)
    # |M - A|^2 + |M - B|^2 = 2 |M - (A + B) / 2|^2 + |A - B|^2 / 2
    a, b = read.rsqrt(), sign * written.rsqrt()
    cut = mixed(a, b)[:, q.shape[1] :].square().sum(1) / 2
    apart = mixed(a, -b).square().sum(1) / 2
    nearest = ((cut + apart) / 2).sqrt()
    return _tie(dot, written, read, lambda w: mixed(-w, one).square().sum(1), nearest)


@dataclass(frozen=True)
class Fit:
    """An energy layer fitted to a module.

    Attributes:
        layer: an :class:`~cem.EnergyLayer` with the module's scores or gates, and a signed share w of the tied force.
        tie: how nearly the weights are tied, a :class:`Tie`.
        error: |u - force| / |u| on the states that it was fitted to, or None without any.
    """

    layer: EnergyLayer
    tie: Tie
    error: float | None


def fit_energy(
    module: nn.Module,
    h: Tensor | None = None,
    *,
    norm: nn.Module | None = None,
    rotary: nn.Module | None = None,
    causal: bool = True,
    **inputs,
) -> Fit:
    """The energy layer nearest to attention or a gated MLP as transformers has them (Llama, Mistral, Qwen2, ...).

    What decides where to look is kept: queries and keys, or gates and the up projection. What is written is tied to
    it, with one signed share w for every head or hidden unit,

        attention    -dE/dh = sum_a w_a Q_a^T R_t^T sum_s p_as R_s K_a x_s      for O_a V_a
        gated MLP    -dE/dh = U^T (w * g(G c) * U h)                            for the down projection

    and w is the least-squares fit of the outputs at h, or of the weights (:func:`fit_tied`) where h is None. Rotary
    attention is never tied exactly, whatever its weights: its values are not rotated.

    Args:
        module: with ``q_proj, k_proj, v_proj, o_proj``, or ``gate_proj, up_proj, down_proj``, without biases.
        h: states, (B, T, D), before the norm.
        norm: what module and energy read the state through; the identity if None.
        rotary: of rotary attention, the module with ``inv_freq`` that gives cosines and sines.
        causal: whether attention is.
        **inputs: further arguments of the module, such as ``attention_mask``.

    Raises:
        ValueError: a module of another kind, with biases, norms of queries and keys, or an unknown activation.

    >>> import torch
    >>> from torch import nn
    >>> class MLP(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate_proj, self.up_proj = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
    ...         self.down_proj, self.act_fn = nn.Linear(6, 4, bias=False), nn.SiLU()
    ...     def forward(self, h):
    ...         return self.down_proj(self.act_fn(self.gate_proj(h)) * self.up_proj(h))
    >>> mlp = MLP()
    >>> mlp.down_proj.weight.data = 3.0 * mlp.up_proj.weight.data.T
    >>> found = fit_energy(mlp, torch.randn(2, 5, 4))
    >>> found.error < 1e-5, torch.allclose(found.layer.w, torch.tensor(3.0), atol=1e-3)
    (True, True)
    """
    kind = kind_of(module)
    if kind is None:
        raise ValueError(
            f"an energy is fitted to modules with {', '.join(ATTENTION)}, or {', '.join(MLP)}: got"
            f" {type(module).__name__}; give the submodule that has them, or its weights to `fit_tied`"
        )
    _refuse(module, ATTENTION if kind == "attention" else MLP)
    make = _attention if kind == "attention" else _mlp
    layer, tie = make(module, norm, rotary, causal)
    error = None
    with torch.no_grad():
        layer.w.copy_(tie.shares.view_as(layer.w))
        if h is not None:
            inputs = with_positions(rotary, h, inputs)
            g = layer.norm(h)
            out = module(g, **inputs)
            target = (out[0] if isinstance(out, tuple) else out).double()
            seen = {}
            if kind == "attention":
                seen = {"visible": seen_by(inputs.get("attention_mask"), h)}
                gram, right = _normal_of_heads(layer, h, target, seen)
            else:
                gram, right = _normal_of_units(module, g, target)
            shares = torch.linalg.lstsq(gram, right[:, None], driver="gelsd", rcond=1e-12).solution
            layer.w.copy_(shares.view_as(layer.w))
            error = float((target - (layer(h, **seen) - h)).norm() / target.norm())
    return Fit(layer, tie, error)


def kind_of(module: nn.Module) -> str | None:
    """``"attention"`` or ``"mlp"`` by the names of its projections."""
    for kind, names in (("attention", ATTENTION), ("mlp", MLP)):
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
            return kind
    return None


def with_positions(rotary: nn.Module | None, h: Tensor, inputs: dict) -> dict:
    """The inputs of attention with the cosines and sines of positions 0, 1, ..., where it wants some."""
    if rotary is None or "position_embeddings" in inputs:
        return inputs
    places = torch.arange(h.shape[-2], device=h.device)[None]
    return inputs | {"position_embeddings": rotary(h, places)}


def seen_by(mask: Tensor | None, h: Tensor) -> Tensor | None:
    """The mask of transformers, (B, 1, T, S) of bool or 0 and minus infinity, as that of an energy layer."""
    if mask is None:
        return None
    visible = mask if mask.dtype == torch.bool else mask == 0
    return visible[:, 0].expand(h.shape[0], -1, -1)


def _refuse(module: nn.Module, names: tuple[str, ...]) -> None:
    biased = [
        n for n in names if getattr(module, n).bias is not None and getattr(module, n).bias.any()
    ]
    normed = [n for n in ("q_norm", "k_norm") if getattr(module, n, None) is not None]
    if biased or normed:
        what = f"biases of {', '.join(biased)}" if biased else " and ".join(normed)
        raise ValueError(
            f"the fitted energy is bilinear in what it reads: got {type(module).__name__} with {what}; use"
            " `antisymmetry`, which takes any module"
        )


def _attention(module, norm, rotary, causal) -> tuple[EnergyLayer, Tie]:
    q, k, v, o = (getattr(module, name).weight.detach() for name in ATTENTION)
    rank = module.head_dim
    heads, groups = q.shape[0] // rank, k.shape[0] // rank
    beta, frequencies = float(module.scaling), None
    if rotary is not None:
        frequencies = tuple(float(f) for f in rotary.inv_freq)
        beta *= float(getattr(rotary, "attention_scaling", 1.0)) ** 2
    sizes = {"dim": q.shape[1], "groups": groups, "per_group": heads // groups, "rank": rank}
    layer = derive(weighed_interaction(frequencies), beta=beta, causal=causal, norm=norm, **sizes)
    return _filled(layer, q, {"Q": q, "K": k}), fit_tied(q, k, v, o, heads=heads)


def _mlp(module, norm, rotary, causal) -> tuple[EnergyLayer, Tie]:
    gate, up, down = (getattr(module, name).weight.detach() for name in MLP)
    layer = derive(weighed_gated(_word(module)), dim=up.shape[1], hidden=up.shape[0], norm=norm)
    tie = _tie(
        (down.mT * up).sum(1),
        down.square().sum(0),
        up.square().sum(1),
        lambda w: (down.mT - w[:, None] * up).square().sum(1),
    )
    return _filled(layer, up, {"U": up, "G": gate}), tie


def _filled(layer: EnergyLayer, like: Tensor, values: dict[str, Tensor]) -> EnergyLayer:
    """The layer in the type and on the device of some weights, and with their values."""
    norm = layer.norm
    layer.norm = nn.Identity()  # not ours to move
    layer.to(like.device, like.dtype)
    layer.norm = norm
    with torch.no_grad():
        for name, value in values.items():
            parameter = getattr(layer, name)
            parameter.copy_(value.view_as(parameter))
    return layer.requires_grad_(False)


def _word(module: nn.Module):
    """The word that computes what the activation of a module does."""
    at = torch.linspace(-4.0, 4.0, 33)
    activation = getattr(module, "act_fn", None)
    for word in GATES if callable(activation) else ():
        if torch.allclose(activation(at), word(at), atol=1e-5):
            return word
    raise ValueError(
        f"the activation of a gated energy is one of {', '.join(word.__name__ for word in GATES)}: got"
        f" {activation!r} of {type(module).__name__}; use `antisymmetry`, which takes any module"
    )


def _normal_of_heads(layer: EnergyLayer, h: Tensor, target: Tensor, seen: dict):
    """Gram matrix and right side of the least squares for the shares of heads."""
    forces = []
    for n in range(layer.w.numel()):
        layer.w.zero_().view(-1)[n] = 1.0
        forces.append((layer(h, **seen) - h).flatten().double())
    forces = torch.stack(forces)  # (H, N D)
    return forces @ forces.mT, forces @ target.flatten()


def _normal_of_units(module: nn.Module, g: Tensor, target: Tensor):
    """The same for hidden units: the force is sum_m w_m a_m U_m with a_m one number a token."""
    up, target = module.up_proj.weight.double(), target.flatten(0, -2)
    a = (module.act_fn(module.gate_proj(g)) * module.up_proj(g)).flatten(0, -2).double()  # (N, M)
    return (a.mT @ a) * (up @ up.mT), ((target @ up.mT) * a).sum(0)
