"""The bilinear forms of the heads of a layer, and what the data say of them, in float64.

The score of query o of head a, token t, with token s is

    score_ts = scale_a * ( (R_t Q_ao x_t) . (R_s K_a x_s) + x_t . diag(lam_a) x_s )

Q: (heads, queries, rank, width), K: (heads, rank, width). R_t turns pairs of coordinates, or is absent. Biases of the
projections are the last column of Q and K, and the last entry of x is then 1. The force of a head, where its rank
takes part in it, is

    u_t = sum_o W_ao^T ( w_a * R_t^T sum_s p_ts R_s V_a x_s ) + lam_a sum_s p_ts x_s,       p_t = softmax_s(score_ts)

with W = Q, V = K and w = 1 unless the layer has others: W as Q, V as K, w (heads, rank).

Legend: B batch, T tokens, H heads, O queries of a head, R rank, W width, P rotated pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from sympy import Add, Function, Mul, Sum, expand_mul
from torch import Tensor, nn

from ..language.positions import POSITIONS, Lookup, Rope
from ..language.reductions import LogSumExp
from ..language.symbols import size_of
from ..language.words import only
from ..layer import EnergyLayer
from .attention import LowRankAttention, projections
from .checks import check_bilinear, check_matrices
from .groups import head_sizes

ROWS = ("q", "k", "values", "outputs", "shares")
"""What may have a row for each coordinate of the rank, in the last axis but one: such rows stay and go together."""
FIELDS = {"Q": "q", "K": "k", "V": "values", "W": "outputs", "w": "shares"}
"""The parameters of an energy and the fields of its forms that hold them."""


@dataclass(frozen=True)
class Forms:
    """The forms of one layer; see the docstring of this module.

    Attributes:
        q, k: (H, O, R, W) and (H, R, W).
        scale: of the scores of all heads.
        pairs: (P, 2), which coordinates of the rank turn together, or None where nothing turns.
        frequencies: of the pairs, or None where the layer is given its angles.
        diagonal: lam (H, W), or None.
        biased: whether x ends in a 1.
        uses: what a rank takes part in, as in :class:`cem.allocation.Heads`.
        blocked: whether the diagonal of a head is zero outside its own block of coordinates.
        alone: whether the weights are a softmax of the forms and nothing else: no bias, window, cap or sink.
        values: V (H, R, W), or None where the keys are averaged, or where V keeps its rank.
        outputs: W (H, O, R, W), or None where the queries write, or where W keeps its rank.
        shares: w (H, R, 1), (H, 1, 1) where it is one number a head, or None.
        sharpness: (H,), factors on ``scale``, or None.
    """

    q: Tensor
    k: Tensor
    scale: float
    pairs: Tensor | None = None
    frequencies: tuple[float, ...] | None = None
    diagonal: Tensor | None = None
    biased: bool = False
    uses: str = "scores"
    blocked: bool = False
    alone: bool = True
    values: Tensor | None = None
    outputs: Tensor | None = None
    shares: Tensor | None = None
    sharpness: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.k.shape[1]

    @property
    def step(self) -> int:
        """Ranks come in steps of this many."""
        return 1 if self.pairs is None else 2

    @property
    def scales(self) -> Tensor:
        """The scale of the scores of every head, (H,)."""
        one = self.k.new_full((len(self.k),), self.scale)
        return one if self.sharpness is None else one * self.sharpness

    @property
    def rows(self) -> dict[str, Tensor]:
        """The fields of ``ROWS`` that have a row for each coordinate."""
        found = {name: getattr(self, name) for name in ROWS}
        return {n: v for n, v in found.items() if v is not None and v.shape[-2] == self.rank}

    def each(self, change: Callable[[Tensor], Tensor]) -> Forms:
        """The same with every tensor that has an axis of heads changed."""
        found = {name: getattr(self, name) for name in (*ROWS, "sharpness", "diagonal")}
        return replace(self, **{n: change(v) for n, v in found.items() if v is not None})

    def features(self, seen: Inputs) -> tuple[Tensor, Tensor]:
        """Queries (B, H, O, T, R) and keys (B, H, T, R), turned."""
        x = seen.with_one(self.biased)
        q = torch.einsum("horw,btw->bhotr", self.q, x)
        if self.pairs is not None:
            cos, sin = self.turns(seen)
            q = _turned(q, self.pairs, cos[:, None, None], sin[:, None, None])
        return q, self._of_context(self.k, seen)

    def _of_context(self, rows: Tensor, seen: Inputs) -> Tensor:
        found = torch.einsum("hrw,btw->bhtr", rows, seen.with_one(self.biased))
        if self.pairs is None:
            return found
        cos, sin = self.turns(seen)
        return _turned(found, self.pairs, cos[:, None], sin[:, None])

    def averages(self, p: Tensor, seen: Inputs) -> Tensor:
        """What the heads write with W: w * R_t^T sum_s p_ts R_s V x_s, (B, H, O, T, R), for weights (B, H, O, T, T)."""
        value = self._of_context(self.k if self.values is None else self.values, seen)
        found = self.back(p @ value[:, :, None], seen)
        return found if self.shares is None else found * self.shares[:, None].mT

    @property
    def averages_keys(self) -> bool:
        """Whether the keys are values, so that their mean counts."""
        return self.uses in ("tied", "outputs")

    @property
    def writing(self) -> Tensor:
        """W (H, O, R, W)."""
        return self.q if self.outputs is None else self.outputs

    def forces(self, p: Tensor, seen: Inputs) -> Tensor:
        """The forces of the heads (B, H, T, W), see the docstring of this module, for weights (B, H, O, T, T)."""
        found = torch.einsum("bhotr,horw->bhtw", self.averages(p, seen), self.writing)
        if self.diagonal is None:
            return found
        return found + self.diagonal[:, None] * (p.sum(2) @ seen.x[:, None])

    def back(self, value: Tensor, seen: Inputs) -> Tensor:
        """Averages of turned keys (B, H, O, T, R), turned back by the positions of their queries."""
        if self.pairs is None:
            return value
        cos, sin = self.turns(seen)
        return _turned(value, self.pairs, cos[:, None, None], -sin[:, None, None])

    def turns(self, seen: Inputs) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the pairs, (B or 1, T, P)."""
        if seen.turns is not None:
            return seen.turns
        rates = torch.tensor(self.frequencies, dtype=torch.float64)
        angles = torch.arange(seen.x.shape[1], dtype=torch.float64)[:, None] * rates
        return angles.cos()[None].to(seen.x), angles.sin()[None].to(seen.x)

    def scores(self, seen: Inputs) -> Tensor:
        """The scores of every token with every other, (B, H, O, T, T)."""
        q, k = self.features(seen)
        found = q @ k[:, :, None].mT
        if self.diagonal is not None:
            x = seen.x
            turned = torch.einsum("btw,hw->bhtw", x, self.diagonal)
            found = found + (turned @ x[:, None].mT)[:, :, None]
        return self.scales[:, None, None, None] * found


