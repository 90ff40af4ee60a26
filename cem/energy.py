"""The energy: one number per token, written in SymPy or in torch."""

from __future__ import annotations

import keyword
import pkgutil
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from sympy import Expr, Symbol

from .calculus.curvature import curvature
from .calculus.gradient import gradient
from .calculus.joint import joint_gradient
from .derivation import Derivation
from .language import serial
from .language.canonical import canonical
from .language.conversion import as_expression
from .language.evaluation import Evaluator
from .language.notation import latex
from .language.positions import CONTEXT_POSITION, POSITIONS, TOKEN_POSITION
from .language.symbols import Context, Dim, Frozen, NamedArray, Parameter, Scalar, State
from .language.tracing import Untranslatable, signature, translate
from .language.validity import check_expression

INPUTS = (
    "h",
    "frozen",
    "x",
    "visible",
    "causal",
    "position",
    "context_position",
    "states",
    "ordered",
)
"""Names of a program's inputs; parameters and learned scalars follow under their own names."""

RESERVED = (*INPUTS, "direction")
"""Names that a parameter cannot have."""


class Energy:
    """A conditional energy E(h | x; theta): one scalar per token, dimensionless, lower is better.

    The state h is what a layer moves; the context x and ``frozen(h)`` are not differentiated.

    Args:
        expression: a SymPy expression in the words of the language, without free indices.
        name: what the energy is called in messages, traces and pages.

    Raises:
        ValueError: a free index, no state, two states, or a tensor used with two shapes.

    >>> from sympy import Sum
    >>> import cem
    >>> dim, hidden = cem.dims("dim hidden")
    >>> h, U = cem.state(dim), cem.parameter("U", hidden, dim)
    >>> i, m = dim.index("i"), hidden.index("m")
    >>> plain = cem.Energy(-Sum(cem.antiderivative(cem.relu)(Sum(U[m, i] * h[i], i)), m), name="plain")
    >>> plain.gradient
    -Sum(relu(Sum(U[m, i]*h[i], (i, 0, dim - 1)))*U[m, d], (m, 0, hidden - 1))
    """

    def __init__(self, expression: Expr, name: str = "energy") -> None:
        if not isinstance(expression, Expr | int | float):
            raise TypeError(
                f"`Energy` takes a SymPy expression: got {type(expression).__name__}; for a torch callable type"
                ' `@cem.energy(h="dim", ...)` above it'
            )
        expression = as_expression(expression)
        self.name = name
        self.function: Callable | None = None
        self.reason = ""
        self.masks_itself = self.asks_positions = False
        bases = check_expression(expression, name)
        self.expression: Expr | None = canonical(expression)
        states = [b for b in bases if isinstance(b, State | Frozen)]
        moving = [b for b in states if isinstance(b, State)]
        if not moving:
            raise ValueError(
                f"energy `{name}` does not depend on a state: got {expression};"
                " type `h = cem.state(dim)` and use `h[i]`"
            )
        self.state: State = moving[0]
        self.context: Context | None = next((b for b in bases if isinstance(b, Context)), None)
        self.parameters = tuple(b for b in bases if isinstance(b, Parameter))
        self.scalars = tuple(sorted(expression.atoms(Scalar), key=str))
        self._check_names()

    @classmethod
    def from_function(
        cls, function: Callable[..., torch.Tensor], shapes: Mapping[str, str]
    ) -> Energy:
        """The energy of a torch callable for one token; see :func:`energy`."""
        self = cls.__new__(cls)
        self.name = function.__name__
        self.function = function
        self.reason = ""
        found = signature(function, dict(shapes))
        self.masks_itself = found.visible
        self.asks_positions = found.position or found.context_position
        self.state, self.context = found.state, found.context
        self.parameters = tuple(sorted(found.parameters, key=lambda p: str(p.name)))
        self.scalars = tuple(sorted(found.scalars, key=str))
        try:
            self.expression = translate(function, dict(shapes)).expression
        except Untranslatable as error:
            self.expression = None
            self.reason = str(error)
        self._check_names()
        self.__doc__ = function.__doc__
        return self

    def _check_names(self) -> None:
        names = [str(p.name) for p in self.parameters] + [s.name for s in self.scalars]
        for name in names:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(
                    f"energy `{self.name}`: the parameter name {name!r} is not a Python name; type another one"
                )
            if name in RESERVED or names.count(name) > 1:
                why = "is a name of the layer's own inputs" if name in RESERVED else "is used twice"
                raise ValueError(
                    f"energy `{self.name}`: the parameter name `{name}` {why}; type another name, in a sum with"
                    f" `energy.renamed({name}=...)`"
                )

    # -- what it is made of ---------------------------------------------------------------------------------

    @property
    def width(self) -> Expr:
        """The size of the state: a named size or a product of named sizes."""
        return self.state.shape[0]

    @cached_property
    def dims(self) -> tuple[Dim, ...]:
        """The named sizes that a layer needs, those of the state first."""
        found: dict[Dim, None] = {}
        shapes = [self.state.shape, *(p.shape for p in self.parameters)]
        if self.context is not None:
            shapes.append(self.context.shape[1:])
        for shape in shapes:
            for size in shape:
                found.update(dict.fromkeys(sorted(size.atoms(Dim), key=str)))
        return tuple(found)

    @cached_property
    def gradient(self) -> Expr:
        """dE/dh_d as an expression with the free index d; it points uphill."""
        if self.expression is None:
            raise ValueError(f"energy `{self.name}` has no symbolic gradient: {self.reason}")
        return gradient(self.expression, self.width)

    @cached_property
    def joint_gradient(self) -> Expr:
        """d/dh_d of the energies of all tokens together; see :func:`cem.calculus.joint.joint_gradient`."""
        return joint_gradient(self._symbolic("differentiated for all tokens"), self.state)

    @cached_property
    def has_positions(self) -> bool:
        """Whether the energy reads the positions of tokens."""
        if self.expression is None:
            return self.asks_positions
        return bool(self.expression.atoms(*POSITIONS))

    @property
    def curvature(self) -> str:
        """``"convex"``, ``"concave"``, ``"affine"`` or ``"unknown"`` in the state, by composition rules."""
        return "unknown" if self.expression is None else curvature(self.expression)

    # -- algebra --------------------------------------------------------------------------------------------

    def _symbolic(self, what: str) -> Expr:
        if self.expression is None:
            raise ValueError(f"energy `{self.name}` cannot be {what}: {self.reason}")
        return self.expression

    def __add__(self, other: Energy) -> Energy:
        """The sum of two energies of one state; parameters of the same name are shared."""
        if not isinstance(other, Energy):
            return NotImplemented
        expression = self._symbolic("added") + other._symbolic("added")
        return Energy(expression, name=f"{self.name}_{other.name}")

    def __mul__(self, factor) -> Energy:
        """A multiple of the energy; the factor is a number or a scalar of the language."""
        if not isinstance(factor, Expr | int | float):
            return NotImplemented
        return Energy(as_expression(factor) * self._symbolic("scaled"), name=self.name)

    __rmul__ = __mul__

    def __truediv__(self, divisor) -> Energy:
        """The energy divided by a number or a scalar of the language."""
        if not isinstance(divisor, Expr | int | float):
            return NotImplemented
        return self * (1 / as_expression(divisor))

    def __neg__(self) -> Energy:
        """The energy turned upside down."""
        return self * -1

    def __sub__(self, other: Energy) -> Energy:
        """The difference of two energies of one state."""
        return self + -other if isinstance(other, Energy) else NotImplemented

    def __radd__(self, other) -> Energy:
        """So that ``sum`` adds energies."""
        return self if other == 0 else NotImplemented

    def renamed(self, name: str | None = None, **names: str) -> Energy:
        """The same energy with other names for its parameters and scalars, so that a sum does not share them.

        >>> from cem.energies import interaction
        >>> [str(p.name) for p in interaction.renamed(Q="Q2", K="K2").parameters]
        ['K2', 'Q2']
        """
        expression = self._symbolic("renamed")
        known = {str(p.name): p for p in (*self.parameters, *self.scalars)}
        swap = {}
        for old, new in names.items():
            if old not in known:
                raise ValueError(
                    f"energy `{self.name}` has no parameter or scalar `{old}`: it has {', '.join(known) or 'none'}"
                )
            part = known[old]
            if isinstance(part, Scalar):
                swap[part] = Scalar(new, part.default, part.is_positive)
            else:
                swap[part] = Parameter(Symbol(new, real=True), shape=part.shape)
        return Energy(expression.xreplace(swap), name=name or self.name)

    # -- text -----------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The energy as a tree of words; :meth:`from_json` reads it back exactly and evaluates nothing."""
        return serial.to_json(self._symbolic("written as JSON"), name=self.name)

    @classmethod
    def from_json(cls, text: str) -> Energy:
        """An energy from the text of :meth:`to_json`; ``ValueError`` for anything that is not a word."""
        expression, name = serial.from_json(text)
        return cls(expression, name=name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Energy):
            return NotImplemented
        if self.expression is None:
            return self.function is other.function
        return self.expression == other.expression

    def __hash__(self) -> int:
        return hash(self.function if self.expression is None else self.expression)

    def __repr__(self) -> str:
        parts = ", ".join(f"{p.name}{tuple(p.shape)}" for p in self.parameters)
        return f"Energy({self.name!r}, state={self.state.name}({self.width}), parameters=[{parts}])"

    # -- value ----------------------------------------------------------------------------------------------

    def __call__(self, h: torch.Tensor, x: torch.Tensor | None = None, **values) -> torch.Tensor:
        """The energy of one token, a scalar tensor.

        Args:
            h: the state, shape (dim,).
            x: the visible context tokens, shape (seq, dim).
            **values: every parameter by name, scalars that differ from their default, ``frozen`` for a frozen
                state other than h, and the positions ``position`` () and ``context_position`` (seq,) of the
                token and of what it sees, by default the last one and 0, 1, ...

        Raises:
            ValueError: a missing parameter, or shapes that contradict each other.
        """
        if self.expression is None:
            return self.function(h, *(() if x is None else (x,)), **values)
        frozen = values.pop("frozen", h)
        own, others = values.pop("position", None), values.pop("context_position", None)
        sizes = self.infer_sizes(h, x, values)
        tensors = {str(self.state.name): h, f"{self.state.name}bar": frozen}
        if self.context is not None:
            tensors[str(self.context.name)] = x
        if self.has_positions:
            count = 1 if x is None else len(x)
            others = torch.arange(count) if others is None else others
            tensors[str(CONTEXT_POSITION.name)] = torch.as_tensor(others).to(h)
            own = count - 1 if own is None else own
            tensors[TOKEN_POSITION.name] = torch.as_tensor(own).to(h)
        for scalar in self.scalars:
            value = values.pop(scalar.name, scalar.default)
            if value is None:
                raise ValueError(
                    f"energy `{self.name}` needs the scalar `{scalar.name}`: it has no default"
                )
            if isinstance(value, Expr):
                value = float(value.xreplace(sizes))
            tensors[scalar.name] = torch.as_tensor(value, dtype=h.dtype, device=h.device)
        known = [str(p.name) for p in self.parameters]
        for name in values.keys() - set(known):
            raise ValueError(
                f"energy `{self.name}` has no parameter or scalar `{name}`: got {', '.join(values)}; it has"
                f" {', '.join([*known, *(s.name for s in self.scalars)]) or 'none'}"
            )
        return Evaluator({**tensors, **values}, sizes)(self.expression)

    def infer_sizes(
        self, h: torch.Tensor, x: torch.Tensor | None, values: Mapping[str, torch.Tensor]
    ) -> dict[Symbol, int]:
        """Named sizes from the shapes of tensors; ``ValueError`` where they contradict each other."""
        given: list[tuple[NamedArray, torch.Tensor]] = [(self.state, h)]
        if self.context is not None:
            if x is None:
                raise ValueError(
                    f"energy `{self.name}` needs its context: call it with `{self.context.name}`"
                )
            given.append((self.context, x))
        for parameter in self.parameters:
            if str(parameter.name) not in values:
                raise ValueError(
                    f"energy `{self.name}` needs the parameter `{parameter.name}` of shape"
                    f" {tuple(parameter.shape)}: got {', '.join(values) or 'none'}"
                )
            given.append((parameter, values[str(parameter.name)]))
        sizes: dict[Symbol, int] = {}
        for base, tensor in given:
            wanted = tuple(base.shape)
            if tensor.dim() != len(wanted):
                raise ValueError(
                    f"energy `{self.name}`: `{base.name}` has shape {wanted}: got {tuple(tensor.shape)}"
                )
            for size, length in zip(wanted, tensor.shape, strict=True):
                if isinstance(size, Dim) and sizes.setdefault(size, length) != length:
                    raise ValueError(
                        f"energy `{self.name}`: size `{size}` is {sizes[size]} elsewhere and {length} in"
                        f" `{base.name}` of shape {tuple(tensor.shape)}"
                    )
        for base, tensor in given:
            for size, length in zip(base.shape, tensor.shape, strict=True):
                known = as_expression(size.xreplace(sizes))
                if not known.is_number or int(known) != length:
                    raise ValueError(
                        f"energy `{self.name}`: an axis of `{base.name}` is {size} = {known}: got {length} in"
                        f" {tuple(tensor.shape)}"
                    )
        return sizes

    def derivation(self, layer=None) -> Derivation:
        """The worked mathematics from the energy to its layer; see :class:`~cem.Derivation`."""
        return Derivation.of_energy(self, layer)

    def _repr_latex_(self) -> str:
        if self.expression is None:
            return rf"$\text{{{self.name}: a torch callable}}$"
        return f"$E({self.state.name}) = {latex(self.expression)}$"

    def __reduce__(self):
        if self.expression is not None:
            return Energy.from_json, (self.to_json(),)
        return _found, (self.function.__module__, self.function.__qualname__)

    def __deepcopy__(self, memo) -> Energy:
        return self


