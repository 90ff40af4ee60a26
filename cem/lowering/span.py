"""Steps in the span of what they move along, where the energy sees the state through linear features alone.

If h enters dE/dh only as z = A h, and dE/dh = B^T f(z) with matrices A (F, D) and B (M, D), every step moves h by a
combination of the rows of B: h = h_0 + B^T c. Then z = A h_0 + (A B^T) c, so a step on h is a step on c (M) along
f(z), and from the second on it takes one product with the Gram matrix A B^T (F, M) in place of those with A and B.

Legend: B batch, T tokens, D dim, F features, M coefficients.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from . import kernels
from .listing import compiled, listing
from .ops import WIDTHS
from .schedule import needed


@dataclass(frozen=True)
class Span:
    """A step on c as two functions.

    Attributes:
        matrices: the pair A, B, from the arguments of the step on h.
        force: f (B, T, M), from z (B, T, F) and the other arguments.
        features, coefficients: F and M.
        code: both as readable Python.
    """

    matrices: Callable[..., tuple[Tensor, Tensor]]
    force: Callable[..., Tensor]
    features: int
    coefficients: int
    code: str

    def least(self, dim: int, steps: int) -> float:
        """The number of tokens from which steps on c take fewer multiplications than steps on h.

        A token saves (F + M) D - F M of them in each step but the first, and A B^T takes F M D.
        """
        product = self.features * self.coefficients
        saved = (steps - 1) * ((self.features + self.coefficients) * dim - product)
        return product * dim / saved if saved > 0 else math.inf


def span_of(step: fx.Graph, arguments: Sequence[str]) -> Span | None:
    """The span of a step h -> dE/dh, or None where h enters it or is moved other than by products with matrices.

    ``step`` is the second graph of :func:`~cem.lowering.schedule.split`, so what it multiplies with are inputs.
    """
    inputs = {node.target: node for node in step.nodes if node.op == "placeholder"}
    h = inputs["h"]
    out = list(_terms(next(node.args[0] for node in step.nodes if node.op == "output")))
    ends = [node for node, _ in out]
    into = [node for node in h.users if not _is_typed(node, h)]
    plain = all(WIDTHS in node.meta and node.args[1].op == "placeholder" for node in (*into, *ends))
    if not into or not plain or h in [node.args[0] for node in ends]:
        return None
    if any(node.args[0] is not h for node in into):
        return None

    matrices = fx.Graph()
    copies = {node: matrices.node_copy(node) for node in inputs.values()}
    A = [_matrix(matrices, node, copies, node.target is F.linear) for node in into]
    B = [_matrix(matrices, node, copies, node.target is torch.matmul, times) for node, times in out]
    matrices.output((_joined(matrices, A, 0, "A"), _joined(matrices, B, 0, "B")))

    force = fx.Graph()
    name = next(name for name in chain("z", map("z{}".format, count())) if name not in arguments)
    copies = {node: force.node_copy(node) for node in inputs.values() if node is not h}
    copies[h] = z = force.create_node("placeholder", name, name=name)
    features = 0
    for node in into:
        _, width = node.meta[WIDTHS]
        part = (torch.narrow, (z, -1, features, width), {}, node.name)
        copies[node] = z if len(into) == 1 else force.create_node("call_function", *part)
        features += width
    wanted = needed([node.args[0] for node in ends], into)
    for node in step.nodes:
        if node in wanted and node not in copies:
            copies[node] = force.node_copy(node, copies.__getitem__)
    force.output(_joined(force, [copies[node.args[0]] for node in ends], -1, "f"))

    asked = [name, *arguments[1:]]
    return Span(
        compiled(listing(matrices, "matrices", list(arguments)), "matrices"),
        compiled(listing(force, "force", asked), "force"),
        features,
        sum(node.meta[WIDTHS][0] for node in ends),
        f"{_shown(matrices, 'matrices', arguments)}\n\n{_shown(force, 'force', asked)}",
    )


def _shown(graph: fx.Graph, name: str, arguments: Sequence[str]) -> str:
    """The source of a function of those arguments alone that it reads."""
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
    read = {node.target for node in graph.find_nodes(op="placeholder")}
    return listing(graph, name, [argument for argument in arguments if argument in read])


def _terms(node: fx.Node, times: float = 1.0) -> Iterator[tuple[fx.Node, float]]:
    """The terms of a sum, each with the number that it is multiplied by."""
    pair = all(isinstance(arg, fx.Node) for arg in node.args)
    if node.target in (operator.add, operator.sub) and pair:
        yield from _terms(node.args[0], times)
        yield from _terms(node.args[1], -times if node.target is operator.sub else times)
    elif node.target is torch.neg:
        yield from _terms(node.args[0], -times)
    elif node.target is operator.mul and not isinstance(node.args[0], fx.Node):
        yield from _terms(node.args[1], node.args[0] * times)
    else:
        yield node, times


def _is_typed(node: fx.Node, h: fx.Node) -> bool:
    """Whether a node asks h for nothing but its type."""
    return node.target in (kernels.turns, "type_as") and h not in node.args[:-1]


def _matrix(
    graph: fx.Graph, product: fx.Node, copies: Mapping, upright: bool, times: float = 1.0
) -> fx.Node:
    """The matrix of a product, from whose rows h is moved or with whose rows it is multiplied."""
    matrix = copies[product.args[1]]
    if not upright:
        matrix = graph.call_method("transpose", (matrix, 0, 1))
    return matrix if times == 1 else graph.call_function(operator.mul, (times, matrix))


def _joined(graph: fx.Graph, parts: Sequence[fx.Node], axis: int, name: str) -> fx.Node:
    """The parts side by side."""
    if len(parts) == 1:
        return parts[0]
    return graph.create_node("call_function", torch.cat, (list(parts), axis), {}, name)
