"""A program: expressions lowered together into one torch.fx graph from named inputs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sympy import Expr, Idx
from torch import fx

from ..energy import INPUTS
from . import kernels
from .emit import Emitter
from .values import Value, is_placed


@dataclass(frozen=True)
class Program:
    """An emitted program: a graph from ``inputs`` to its outputs, and what it uses.

    ``scale`` is a factor of the first output that was left out of the graph. ``kept`` says what a decoder keeps of the
    context and how, ``window`` how far back it looks, None for to the start; ``pairs`` that context tokens enter
    other than through what is kept, ``counts`` that the number of visible tokens does. ``packs``: nothing but
    ``flex_attention`` reads the mask.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    kernels: tuple[str, ...]
    needs_mask: bool
    scale: float = 1.0
    reasons: tuple[str, ...] = ()
    kept: tuple[tuple[fx.Node, str], ...] = ()
    window: int | None = None
    pairs: bool = False
    counts: bool = False
    packs: bool = False


def _output(emitter: Emitter, expression: Expr, axes: tuple[Idx, ...]) -> fx.Node:
    """The node of an expression in a given layout, broadcast to it where the expression lacks an axis."""
    value = emitter.lower(expression)
    axes = emitter.lead + axes
    if value.is_number or set(value.axes) != set(axes):
        zero = emitter.ops.call(torch.zeros_like, emitter.input("h"))
        if len(axes) == len(emitter.lead):
            zero = emitter.ops.call("select", zero, -1, 0)
        value = emitter.ops.binary(operator.add, Value(zero, axes), value)
    node = emitter.ops.permute(value, axes).node
    return emitter.ops.call("type_as", node, emitter.input("h")) if is_placed(expression) else node


def program(emitter: Emitter, expressions: Sequence[Expr], over: Idx | None = None) -> Program:
    """A program whose outputs are the expressions; the first has the index ``over``, the others none.

    A numeric factor of the first expression is left to ``Program.scale``: it costs nothing in the step
    size, and a pass over a tensor in the graph.
    """
    scale, first = expressions[0].as_coeff_Mul()
    if first.is_Add and first.could_extract_minus_sign():
        scale, first = -scale, -first
    expressions = [first, *expressions[1:]]
    if emitter.batched:
        emitter.groups.collect(expressions)
    emitter.input("h")
    axes = [() if over is None else (over,), *(() for _ in expressions[1:])]
    nodes = [_output(emitter, *each) for each in zip(expressions, axes, strict=True)]
    emitter.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
    emitter.graph.eliminate_dead_code()
    inputs = _order_inputs(emitter.graph)
    emitter.graph.lint()
    reaches = emitter.groups.reaches
    return Program(
        emitter.graph,
        inputs,
        tuple(sorted(emitter.ops.kernels)),
        emitter.needs_mask,
        float(scale),
        tuple(emitter.reasons),
        tuple(
            (node, how)
            for node, how in emitter.ops.kept.items()
            if node in set(emitter.graph.nodes)
        ),
        None if None in reaches else max(reaches, default=None),
        emitter.pairs,
        emitter.counts,
        "visible" in inputs
        and {node.target for node in emitter.inputs["visible"].users} == {kernels.flex_attention},
    )


def _order_inputs(graph: fx.Graph) -> tuple[str, ...]:
    """Move the inputs to the front in a fixed order and drop those that nothing reads."""
    places = {node.target: node for node in graph.nodes if node.op == "placeholder"}
    names = [n for n in INPUTS if n in places] + sorted(n for n in places if n not in INPUTS)
    names = [n for n in names if places[n].users or n == "h"]
    for name in places:
        if name not in names:
            graph.erase_node(places[name])
    first = next(iter(graph.nodes))
    for name in reversed(names):
        if places[name] is not first:
            first.prepend(places[name])
            first = places[name]
    return tuple(names)
