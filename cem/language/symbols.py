"""The nouns of the language: named sizes, the state, its context, parameters and scalars.

Everything here is a SymPy object, so ``Sum``, ``exp``, ``log``, powers and arithmetic are SymPy's own.

Legend: an *index* is a SymPy ``Idx`` that ranges over one named size; a *slot* is what stands between the
brackets of an ``Indexed``: an index, or a mixed-radix sum such as ``block*a + b`` for a size that is a
product of named sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from sympy import Add, Basic, Expr, Idx, Indexed, IndexedBase, Integer, Mul, S, Sum, Symbol, Tuple
from sympy.core.function import Function

from .conversion import as_expression


class Dim(Symbol):
    """A named size: a positive integer that is filled in when a layer is derived.

    >>> import cem
    >>> dim = cem.Dim("dim")
    >>> dim.index("i")
    i
    """

    __slots__ = ()

    def __new__(cls, name: str) -> Dim:
        return Symbol.__new__(cls, name, integer=True, positive=True)

    def __getnewargs_ex__(self):
        return (self.name,), {}

    def index(self, name: str) -> Idx:
        """An index that runs over this size, for ``Sum`` and for brackets."""
        return index(name, self)


SEQ = Dim("seq")
"""The number of context tokens. In an energy it means the number of *visible* ones."""


def dims(names: str) -> Dim | tuple[Dim, ...]:
    """Named sizes from a string of names separated by blanks or commas, like ``sympy.symbols``.

    >>> import cem
    >>> dim, heads = cem.dims("dim heads")
    >>> heads.index("a")
    a
    """
    found = tuple(Dim(name) for name in names.replace(",", " ").split())
    if not found:
        raise ValueError(
            '`dims` needs at least one name: got an empty string; type `cem.dims("dim heads")`'
        )
    return found[0] if len(found) == 1 else found


def index(name: str, size: Expr) -> Idx:
    """An index over a named size or over a product of named sizes."""
    return Idx(Symbol(name, integer=True), size)


@lru_cache(maxsize=4096)
def size_of(idx: Idx) -> Expr:
    """The named size, or product of named sizes, that an index runs over."""
    return idx.args[1][1] + 1


@lru_cache(maxsize=4096)
def spelling(idx: Idx) -> tuple[str, str]:
    """A key to sort indices by: the name of the size, then of the index."""
    return str(size_of(idx)), idx.label.name


class NamedArray(IndexedBase):
    """A named array of the language; its entries are written with brackets, ``Q[a, r, i]``."""

    is_real = True

    def __getitem__(self, slots) -> Indexed:
        slots = tuple(map(as_expression, slots if isinstance(slots, tuple) else (slots,)))
        sizes = ", ".join(map(str, self.shape))
        if len(slots) != len(self.shape):
            raise ValueError(
                f"`{self.name}` has the axes ({sizes}): got {len(slots)} ind{'ex' if len(slots) == 1 else 'ices'},"
                f" {self.name}{list(slots)}; type one index an axis"
            )
        for slot, size in zip(slots, self.shape, strict=True):
            indices = slot.atoms(Idx)
            if not indices or any(idx.upper is None for idx in indices):
                raise ValueError(
                    f"`{self.name}` of axes ({sizes}) takes indices: got `{slot}`; make one with"
                    f' `{size}.index("i")`'
                )
            own = Mul(*map(size_of, split(slot)))
            if own != size:
                raise ValueError(
                    f"`{self.name}` has the axes ({sizes}): got the index `{slot}` over {own} where {size} stands"
                )
        return Indexed(self, *slots)

    def index(self, name: str) -> Idx:
        """An index over the first axis: the coordinates of a state, the tokens of a context."""
        return index(name, self.shape[0])


class State(NamedArray):
    """The vector of one token that the layer moves, shape (dim,)."""


class Frozen(NamedArray):
    """The state's own value at the input of the layer; fixed in dE/dh only."""


class Direction(NamedArray):
    """A constant vector of one token like its state, along which a derivative is taken."""


class Context(NamedArray):
    """The tokens that a token may see, shape (seq, dim)."""


class Parameter(NamedArray):
    """A learned array with named sizes."""


def _tensor(kind: type[NamedArray], name: str, shape: Iterable[Expr]) -> NamedArray:
    return kind(Symbol(name, real=True), shape=tuple(shape))


def state(*shape: Expr, name: str = "h") -> State:
    """The state h of one token, shape (dim,).

    A product of named sizes, ``cem.state(heads * block)``, lets ``h[block*a + b]`` name the coordinate b of
    block a beside the flat ``h[i]``.

    >>> import cem
    >>> dim = cem.dims("dim")
    >>> h = cem.state(dim)
    >>> h[dim.index("i")]
    h[i]
    """
    if len(shape) != 1:
        raise ValueError(
            f"`state` takes one size, the width of a token: got {len(shape)}; type `cem.state(dim)`"
            " or, for a width in blocks, `cem.state(heads * block)`"
        )
    return _tensor(State, name, shape)


def direction(width: Expr) -> Direction:
    """The constant vector v of a Hessian product, shape (width,)."""
    return _tensor(Direction, "direction", (width,))


def context(*shape: Expr, name: str = "x") -> Context:
    """The context x of one token, shape (seq, dim): the tokens it may see, held fixed while the state moves.

    >>> import cem
    >>> dim = cem.dims("dim")
    >>> x = cem.context(dim)
    >>> x[x.index("s"), dim.index("i")]
    x[s, i]
    """
    return _tensor(Context, name, (SEQ, *shape))


