"""Upper bounds of the Hessian of an energy in its state, for given parameters.

A bound holds for every state, every context and every frozen value; its rules are sufficient and
none is necessary. The Hessian of a sub-expression with free indices F is held between two sums of
squares that share their rows,

    sum_k lo_k r_k r_k^T + lo I  <=  Hess f_F(h)  <=  sum_k hi_k r_k r_k^T + hi I     for every h,

in the order of symmetric matrices. Rows come from what is affine in the state:

* u^2 and u v, for affine u and v with known slopes, have a constant Hessian.
* A word F of an affine u has the row of u, and coefficients between the extremes of F''.
* A log-sum-exp of affine scores has the covariance of their slopes as its Hessian, which is at
  most a quarter of the squared diameter of the slopes (Popoviciu's inequality in every direction).
* Sums add, and factors multiply coefficients in interval arithmetic: a factor of parameters is
  known, one of the context or of frozen values lies between the extremes of its word.
* Whatever is convex or concave by :mod:`~cem.calculus.curvature` is at least or at most 0.

With lambda the largest eigenvalue of the upper sum, E(h + v) <= E(h) + v.dE/dh + lambda |v|^2 / 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from sympy import Add, Basic, Expr, Idx, Indexed, Mul, Pow, Sum, Symbol
from torch import Tensor

from ..language.evaluation import Evaluator
from ..language.indices import free_indices
from ..language.reductions import LogSumExp, Weights
from ..language.symbols import SEQ, Parameter, Ravel, State, index, size_of, spelling, total
from ..language.words import WORDS
from .curvature import curvature, explain
from .gradient import depends_on_state

ROUNDING = 1e-12
"""What float64 may lose of the sum of all squares; it is added to a bound."""

_WORDS = {word.function: word for word in WORDS}
_ANY = (-math.inf, math.inf)
_WIDTH = Symbol("_width", integer=True, positive=True)
_POINT = index("_point", _WIDTH)


@dataclass(frozen=True)
class Term:
    """A term of an energy and the largest eigenvalue that its Hessian can have.

    ``largest`` is inf where no bound is known and 0 for a concave term.
    """

    expression: Expr
    largest: float
    rule: str

    def __str__(self) -> str:
        bound = "no known bound" if math.isinf(self.largest) else f"at most {self.largest:.4g}"
        return f"{self.expression} has a Hessian of {bound}: {self.rule}"


@dataclass(frozen=True)
class Smoothness:
    """The bound of a whole energy: ``largest`` is at least every eigenvalue of its Hessian, and >= 0."""

    largest: float
    terms: tuple[Term, ...]


def smoothness(
    expression: Expr, values: Mapping[str, float | Tensor], sizes: Mapping[Symbol, int]
) -> Smoothness:
    """The largest eigenvalue that d2E/dh2 can have, anywhere and at any context.

    Args:
        expression: a canonical energy, without free indices.
        values: every parameter and scalar by name; sums are taken in float64.
        sizes: the named sizes.

    Returns:
        the bound of the whole and of its terms; inf where no rule gives one, or a value is not finite.

    >>> import torch, cem
    >>> from cem.energies import memory
    >>> hidden, dim = cem.dims("hidden dim")
    >>> values = {"U": torch.randn(5, 3), "beta": 2.0}
    >>> found = smoothness(memory.expression, values, {hidden: 5, dim: 3})
    >>> round(found.largest, 9)
    1.0
    """
    tensors = {name: torch.as_tensor(z, dtype=torch.float64) for name, z in values.items()}
    if not all(z.isfinite().all() for z in tensors.values()):
        return Smoothness(math.inf, (Term(expression, math.inf, "a parameter is not finite"),))
    tensors = {name: z.detach().cpu() for name, z in tensors.items()}
    parts = Add.make_args(expression)
    rules = _Rules(tensors, sizes, expression)
    forms = [rules.form(part) for part in parts]
    terms = tuple(
        Term(part, form.largest, form.rule)
        for part, form in zip(parts, forms, strict=True)
        if depends_on_state(part)
    )
    return Smoothness(rules.added(forms).largest, terms)


Row = tuple[tuple[Idx, ...], Expr]
"""The slope of an affine expression: its free indices, and an expression in these and ``_POINT``."""


@dataclass(frozen=True)
class _Form:
    """Two sums of squares around a Hessian: rows (F..., K, D), coefficients lo and hi (F..., K).

    ``identity`` holds the multiples of the identity below and above, for every free index.
    """

    axes: tuple[Idx, ...]
    rows: Tensor
    lo: Tensor
    hi: Tensor
    identity: tuple[float, float] = (0.0, 0.0)
    rule: str = ""

    @property
    def largest(self) -> float:
        """The largest eigenvalue of the upper sum, and at least 0; without free indices."""
        top = self.identity[1]
        if self.hi.isinf().any() or math.isinf(top):
            return math.inf
        if not (self.hi > 0).any():
            return max(top, 0.0)
        squares = self.hi[:, None] * self.rows
        lost = ROUNDING * float((squares * self.rows).abs().sum())
        return max(float(torch.linalg.eigvalsh(self.rows.mT @ squares)[-1]) + lost + top, 0.0)


class _Rules:
    """Walks an energy, each sub-expression after its parts."""

    def __init__(
        self, tensors: Mapping[str, Tensor], sizes: Mapping[Symbol, int], energy: Expr
    ) -> None:
        state = next(iter(energy.atoms(State)))
        width = int(state.shape[0].xreplace(dict(sizes)))
        self.known = {*tensors, *map(str, sizes)}
        self.basis = Parameter(Symbol("_basis", real=True), shape=(_WIDTH, state.shape[0]))
        eye = torch.eye(width, dtype=torch.float64)
        self.evaluate = Evaluator({"_basis": eye, **tensors}, {**sizes, _WIDTH: width})
        self.affine = _Form((), eye[:0], eye[:0, 0], eye[:0, 0], rule="affine")

    def form(self, node: Expr) -> _Form:
        if not depends_on_state(node) or _linear(node) is not None:
            return self.affine
        found, shape = self.step(node), curvature(node)
        lo, hi = found.identity
        if shape == "concave" and (hi > 0 or (found.hi > 0).any()):
            identity, zero = (min(lo, 0.0), 0.0), torch.zeros_like(found.hi)
            return replace(found, hi=zero, identity=identity, rule="concave")
        if shape == "convex" and (lo < 0 or (found.lo < 0).any()):
            identity, zero = (0.0, max(hi, 0.0)), torch.zeros_like(found.lo)
            return replace(found, lo=zero, identity=identity)
        return found

    def step(self, node: Expr) -> _Form:
        match node:
            case Add():
                return self.added([self.form(term) for term in node.args])
            case Sum():
                found = self.form(node.function)
                for limit in node.limits:
                    found = self.summed(found, limit[0])
                return found
            case Mul():
                return self.product(node)
            case Pow() if node.exp == 2 and (row := self.row(node.base)):
                return self.squares(row, (2, 2), "square of affine")
            case LogSumExp() if (found := self.covariance(node)) is not None:
                return found
        word = _WORDS.get(node.func)
        if word and word.second and (row := self.row(node.args[0])):
            rule = f"{word.name} of affine, second derivative in {_text(word.second)}"
            return self.squares(row, word.second, rule)
        shape = curvature(node)
        ends = {"convex": (0.0, math.inf), "concave": (-math.inf, 0.0)}
        return replace(self.affine, identity=ends.get(shape, _ANY), rule=f"{shape} curvature")

    def row(self, node: Expr) -> Row | None:
        """The slope of an affine expression, if parameters alone decide it."""
        linear = _linear(node)
        if linear is None or not self.is_known(linear):
            return None
        entries = {e for e in linear.atoms(Indexed) if isinstance(e.base, State)}
        slope = linear.xreplace({e: Indexed(self.basis, _POINT, *e.indices) for e in entries})
        return tuple(sorted(free_indices(slope) - {_POINT}, key=spelling)), slope

    def is_known(self, node: Basic) -> bool:
        """Whether a value is made of parameters, scalars, sizes and entries of the state."""
        match node:
            case Indexed() if isinstance(node.base, Parameter):
                return node.base.name in self.known
            case Indexed():
                return isinstance(node.base, State)
            case Idx():
                return not size_of(node).has(SEQ)
            case Symbol():
                return node.name in self.known
        return all(map(self.is_known, node.args))

    def squares(self, row: Row, ends: tuple[float, float], rule: str) -> _Form:
        axes, slope = row
        rows = self.evaluate(slope, (*axes, _POINT))[..., None, :]
        lo, hi = (torch.full_like(rows[..., 0], end) for end in ends)
        return _Form(axes, rows, lo, hi, rule=rule)

    def product(self, node: Mul) -> _Form:
        moving = [factor for factor in node.args if depends_on_state(factor)]
        rows = [self.row(factor) for factor in moving]
        if len(moving) == 1:
            found = self.form(moving[0])
        elif len(moving) == 2 and all(rows):
            # u v = (u + v)^2 / 4 - (u - v)^2 / 4
            (_, u), (_, v) = rows
            axes = tuple(dict.fromkeys((*rows[0][0], *rows[1][0])))
            parts = [self.squares((axes, w), (c, c), "") for w, c in ((u + v, 0.5), (u - v, -0.5))]
            found = replace(self.added(parts), rule="product of two affine")
        else:
            return replace(self.affine, identity=_ANY, rule="product that moves")
        for factor in node.args:
            if factor not in moving:
                found = self.scaled(found, factor)
        return found

    def scaled(self, form: _Form, factor: Expr) -> _Form:
        """The Hessian times a factor that does not move with the state."""
        if self.is_known(factor):
            missing = free_indices(factor) - set(form.axes)
            form = self.spread(form, (*form.axes, *sorted(missing, key=spelling)))
            least = most = self.evaluate(factor, form.axes)
            ends = (float(least.min()), float(least.max()))
        else:
            ends = _bounds(factor)
            least, most = (torch.tensor(end, dtype=torch.float64) for end in ends)
            if ends != _ANY:
                form = replace(form, rule=f"{form.rule}, times a factor in {_text(ends)}")
        lo, hi = _times((form.lo, form.hi), (least[..., None], most[..., None]))
        return replace(form, lo=lo, hi=hi, identity=_scaled(form.identity, ends))

    def summed(self, form: _Form, idx: Idx) -> _Form:
        """The sum over an index; the number of visible tokens is any number >= 0."""
        seen = size_of(idx).has(SEQ)
        count = (0.0, math.inf) if seen else (float(self.evaluate.size(idx)),) * 2
        identity = _scaled(form.identity, count)
        if idx not in form.axes:
            lo, hi = _times((form.lo, form.hi), tuple(map(torch.tensor, count)))
            return replace(form, lo=lo, hi=hi, identity=identity)
        at, K = form.axes.index(idx), len(form.axes) - 1
        parts = [z.movedim(at, K).flatten(K, K + 1) for z in (form.rows, form.lo, form.hi)]
        axes = form.axes[:at] + form.axes[at + 1 :]
        return _Form(axes, *parts, identity, form.rule)

    def spread(self, form: _Form, axes: tuple[Idx, ...]) -> _Form:
        """The same form with more free indices, or with them in another order."""
        own, lengths = len(form.axes), [self.evaluate.size(axis) for axis in axes]
        order = [form.axes.index(axis) for axis in axes if axis in form.axes]
        slots = tuple(slice(None) if axis in form.axes else None for axis in axes)

        def grown(z: Tensor) -> Tensor:
            tail = z.shape[own:]
            return z.permute(*order, *range(own, z.dim()))[slots].expand(*lengths, *tail)

        rows, lo, hi = map(grown, (form.rows, form.lo, form.hi))
        return replace(form, axes=axes, rows=rows, lo=lo, hi=hi)

    def added(self, forms: list[_Form]) -> _Form:
        axes = tuple(dict.fromkeys(axis for form in forms for axis in form.axes))
        forms = [self.spread(form, axes) for form in forms]
        rows = torch.cat([form.rows for form in forms], dim=-2)
        lo, hi = (torch.cat([getattr(f, end) for f in forms], -1) for end in ("lo", "hi"))
        identity = tuple(sum(form.identity[end] for form in forms) for end in (0, 1))
        rules = dict.fromkeys(form.rule for form in forms if form is not self.affine)
        return _Form(axes, rows, lo, hi, identity, " and ".join(rules))

    def covariance(self, node: LogSumExp) -> _Form | None:
        """A quarter of the squared diameter of the slopes of the scores."""
        bound, body = [node.index], node.body
        while isinstance(body, LogSumExp):
            bound, body = [*bound, body.index], body.body
        row = self.row(body)
        if row is None or any(size_of(idx).has(SEQ) for idx in bound):
            return None
        free = tuple(idx for idx in row[0] if idx not in bound)
        points = self.evaluate(row[1], (*free, *bound, _POINT))  # (F..., bound..., D)
        points = points.reshape(-1, math.prod(map(self.evaluate.size, bound)), points.shape[-1])
        exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
        pairs = ((part, one) for one in points for part in one.split(256))
        diameter = max(float(torch.cdist(*pair, **exact).max()) for pair in pairs)
        most = diameter**2 / 4 * (1 + ROUNDING)
        rule = "log-sum-exp of affine, (diameter of the slopes / 2)^2"
        return replace(self.affine, identity=(0.0, most), rule=rule)


def _linear(node: Expr) -> Expr | None:
    """The part of an affine expression that moves with the state; None for what is not affine."""
    match node:
        case Indexed() if isinstance(node.base, State):
            return node
        case Add():
            parts = [_linear(term) for term in node.args if depends_on_state(term)]
            return None if not parts or None in parts else Add(*parts)
        case Mul():
            moving = [factor for factor in node.args if depends_on_state(factor)]
            part = _linear(moving[0]) if len(moving) == 1 else None
            fixed = (factor for factor in node.args if factor not in moving)
            return None if part is None else Mul(*fixed, part)
        case Sum():
            part = _linear(node.function)
            return None if part is None else total(part, [limit[0] for limit in node.limits])
        case Ravel():
            part = _linear(node.args[0])
            return None if part is None else Ravel(part, *node.args[1:])
    return None


def _bounds(factor: Expr) -> tuple[float, float]:
    """The extremes of a factor of the context or of frozen values."""
    word = _WORDS.get(factor.func)
    if isinstance(factor, Weights):
        return 0.0, 1.0
    if word and word.bounds:
        return word.bounds
    sign = explain(factor)[-1].sign
    return (0.0 if sign > 0 else -math.inf), (0.0 if sign < 0 else math.inf)


def _times(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The product of two intervals, with 0 times infinity being 0."""
    products = torch.stack(torch.broadcast_tensors(*(a * b for a in first for b in second)))
    products = products.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return products.amin(0), products.amax(0)


def _scaled(ends: tuple[float, float], by: tuple[float, float]) -> tuple[float, float]:
    products = [a * b if a and b else 0.0 for a in ends for b in by]
    return min(products), max(products)


def _text(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:g}, {ends[1]:g}]"