def _found(module: str, name: str) -> Energy:
    """An energy of a callable that cannot be translated, by the name under which it can be imported."""
    return pkgutil.resolve_name(f"{module}:{name}")


def energy(**shapes: str) -> Callable[[Callable[..., torch.Tensor]], Energy]:
    """Make an :class:`Energy` of a torch callable that computes one number for one token.

    Shapes are named sizes separated by blanks; a group in parentheses is a product of sizes. The first argument
    is the state; a second one whose shape begins with ``seq`` is the context; keyword-only arguments with a
    shape are parameters, those without one are scalars. ``h.detach()`` or ``cem.frozen(h)`` is the frozen state.
    An argument named ``frozen`` receives it; one named ``visible`` (bool, (seq,)) lets a callable that cannot be
    translated mask its own reductions over the context.

    Raises:
        ValueError: a shape is missing or malformed, or the result is not one scalar.

    >>> import torch, cem
    >>> @cem.energy(h="dim", U="hidden dim")
    ... def plain(h, *, U):
    ...     return -0.5 * torch.relu(U @ h).square().sum()
    >>> plain.gradient
    -Sum(relu(Sum(U[m, i]*h[i], (i, 0, dim - 1)))*U[m, d], (m, 0, hidden - 1))
    """

    def decorate(function: Callable[..., torch.Tensor]) -> Energy:
        return Energy.from_function(function, shapes)

    return decorate
