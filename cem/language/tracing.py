"""The torch pen: a torch callable for one token, read with torch.fx and written as an expression.

Every operation that torch.fx meets is applied to symbolic tensors at once, so an error points at
the line that caused it, and sizes that the callable reads from ``.shape`` are named sizes.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType

import torch
from sympy import Expr, Mul
from torch import fx

from . import torch_ops
from .canonical import canonical
from .positions import CONTEXT_POSITION, TOKEN_POSITION
from .symbols import SEQ, Context, Dim, Parameter, Scalar, State, context, frozen, parameter, state
from .torch_tensor import Untranslatable, Value, leaf, lift, show

__all__ = ["Signature", "Translation", "Untranslatable", "signature", "translate"]


ROLES = ("frozen", "visible", "position", "context_position")
"""Arguments that a callable may ask for by their names."""


@dataclass(frozen=True)
class Signature:
    """What the arguments of a torch callable are; parameters and scalars in order of the signature.

    The last four say whether the callable takes arguments of these names.
    """

    name: str
    state: State
    context: Context | None
    parameters: tuple[Parameter, ...]
    scalars: tuple[Scalar, ...]
    frozen: bool = False
    visible: bool = False
    position: bool = False
    context_position: bool = False

    def arguments(self, h, x=None, /, **named) -> tuple[tuple, dict]:
        """The positional and the keyword arguments of a call, without the roles it does not take."""
        positional = (h,) if self.context is None else (h, x)
        taken = {role: named.pop(role, None) for role in ROLES}
        return positional, named | {role: taken[role] for role in ROLES if getattr(self, role)}


@dataclass(frozen=True)
class Translation:
    """A torch callable as an expression in normal form, one scalar without free indices."""

    expression: Expr
    state: State
    context: Context | None
    parameters: tuple[Parameter, ...]
    scalars: tuple[Scalar, ...]


def signature(function: Callable, shapes: dict[str, str]) -> Signature:
    """The arguments of a torch callable for one token: state, context, parameters and scalars.

    The first argument is the state, with one axis; a second one whose shape begins with ``seq`` is
    the context. Keyword-only arguments with a shape are parameters, without one scalars. A shape is
    a string of names separated by blanks; a group in parentheses is one axis whose size is their
    product, in row-major order. An argument named ``frozen`` receives the frozen state, one named
    ``visible`` the mask (bool, (seq,)) of a callable that masks by itself, ``position`` the position of
    the token, (), and ``context_position`` those of the context tokens, (seq,).

    Raises:
        ValueError: a declaration that does not follow these rules.

    >>> def energy(h, x, *, Q, beta=1.0): ...
    >>> found = signature(energy, dict(h="dim", x="seq dim", Q="heads rank dim"))
    >>> found.parameters[0].shape, found.scalars
    ((heads, rank, dim), (beta,))
    """
    name = getattr(function, "__name__", type(function).__name__)
    arguments = dict(inspect.signature(function).parameters)
    for unknown in shapes.keys() - arguments.keys():
        raise ValueError(
            f"energy `{name}` has no argument `{unknown}`: got a shape for it and the arguments"
            f" {', '.join(f'`{one}`' for one in arguments)}; type the shape of one of these"
        )
    sizes = {argument: _shape(name, argument, text) for argument, text in shapes.items()}
    roles = {role: arguments.pop(role, None) for role in ROLES}
    order = list(arguments.values())
    if not order or order[0].kind not in _POSITIONAL:
        raise ValueError(
            f"energy `{name}` has no state: type it as the first argument, `def {name}(h, ...)`"
        )
    first, rest = order[0].name, order[1:]
    if first not in sizes or len(sizes[first]) != 1 or SEQ in sizes[first]:
        raise ValueError(
            f"the state `{first}` of energy `{name}` must have one axis, the width of a token: got"
            f' {shapes.get(first, "no shape")!r}; type `@cem.energy({first}="dim", ...)`'
        )
    held = state(*sizes[first], name=first)
    seen = None
    if rest and rest[0].kind in _POSITIONAL and sizes.get(rest[0].name, (None,))[0] == SEQ:
        second = rest.pop(0).name
        if len(sizes[second]) != 2:
            raise ValueError(
                f"the context `{second}` of energy `{name}` must have two axes, tokens and width:"
                f' got {shapes[second]!r}; type `{second}="seq dim"`'
            )
        seen = context(*sizes[second][1:], name=second)
    parameters, scalars = [], []
    names = {str(dim) for shape in sizes.values() for size in shape for dim in size.free_symbols}
    for argument in rest:
        _check_keyword(name, argument, sizes, shapes, names)
        if argument.name in sizes:
            parameters.append(parameter(argument.name, *sizes[argument.name]))
        else:
            scalars.append(_scalar(name, argument))
    found = {role: argument is not None for role, argument in roles.items()}
    return Signature(name, held, seen, tuple(parameters), tuple(scalars), **found)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _shape(name: str, argument: str, text: str) -> tuple[Expr, ...]:
    """The sizes of a shape string."""
    pieces = re.findall(r"\([^()]*\)|[^\s()]+|[()]", text) if isinstance(text, str) else []
    axes = [piece.strip("()").split() for piece in pieces]
    if not axes or not all(axis and all(one.isidentifier() for one in axis) for axis in axes):
        raise ValueError(
            f"the shape of `{argument}` in energy `{name}` must be names separated by blanks,"
            f" with a product of names in parentheses: got {text!r}; type for instance"
            ' "heads rank dim" or "(heads rank) dim"'
        )
    return tuple(Mul(*map(Dim, axis)) for axis in axes)


def _check_keyword(
    name: str, argument: inspect.Parameter, sizes: dict, shapes: dict, names: set[str]
) -> None:
    """Whether an argument after the state and the context is a parameter or a scalar."""
    if argument.kind is not inspect.Parameter.KEYWORD_ONLY:
        starred = argument.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        what = "collects arguments" if starred else "is positional"
        got = f"the shape {shapes[argument.name]!r}" if argument.name in shapes else "no shape"
        raise ValueError(
            f"argument `{argument.name}` of energy `{name}` {what}: got {got}; type `*` before the"
            f" parameters and scalars, `def {name}(h, x, *, {argument.name})`, or a shape"
            ' that begins with "seq" for a context'
        )
    if any(size.has(SEQ) for size in sizes.get(argument.name, ())):
        raise ValueError(
            f"parameter `{argument.name}` of energy `{name}` has an axis over tokens: got the shape"
            f" {shapes[argument.name]!r}; a context is the second argument, before `*`"
        )
    if argument.name in names:
        raise ValueError(
            f"argument `{argument.name}` of energy `{name}` has the name of a size: read the size"
            " from `.shape` or rename one of the two"
        )


def _scalar(name: str, argument: inspect.Parameter) -> Scalar:
    default = None if argument.default is inspect.Parameter.empty else argument.default
    if default is not None and (
        isinstance(default, bool) or not isinstance(default, int | float | Expr)
    ):
        raise ValueError(
            f"argument `{argument.name}` of energy `{name}` has no shape, so it is a scalar:"
            f" got the default {default!r}; type a number, or for a parameter a shape such as"
            f' `{argument.name}="hidden dim"`'
        )
    positive = (
        default.is_positive if isinstance(default, Expr) else default is not None and default > 0
    )
    return Scalar(argument.name, default, positive)


def translate(function: Callable, shapes: dict[str, str]) -> Translation:
    """The expression of a torch callable for one token.

    ``shapes`` are those of :func:`signature`. Functions, methods and operators of torch, modules of
    torch.nn without weights, and the words of the language are understood; ``h.detach()`` and
    ``cem.frozen(h)`` are the frozen state, and sizes read from ``.shape`` are named sizes (``seq``
    is the number of visible tokens).

    Raises:
        Untranslatable: an operation has no meaning in the language.
        ValueError: a wrong declaration, or a result that is not one number.

    >>> import torch
    >>> def energy(h, *, U):
    ...     return -torch.relu(U @ h).square().sum() / 2
    >>> translate(energy, dict(h="dim", U="hidden dim")).expression
    -Sum(relu(Sum(U[m, i]*h[i], (i, 0, dim - 1)))**2, (m, 0, hidden - 1))/2
    """
    declared = signature(function, shapes)
    inputs = {base.name: leaf(base) for base in (declared.state, *declared.parameters)}
    inputs |= {scalar.name: Value(scalar) for scalar in declared.scalars}
    named = {one.name: inputs[one.name] for one in (*declared.parameters, *declared.scalars)}
    positional, keywords = declared.arguments(
        inputs[declared.state.name],
        declared.context and leaf(declared.context),
        frozen=leaf(frozen(declared.state)),
        visible=_VISIBLE,
        position=Value(TOKEN_POSITION),
        context_position=leaf(CONTEXT_POSITION),
        **named,
    )
    tracer = _Tracer(function, positional, keywords)
    try:
        with torch.enable_grad():
            tracer.trace(function if isinstance(function, FunctionType) else _nothing)
        result = lift(tracer.result)
    except Untranslatable as error:
        raise Untranslatable(f"energy `{declared.name}`{_line(error, function)}: {error}") from None
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise Untranslatable(
            f"energy `{declared.name}`{_line(error, function)}: {type(error).__name__}, {reason};"
            " tensors and sizes are symbols here, so write it with torch operations on the"
            " arguments and no Python numbers made of them"
        ) from error
    if result.axes:
        raise ValueError(
            f"energy `{declared.name}` must return one value per token: got shape"
            f" {show(result.shape)}; did you forget `.sum()`?"
        )
    expression = canonical(result.expression)
    return Translation(
        expression, declared.state, declared.context, declared.parameters, declared.scalars
    )


def _nothing() -> None:
    """Stands for callables that are not functions, where torch.fx looks for global names."""


_VISIBLE = object()


def _line(error: Exception, function: Callable) -> str:
    """The last line of the callable's own file that an error passed through."""
    called = function if hasattr(function, "__code__") else type(function).__call__
    code = getattr(inspect.unwrap(called), "__code__", None)
    found, frame = "", error.__traceback__
    while frame is not None and code is not None:
        if frame.tb_frame.f_code.co_filename == code.co_filename:
            text = linecache.getline(code.co_filename, frame.tb_lineno).strip()
            found = f", line {frame.tb_lineno}" + (f", `{text}`" if text else "")
        frame = frame.tb_next
    return found


