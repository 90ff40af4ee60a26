"""Splitting a program into what is computed once and what every step, or every new token, repeats."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx


def split(graph: fx.Graph, fixed: Collection[str]) -> tuple[fx.Graph, fx.Graph, tuple[str, ...]]:
    """Two graphs that together compute ``graph``: one from the fixed inputs alone, one from the rest.

    Returns (prepare, repeat, border): ``prepare`` returns the border values as a tuple, ``repeat`` takes them as
    inputs under the names in ``border``.
    """
    early: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.target in fixed:
                early.add(node)
        elif (
            node.op != "output" and node.all_input_nodes and early.issuperset(node.all_input_nodes)
        ):
            early.add(node)
    border = [
        node
        for node in graph.nodes
        if node in early
        and node.op != "placeholder"
        and any(user not in early for user in node.users)
    ]
    return cut(graph, border)


def cut(graph: fx.Graph, border: Sequence[fx.Node]) -> tuple[fx.Graph, fx.Graph, tuple[str, ...]]:
    """As ``split``, at given nodes; what both sides need is computed by both."""
    prepare, repeat = fx.Graph(), fx.Graph()
    wanted = needed(border, ())
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in wanted:
            copies[node] = prepare.node_copy(node, copies.__getitem__)
    prepare.output(tuple(copies[node] for node in border))

    wanted = needed([node for node in graph.nodes if node.op == "output"], border)
    outer: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node not in border:
            outer[node] = repeat.node_copy(node)
    for node in border:
        outer[node] = repeat.create_node("placeholder", node.name, name=node.name)
    for node in graph.nodes:
        if node.op == "output":
            repeat.output(fx.node.map_arg(node.args[0], outer.__getitem__))
        elif node not in outer and node in wanted:
            outer[node] = repeat.node_copy(node, outer.__getitem__)
    return prepare, repeat, tuple(outer[node].name for node in border)


def needed(ends: Sequence[fx.Node], border: Collection[fx.Node]) -> set[fx.Node]:
    """What the ends are computed from, up to a border."""
    found: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node not in border:
                stack += node.all_input_nodes
    return found