def parameter(name: str, *shape: Expr) -> Parameter:
    """A learned array with named sizes, such as ``cem.parameter("Q", heads, rank, dim)``.

    >>> import cem
    >>> heads, dim = cem.dims("heads dim")
    >>> cem.parameter("lam", heads, dim).shape
    (heads, dim)
    """
    if not shape:
        raise ValueError(
            f"parameter `{name}` has no sizes: got (); for a number type `cem.scalar({name!r})`"
        )
    if any(as_expression(size).has(SEQ) for size in shape):
        raise ValueError(
            f"parameter `{name}` has an axis over tokens: got {shape}; what differs from token to token is the"
            " context, `cem.context(dim)`"
        )
    return _tensor(Parameter, name, shape)


class Scalar(Symbol):
    """A number of an energy: fixed or learned, with a default that may be an expression in the sizes."""

    __slots__ = ("default",)

    def __new__(cls, name: str, default=None, positive: bool | None = None) -> Scalar:
        assumptions = {"positive": True} if positive else {"real": True}
        self = Symbol.__xnew__(cls, name, **assumptions)
        self.default = None if default is None else as_expression(default)
        return self

    def _hashable_content(self):
        # SymPy caches products by equality: scalars with different defaults must not be equal.
        return (*super()._hashable_content(), ("default", str(self.default)))

    def __getnewargs_ex__(self):
        return (self.name, self.default, bool(self.is_positive)), {}


def scalar(name: str, *, default=None, positive: bool | None = None) -> Scalar:
    """A number of an energy, such as an inverse temperature.

    ``default`` is a number or an expression in named sizes (``rank ** -0.5``); without one the number must be
    given to ``derive``. ``positive=True`` lets the curvature rules use its sign.

    >>> import cem
    >>> cem.scalar("beta", default=1.0, positive=True).is_positive
    True
    """
    return Scalar(name, default, positive)


def frozen(value):
    """The value of the state at the input of the layer: fixed in dE/dh, alive in training gradients.

    On a state (or an expression of one) it gives the symbol of the frozen state; on a torch tensor inside the
    torch pen it is ``value.detach()``, which the toolkit reads in the same way.

    >>> import cem
    >>> dim = cem.dims("dim")
    >>> cem.frozen(cem.state(dim))[dim.index("i")]
    hbar[i]
    """
    if isinstance(value, (torch.Tensor, torch.fx.Proxy)):
        return value.detach()
    if isinstance(value, State):
        return _tensor(Frozen, f"{value.name}bar", value.shape)
    if isinstance(value, Basic):
        return value.xreplace({base: frozen(base) for base in value.atoms(State)})
    raise TypeError(
        f"`frozen` takes a state, an expression or a torch tensor: got {type(value).__name__};"
        " type `c = cem.frozen(h)` and then `c[i]`"
    )


class Ravel(Expr):
    """An expression in several indices read through the flat index of their slot: ``args = (body, slot, index)``.

    ``Ravel(e, block*a + b, d)`` is e at the (a, b) for which block*a + b = d.
    """

    is_commutative = True
    is_real = True

    def _latex(self, printer) -> str:
        body, slot, idx = map(printer.doprint, self.args)
        return rf"\left[{body}\right]_{{{slot} = {idx}}}"


def total(body: Expr, indices: Iterable[Idx]) -> Expr:
    """Sum of ``body`` over indices, innermost first; the body itself where there are none.

    It skips the checks of SymPy's constructor, which compare the limits symbolically and take most of the time
    of a derivation.
    """
    limits = tuple(_limit(idx) for idx in indices)
    if not limits or body is S.Zero:
        return body
    if isinstance(body, Sum):
        body, limits = body.function, (*body.limits, *limits)
    found = Expr.__new__(Sum, body, *limits)
    found.is_commutative = True
    return found


@lru_cache(maxsize=4096)
def _limit(idx: Idx) -> Tuple:
    return Tuple(idx, Integer(0), idx.args[1][1])


def join(indices: tuple[Idx, ...]) -> Expr:
    """The slot of several indices in row-major order: (a, b) -> block*a + b.

    >>> import cem
    >>> heads, block = cem.dims("heads block")
    >>> join((heads.index("a"), block.index("b"))) == block * heads.index("a") + block.index("b")
    True
    """
    slot: Expr = Integer(0)
    for idx in indices:
        slot = slot * size_of(idx) + idx
    return slot.expand() if len(indices) > 2 else slot


@lru_cache(maxsize=4096)
def split(slot: Expr) -> tuple[Idx, ...]:
    """The indices of a slot, slowest first; the inverse of ``join``."""
    if isinstance(slot, Idx):
        return (slot,)
    weights: dict[Idx, Expr] = {}
    for term in Add.make_args(slot.expand()):
        found = [f for f in Mul.make_args(term) if isinstance(f, Idx)]
        if len(found) != 1 or found[0] in weights:
            raise ValueError(
                f"index `{slot}` is not of the form `block*a + b`: type one index a named size"
            )
        weights[found[0]] = term / found[0]
    left = dict(weights)
    order: list[Idx] = []
    stride: Expr = Integer(1)
    while left:
        match = [idx for idx, weight in left.items() if weight == stride]
        if len(match) != 1:
            raise ValueError(
                f"index `{slot}` does not count in row-major order: got the factors"
                f" {', '.join(map(str, weights.values()))}; type `block*a + b` with b over `block`"
            )
        order.insert(0, match[0])
        stride = stride * size_of(match[0])
        del left[match[0]]
    return tuple(order)


def is_word(expression: Expr) -> bool:
    """Whether the expression is an element-wise function of one argument."""
    return isinstance(expression, Function) and len(expression.args) == 1
