"""Where tokens stand: positions, rotary embeddings, lookups by distance."""

from __future__ import annotations

import math

import sympy
import torch
from sympy import Expr, Float, Idx, Indexed, Integer, Rational, Symbol, log
from torch import Tensor

from .conversion import as_expression
from .symbols import SEQ, NamedArray, State, size_of
from .words import floor, relu, step

PAIRINGS = ("half", "interleaved")


class TokenPosition(Symbol):
    """The position of the token that the state belongs to."""

    __slots__ = ()

    def __new__(cls) -> TokenPosition:
        return Symbol.__new__(cls, "position", real=True)

    def __getnewargs_ex__(self):
        return (), {}


class ContextPosition(NamedArray):
    """The positions of the context tokens, shape (seq,)."""


TOKEN_POSITION = TokenPosition()
CONTEXT_POSITION = ContextPosition(Symbol("context_position", real=True), shape=(SEQ,))
POSITIONS = (TokenPosition, ContextPosition)


def position(token: State | Idx) -> Expr:
    """The position of a token in its sequence: 0, 1, 2, ... unless the layer is given others.

    Args:
        token: the state, for the token that moves; an index of the context, for the token it sees.

    >>> import cem
    >>> dim = cem.dims("dim")
    >>> h, x = cem.state(dim), cem.context(dim)
    >>> cem.position(h) - cem.position(x.index("s"))
    position - context_position[s]
    """
    if isinstance(token, State):
        return TOKEN_POSITION
    if isinstance(token, Idx) and size_of(token) == SEQ:
        return Indexed(CONTEXT_POSITION, token)
    raise TypeError(
        f"`position` takes the state or an index of the context: got {token!r} of type"
        f' {type(token).__name__}; type `cem.position(h)` or `cem.position(s)` with `s = x.index("s")`'
    )


