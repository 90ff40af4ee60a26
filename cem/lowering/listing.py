"""A torch.fx graph as the Python a person would write; the text is also what runs."""

from __future__ import annotations

import keyword
import linecache
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import count
from types import SimpleNamespace

import torch
from torch import fx
from torch.nn import functional as F

from ..language.words import WORDS
from . import kernels
from .ops import VIEWS, shown

INFIX = {operator.add: "+", operator.sub: "-", operator.mul: "*"}
NAMES: dict[Callable, str] = {
    torch.functional.einsum: "torch.einsum",
    torch.nn.functional.scaled_dot_product_attention: "F.scaled_dot_product_attention",
}
_OWN = {word.name: word.torch for word in WORDS if word.torch.__module__.startswith("cem")}
NAMES.update({function: f"words.{name}" for name, function in _OWN.items()})
GLOBALS = {"torch": torch, "F": F, "kernels": kernels, "words": SimpleNamespace(**_OWN)}

_serial = count()


def spelled(target: Callable) -> str:
    """The name under which a function is printed."""
    if target in NAMES:
        return NAMES[target]
    name = target.__name__
    if getattr(kernels, name, None) is target:
        return f"kernels.{name}"
    if getattr(F, name, None) is target and not hasattr(torch, name):
        return f"F.{name}"
    if getattr(torch, name, None) is target:
        return f"torch.{name}"
    if getattr(torch.special, name.removeprefix("special_"), None) is target:
        return f"torch.special.{name.removeprefix('special_')}"
    return f"F.{name}"


def listing(graph: fx.Graph, name: str, arguments: list[str]) -> str:
    """The source of a function ``name(*arguments)`` that computes the graph's outputs."""
    # The text is run, and arguments are the only names in it that torch.fx has not cleaned.
    for argument in arguments:
        if not argument.isidentifier():
            raise ValueError(f"an argument of a program must be a Python name: got {argument!r}")
    # A parameter may be called F; inside the function it then becomes F_.
    own = {given: f"{given}_" if given in GLOBALS else given for given in arguments}
    lines = [f"def {name}({', '.join(own.values())}):"]
    for statement in statements(graph, own, {*own.values(), *GLOBALS}):
        lines += wrapped(statement)
    return "\n".join(lines)


def statements(
    graph: fx.Graph,
    inputs: Mapping[str, str],
    taken: Collection[str],
    spelled: Callable[[Callable], str] = spelled,
) -> list[str]:
    """The assignments that compute the graph's outputs, and the ``return`` of them, a line each.

    Args:
        graph: the program.
        inputs: how each of its inputs is written.
        taken: names that no variable gets.
        spelled: the name under which a function is written.
    """
    text: dict[fx.Node, str] = {}
    compound: set[fx.Node] = set()
    used = set(taken)
    lines: list[str] = []

    def spell(value) -> str:
        if isinstance(value, fx.Node):
            return text[value]
        if isinstance(value, tuple | list):
            inner = ", ".join(map(spell, value))
            if isinstance(value, list):
                return f"[{inner}]"
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        return repr(value)

    def bracketed(value) -> str:
        return f"({spell(value)})" if value in compound else spell(value)

    def unique(label: str) -> str:
        stem, _, number = label.rpartition("_")
        label = stem if stem and number.isdigit() else label
        found = next(c for c in _candidates(label) if c not in used)
        used.add(found)
        return found

    for node in graph.nodes:
        if node.op == "placeholder":
            text[node] = inputs[node.target]
            continue
        if node.op == "output":
            lines.append(f"return {spell(node.args[0])}")
            continue
        args = [spell(a) for a in node.args] + [f"{k}={spell(v)}" for k, v in node.kwargs.items()]
        if node.op == "call_method":
            text[node] = f"{bracketed(node.args[0])}.{node.target}({', '.join(args[1:])})"
        elif node.target is operator.getitem:
            text[node] = f"{bracketed(node.args[0])}[{args[1]}]"
        elif node.target in INFIX:
            text[node] = f"{bracketed(node.args[0])} {INFIX[node.target]} {bracketed(node.args[1])}"
        elif node.target is torch.neg:
            text[node] = f"-{bracketed(node.args[0])}"
        else:
            text[node] = f"{spelled(node.target)}({', '.join(args)})"
        if _inlined(node):
            if node.target in INFIX or node.target is torch.neg:
                compound.add(node)
        else:
            variable = unique(_label(node))
            lines.append(f"{variable} = {text[node]}")
            text[node] = variable
    return lines


def wrapped(statement: str, width: int = 96) -> list[str]:
    """A statement indented by four blanks, broken inside its widest brackets where it is too long."""
    opened, widest = [], (0, 0, 0)
    for place, letter in enumerate(statement):
        if letter in "([":
            opened.append(place)
        elif letter in ")]":
            start = opened.pop()
            widest = max(widest, (place - start, start, place))
    _, start, stop = widest
    if len(statement) <= width or stop == 0:
        return [f"    {statement}"]
    pieces = _split_at_commas(statement[start + 1 : stop])
    lines, line = [f"    {statement[: start + 1]}"], "       "
    for piece in pieces:
        if line.strip() and len(line) + len(piece) + 2 > width:
            lines.append(line)
            line = "       "
        # A comma after a lone piece would make a tuple of a bracketed sum.
        line += f" {piece}," if len(pieces) > 1 else f" {piece}"
    return [*lines, line, f"    {statement[stop:]}"]


def _split_at_commas(text: str) -> list[str]:
    """The pieces between the commas outside brackets and strings."""
    pieces, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == "'"
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0 and not quoted:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def _candidates(label: str) -> Iterator[str]:
    if not keyword.iskeyword(label):
        yield label
    for n in count(1):
        yield f"{label}_{n}"


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in VIEWS


def _inlined(node: fx.Node) -> bool:
    """Whether a node is printed inside its only use."""
    if len(node.users) != 1:
        return False
    user = next(iter(node.users))
    if sum(used is node for used in _arguments(user)) != 1:
        return False
    chained = _is_view(user) and user.args[0] is node
    alone = user.op == "output" and user.args[0] is node
    return chained or alone or (_is_view(node) and shown(node).op == "placeholder")


def _arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda argument: found.append(argument))
    return found


def _label(node: fx.Node) -> str:
    """A chain of views is called as what it shows."""
    while _is_view(node) and _inlined(node.args[0]):
        node = node.args[0]
    return node.name


def compiled(source: str, name: str) -> Callable:
    """The function that a listing defines; its source shows in tracebacks."""
    filename = f"<cem {name} {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope = dict(GLOBALS)
    exec(compile(source, filename, "exec"), scope)
    return scope[name]