@dataclass(frozen=True)
class Inputs:
    """What a layer reads: x = norm(h) (B, T, D) in float64, and the cosines and sines that it is given, if any."""

    x: Tensor
    turns: tuple[Tensor, Tensor] | None = None
    causal: bool = True

    def with_one(self, biased: bool) -> Tensor:
        if not biased:
            return self.x
        return torch.cat([self.x, torch.ones_like(self.x[..., :1])], -1)

    def part(self, rows: slice, dtype: torch.dtype | None = None) -> Inputs:
        """Some of the texts, in another type if it is given."""
        turns = self.turns
        if turns is not None:
            turns = tuple((turn[rows] if len(turn) > 1 else turn).to(dtype) for turn in turns)
        return Inputs(self.x[rows].to(dtype), turns, self.causal)

    def visible(self) -> Tensor:
        """Who sees whom, (T, T)."""
        mask = torch.ones(self.x.shape[1], self.x.shape[1], dtype=torch.bool)
        return mask.tril() if self.causal else mask


def _turned(value: Tensor, pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = value[..., pairs[:, 0]], value[..., pairs[:, 1]]
    found = torch.empty_like(value)
    found[..., pairs[:, 0]] = first * cos - second * sin
    found[..., pairs[:, 1]] = second * cos + first * sin
    return found


def second_moment(x: Tensor) -> Tensor:
    """E x x^T over all tokens: (..., T, F) -> (F, F) of the last axis, over all the others."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.T @ flat / len(flat)


def centred_moment(x: Tensor, causal: bool) -> Tensor:
    """The mean over t of the covariance of x_s over what t sees, (B, T, F) -> (F, F).

    A softmax ignores what is the same for all s, so this is what counts of the keys. With c_s = sum_{t >= s} 1/t for a
    causal layer it is (1/T) ( sum_s c_s x_s x_s^T - sum_t m_t m_t^T ), m_t the mean over s <= t.
    """
    count = x.shape[-2]
    if not causal:
        centred = x - x.mean(-2, keepdim=True)
        return second_moment(centred)
    share = 1.0 / torch.arange(1, count + 1, dtype=x.dtype)
    weight = share.flip(0).cumsum(0).flip(0)
    means = x.cumsum(-2) * share[:, None]
    raw = torch.einsum("s,...sf,...sg->fg", weight, x, x)
    middle = torch.einsum("...tf,...tg->fg", means, means)
    return (raw - middle) / (x.numel() // x.shape[-1])


def is_attention(module: nn.Module) -> bool:
    """Whether a module has forms that can be read: an energy with Q and K, or attention as in Llama or GPT-2."""
    if isinstance(module, EnergyLayer):
        known = {str(p.name): len(p.shape) for p in module.energy_function.parameters}
        return known.get("K") == 3 and known.get("Q") in (3, 4)
    if isinstance(module, LowRankAttention) or getattr(module, "is_cross_attention", False):
        return False
    llama, gpt2 = ("q_proj", "k_proj", "v_proj", "o_proj"), ("c_attn", "c_proj")
    names = (*llama, "head_dim", "scaling"), (*gpt2, "head_dim", "scaling")
    return any(all(hasattr(module, name) for name in row) for row in names)


def read(module: nn.Module) -> Forms:
    """The forms of a layer.

    Raises:
        ValueError: it is no attention, its scores are not bilinear in what it reads (a norm of queries and keys), or
            only a part of its coordinates turns.

    >>> import cem
    >>> from cem.energies import interaction
    >>> forms = read(cem.derive(interaction, dim=8, heads=2, rank=4))
    >>> forms.q.shape, forms.k.shape, forms.scale, forms.uses
    (torch.Size([2, 1, 4, 8]), torch.Size([2, 4, 8]), 0.5, 'tied')
    """
    if not is_attention(module):
        raise ValueError(
            f"compression needs attention: got {type(module).__name__}; give an `EnergyLayer` with Q (heads, rank, dim)"
            " and K (heads, rank, dim), or attention as in Llama or GPT-2"
        )
    return _of_energy(module) if isinstance(module, EnergyLayer) else _of_matrices(module)


def _of_energy(layer: EnergyLayer) -> Forms:
    energy = layer.energy_function
    heads, rank = head_sizes(energy)
    Q, K = layer.Q.detach().double().cpu(), layer.K.detach().double().cpu()
    q = Q[:, None] if Q.dim() == 3 else Q
    ropes = [one for one in energy.expression.atoms(Rope) if size_of(one.index) == rank]
    pairs = frequencies = None
    if ropes:
        tables = {rope.frequencies(K.shape[1]) for rope in ropes}
        if len(tables) > 1 or 2 * len(next(iter(tables))) != K.shape[1]:
            raise ValueError(
                f"energy `{energy.name}` turns a part of its coordinates or several ways: only whole rotations can be"
                f" cut to fewer pairs; got rank {K.shape[1]} and {[2 * len(t) for t in tables]} that turn"
            )
        (frequencies,) = tables
        pairs = _pairs(K.shape[1], next(iter(ropes)).interleaved)
    others = {
        str(p.name): p.shape
        for p in energy.parameters
        if {heads, rank} & set(p.shape) or _counts(p, heads)
    }
    own = tuple(n for n in "VW" if n in others and rank in others[n])
    uses = "scores"
    if {*others} <= {"Q", "K", "lam", "w", "log_beta", *own}:
        uses = {(): "tied", ("V",): "values", ("W",): "outputs"}.get(own, "scores")
    check_bilinear(layer, pairs, uses)
    lam, blocked = None, False
    if "lam" in others:
        lam = layer.lam.detach().double().cpu()
        blocked = lam.shape[1] != layer.dim
        lam = torch.block_diag(*lam) if blocked else lam
    found = {}
    if "log_beta" in others:
        found["sharpness"] = layer.log_beta.detach().double().cpu().exp()
    if uses != "scores":
        for name in {"V", "W", "w"} & {*others}:
            value = getattr(layer, name).detach().double().cpu()
            if name == "w":
                value = value[:, None, None] if value.dim() == 1 else value[..., None]
            elif name == "W" and value.dim() == 3:
                value = value[:, None]
            found[FIELDS[name]] = value
    beta = layer.scalars.get("beta", 1.0)
    found |= {"uses": uses, "blocked": blocked, "alone": _is_alone(energy)}
    forms = Forms(q, K, beta, pairs, frequencies, lam, **found)
    if "shares" in forms.rows and pairs is None:
        raise ValueError(
            f"energy `{energy.name}` weighs every coordinate of its rank, so only those that turn in pairs can be cut:"
            " got shares w (heads, rank) without a rotation; give one share a head, w (heads,)"
        )
    return forms


def _is_alone(energy) -> bool:
    """Whether the weights are a softmax of the forms alone: no bias, cap or sink, all seen, Q on the state only."""
    swap = {rope: rope.body for rope in energy.expression.atoms(Rope)}
    bare = energy.expression.xreplace(swap)
    if bare.atoms(*POSITIONS) or bare.atoms(only) or bare.atoms(Lookup):
        return False
    (Q,) = (p for p in energy.parameters if p.name == "Q")
    means = bare.atoms(LogSumExp)
    if bare.xreplace(dict.fromkeys(means, 0)).has(Q):
        return False
    if any(function.has(Q) for function in bare.atoms(Function)):
        return False
    for product in bare.atoms(Mul):
        plain = [factor for factor in product.args if not factor.has(Sum)]
        if any(one.has(Q) for one in plain) and any(one.has(energy.context) for one in plain):
            return False
    terms = (term for one in means for term in Add.make_args(expand_mul(one.args[0], deep=False)))
    return all(term.has(Q) or term.has(energy.state) for term in terms)


def _counts(parameter, heads) -> bool:
    return any(heads in size.free_symbols for size in parameter.shape[:1])


def values_apart(layer: EnergyLayer) -> bool:
    """Whether values and outputs have matrices of their own, with the rank of the queries: they keep it."""
    _, rank = head_sizes(layer.energy_function)
    return 2 == sum(
        str(p.name) in "VW" and rank in p.shape for p in layer.energy_function.parameters
    )


def _pairs(rank: int, interleaved: bool) -> Tensor:
    order = torch.arange(rank)
    return order.view(-1, 2) if interleaved else order.view(2, -1).T.contiguous()


def _of_matrices(module: nn.Module) -> Forms:
    rank = module.head_dim
    q_proj, k_proj, *_ = projections(module)
    k = _weight(k_proj).unflatten(0, (-1, rank))
    q = _weight(q_proj).unflatten(0, (len(k), -1, rank))
    biased = q_proj.bias is not None or k_proj.bias is not None
    if biased:
        q = torch.cat([q, _bias(q_proj, q.shape[:3])], -1)
        k = torch.cat([k, _bias(k_proj, k.shape[:2])], -1)
    turns = hasattr(module, "q_proj")
    forms = Forms(q, k, module.scaling, _pairs(rank, False) if turns else None, biased=biased)
    check_matrices(module, forms)
    return forms


def _weight(linear: nn.Linear) -> Tensor:
    return linear.weight.detach().double().cpu()


def _bias(linear: nn.Linear, shape) -> Tensor:
    if linear.bias is None:
        return torch.zeros(*shape, 1, dtype=torch.float64)
    return linear.bias.detach().double().cpu().view(*shape, 1)