class Rope(Expr):
    """A rotation of an index by an angle that grows with a position; the index stays free.

    ``args = (body, index, position, base, fraction, interleaved, *frequencies)``. The rotation by
    minus the position is its inverse and its transpose.
    """

    is_commutative = True
    is_real = True
    is_extended_real = True

    @property
    def body(self) -> Expr:
        return self.args[0]

    @property
    def index(self) -> Idx:
        return self.args[1]

    @property
    def position(self) -> Expr:
        return self.args[2]

    @property
    def interleaved(self) -> bool:
        return bool(self.args[5])

    def of(self, body: Expr, *, inverse: bool = False) -> Rope:
        """The same rotation, or its inverse, of another expression."""
        where = -self.position if inverse else self.position
        return Rope(body, self.index, where, *self.args[3:])

    def rates(self, size: int) -> tuple[tuple[float, ...] | float, int]:
        """The frequencies or their base, and how many coordinates of an axis of this size turn."""
        given = self.args[6:]
        if given:
            if 2 * len(given) > size:
                raise ValueError(
                    f"`rope` turns {len(given)} pairs: got an axis `{size_of(self.index)}` of {size}; give at"
                    f" most {size // 2} frequencies"
                )
            return tuple(map(float, given)), 2 * len(given)
        turned = size * self.args[4]
        if not turned.is_Integer or turned % 2:
            raise ValueError(
                f"`rope` turns pairs: got {turned} of the {size} coordinates of `{size_of(self.index)}`; choose"
                " an even number of them"
            )
        return float(self.args[3]), int(turned)

    def frequencies(self, size: int) -> tuple[float, ...]:
        """Angles per unit of position, one a rotated pair, for an axis of this size."""
        rates, turned = self.rates(size)
        if isinstance(rates, tuple):
            return rates
        return tuple(rates ** (-2.0 * n / turned) for n in range(turned // 2))

    def _sympystr(self, printer) -> str:
        return f"rope[{printer.doprint(self.position)}]({printer.doprint(self.body)})"

    def _latex(self, printer) -> str:
        body, where = printer.doprint(self.body), printer.doprint(self.position)
        return rf"\operatorname{{rope}}_{{{where}}}\left({body}\right)"


def rope(
    value,
    *where,
    base: float = 10000.0,
    fraction: float = 1,
    pairing: str = "half",
    frequencies: tuple[float, ...] | None = None,
):
    """Rotary position embedding: pairs of coordinates turned by position times frequency.

        (u, v) -> (u cos(t w) - v sin(t w), v cos(t w) + u sin(t w)),   w_n = base^(-2n/R)

    Scores of rotated queries and keys depend on the distance of their tokens alone. Its adjoint is
    the inverse rotation, so values that are tied to keys are rotated, and the result rotated back.

    Args:
        value: in the symbolic pen ``rope(expression, index, token)``: the index that is turned, and the
            state, an index of the context or an expression of positions. In the torch pen
            ``rope(tensor, position)``: the last axis is turned; position () or, one a row, (..., seq).
        base: of the frequencies, 10000 in RoFormer.
        fraction: the share of the axis that is turned, its first coordinates; the rest stays (GPT-NeoX).
        pairing: ``"half"`` pairs coordinate n with n + R/2 (Llama), ``"interleaved"`` with its
            neighbour (RoFormer).
        frequencies: w itself, one a pair, for Llama 3 or YaRN scaling; the first 2 len(w) coordinates turn.

    Raises:
        ValueError: another pairing, a fraction outside (0, 1], an odd number of coordinates to turn
            (when a layer is derived).

    Source: Su et al., RoFormer, arXiv:2104.09864, equation 34.

    >>> import cem, torch
    >>> dim, rank = cem.dims("dim rank")
    >>> h, q, r = cem.state(dim), cem.parameter("q", rank), rank.index("r")
    >>> cem.rope(q[r], r, h)
    rope[position](q[r])
    >>> cem.rope(torch.tensor([0.0, 2.0]), torch.tensor(torch.pi)).round(decimals=3).tolist()
    [0.0, -2.0]
    """
    if pairing not in PAIRINGS:
        raise ValueError(
            f'`pairing` is "half" or "interleaved": got {pairing!r}; type `pairing="half"`'
        )
    share = sympy.nsimplify(as_expression(fraction), rational=True)
    if not 0 < share <= 1:
        raise ValueError(
            f"`fraction` is the share that is turned, between 0 and 1: got {fraction}; type `fraction=1/4`"
        )
    interleaved = pairing == "interleaved"
    given = () if frequencies is None else tuple(Float(float(w)) for w in frequencies)
    if isinstance(value, torch.fx.Proxy):
        keywords = {"base": base, "fraction": fraction, "pairing": pairing}
        keywords["frequencies"] = None if frequencies is None else tuple(map(float, frequencies))
        return value.tracer.create_proxy("call_function", rope, (value, *where), keywords)
    options = (as_expression(base), share, Integer(interleaved), *given)
    if isinstance(value, Tensor):
        table = Rope(Integer(0), Idx("r", value.shape[-1]), Integer(0), *options)
        angle = torch.as_tensor(where[0], device=value.device).unsqueeze(-1)
        return turned(value, angle, table.frequencies(value.shape[-1]), interleaved)
    index, token = where
    where = position(token) if isinstance(token, State | Idx) else as_expression(token)
    return Rope(as_expression(value), index, where, *options)


def turned(
    value: Tensor, position: Tensor, frequencies: tuple[float, ...], interleaved: bool
) -> Tensor:
    """The first 2 n coordinates of (..., R) turned by position (..., 1) times n frequencies, as complex numbers."""
    count = len(frequencies)
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    angle = position.to(wide) * torch.tensor(frequencies, dtype=wide.dtype, device=value.device)
    pairs = wide[..., : 2 * count].unflatten(-1, (count, 2) if interleaved else (2, count))
    axis = -1 if interleaved else -2
    z = torch.complex(*pairs.unbind(axis)) * torch.polar(torch.ones_like(angle), angle)
    found = torch.stack((z.real, z.imag), axis).flatten(-2)
    rest = wide[..., 2 * count :].expand(*found.shape[:-1], -1)
    return torch.cat((found, rest), -1).to(value.dtype)


class Lookup(Expr):
    """An array read at a whole number: ``args = (body, index, number)``; the index is bound."""

    is_commutative = True
    is_real = True
    is_extended_real = True

    def _sympystr(self, printer) -> str:
        return f"lookup({', '.join(map(printer.doprint, self.args))})"

    def _latex(self, printer) -> str:
        body, idx, number = map(printer.doprint, self.args)
        return rf"\left[{body}\right]_{{{idx} = {number}}}"


def lookup(value, *where):
    """An array read at a whole number, rounded down and kept inside the axis.

    A learned bias by distance is ``lookup(bias[a, n], n, position(h) - position(s))``.

    Args:
        value: in the symbolic pen ``lookup(expression, index, number)``: the index that the number
            stands for. In the torch pen ``lookup(tensor, number)``: the last axis is read.

    >>> import cem
    >>> dim, far = cem.dims("dim far")
    >>> h, x, bias, n = cem.state(dim), cem.context(dim), cem.parameter("bias", far), far.index("n")
    >>> lookup(bias[n], n, cem.position(h) - cem.position(x.index("s")))
    lookup(bias[n], n, position - context_position[s])
    >>> lookup(torch.tensor([0.5, 0.25]), torch.tensor([-3.0, 0.0, 1.5, 9.0])).tolist()
    [0.5, 0.5, 0.25, 0.25]
    """
    if isinstance(value, torch.fx.Proxy):
        return value.tracer.create_proxy("call_function", lookup, (value, *where), {})
    if isinstance(value, Tensor):
        return value[..., where[0].floor().long().clamp(0, value.shape[-1] - 1)]
    index, number = where
    if not isinstance(index, Idx):
        raise TypeError(
            f"`lookup` reads along an index: got {index!r} of type {type(index).__name__}; make one with"
            ' `far.index("n")`'
        )
    return Lookup(as_expression(value), index, as_expression(number))


def t5_bucket(distance, *, buckets: int = 32, furthest: int = 128):
    """The bucket of a distance to the past, for a learned relative bias: exact near, logarithmic far.

    Half of the buckets hold the distances 0, 1, 2, ...; the rest grow by equal factors up to
    ``furthest``. Source: Raffel et al., arXiv:1910.10683, section 2.1 (decoder).

    >>> import cem
    >>> t5_bucket(cem.position(cem.state(cem.dims("dim"))), buckets=2, furthest=4).free_symbols
    {position}
    """
    near = buckets // 2
    behind = relu(distance)
    log_of = torch.log if isinstance(distance, Tensor | torch.fx.Proxy) else log
    log_far = log_of(1 + relu(behind / near - 1)) / math.log(furthest / near)
    far = near + floor(log_far * (buckets - near))
    last = buckets - 1
    capped = last - relu(last - far)
    is_near = step(near - behind)
    return is_near * behind + (1 - is_near) * capped


def alibi_slopes(count: int) -> tuple[Rational, ...]:
    """The slopes 2^(-8n/count), n = 1 ... count, of ALiBi (Press et al., arXiv:2108.12409).

    >>> alibi_slopes(2)
    (1/16, 1/256)
    """
    return tuple(sympy.Integer(2) ** Rational(-8 * n, count) for n in range(1, count + 1))