class _Symbol(fx.Proxy):
    """A proxy whose shape is a tuple, so that Python can unpack, count and slice it."""

    def __getattr__(self, name: str):
        if name in torch_ops.ATTRIBUTES:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)


class _Tracer(fx.Tracer):
    """Gives every node its meaning when torch.fx records it."""

    def __init__(self, function: Callable, positional: tuple, keywords: dict) -> None:
        super().__init__()
        self.function, self.positional, self.keywords = function, positional, keywords
        self.result = None

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """Calls the function by its own keywords, so that any callable and any default will do."""
        positional = [
            self.placeholder(f"input_{place}", value) for place, value in enumerate(self.positional)
        ]
        keywords = {name: self.placeholder(name, value) for name, value in self.keywords.items()}

        def run() -> None:
            self.result = self.meaning(self.function(*positional, **keywords))

        return run, []

    def placeholder(self, name: str, value) -> fx.Proxy:
        proxy = super().create_proxy("placeholder", name, (), {})
        proxy.node.meta["value"] = value
        return proxy

    def meaning(self, result):
        """The symbolic tensor that the callable returns."""
        if isinstance(result, fx.Proxy):
            result = result.node.meta["value"]
        if isinstance(result, Value | int | float):
            return result
        raise Untranslatable(
            f"it returns a {type(result).__name__}: return one tensor without axes"
        )

    def create_proxy(self, kind, target, args, kwargs, *rest, **options):
        if not torch.is_grad_enabled():
            raise Untranslatable(
                "`torch.no_grad` is not seen by a translation: type `cem.frozen(h)` or `h.detach()`"
            )
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        arguments, keywords = fx.node.map_arg(
            (node.args, node.kwargs), lambda one: one.meta["value"]
        )
        if any(one is _VISIBLE for one in (*arguments, *keywords.values())):
            raise Untranslatable(
                "it masks by itself with `visible`: leave the argument out, since the toolkit"
                " masks the context"
            )
        value = torch_ops.call(target, tuple(arguments), dict(keywords))
        node.meta["value"] = value
        if isinstance(value, tuple):
            return tuple(
                self.create_proxy("call_function", operator.getitem, (proxy, place), {})
                for place in range(len(value))
            )
        return value if isinstance(value, int) else proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_arg(self, a):
        if isinstance(a, torch.Tensor):
            if a.ndim == 0 and not a.requires_grad:
                return a.item()
            raise Untranslatable(
                f"it reads a tensor of shape {tuple(a.shape)} that is not an argument: pass it as a"
                " keyword-only argument with a shape"
            )
        return super().create_arg(a)

    def call_module(self, m, forward, args, kwargs):
        return forward(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Untranslatable(
            "`if`, `while`, `and` and `assert` cannot ask a tensor or a size: write it without"
            " branches"
        )

    def iter(self, obj: fx.Proxy) -> Iterator:
        raise Untranslatable(
            "a loop over the axis of a tensor has no translation: use `sum` or `einsum`"
        )
