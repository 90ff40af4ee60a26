"""An energy layer written out as a class of torch: what ``cem.hf.export`` puts into a model file.

Legend: B batch, T tokens, S tokens so far, D dim, H heads.
"""

from __future__ import annotations

import math
import operator
import textwrap
from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

import cem
from cem.energy import INPUTS
from cem.initialisation import diagonals
from cem.language.notation import text
from cem.layer import EnergyLayer
from cem.lowering.listing import statements
from cem.lowering.ops import shown
from cem.lowering.schedule import cut, split

from .cache import appended
from .sources import WIDTH, Sources, formatted, is_own

RULES = (cem.GradientDescent, cem.Momentum, cem.Nesterov)
NORMS = (nn.RMSNorm, nn.LayerNorm, nn.Identity)
PRECONDITIONED = {
    cem.ScaledIdentity: "force * F.softplus(P.d)",
    cem.Diagonal: "force * {diagonal}",
    cem.DiagonalPlusLowRank: "force * {diagonal} + (force @ P.V) @ P.{left}.T",
    cem.BlockDiagonal: "((force.unflatten(-1, ({blocks}, 1, -1)) @ P.L) @ P.L.mT).flatten(-3)",
}
"""P times the force, with P the parameters of the preconditioner."""


def check(layer: EnergyLayer, where: str) -> None:
    """Refuse, with ``ValueError``, a layer that cannot be written out."""
    kind = layer.lowering
    kinds, counts = (), False
    if kind.kind == "fused" and layer.energy_function.context is not None:
        kinds, counts = kind.decoding.kinds, kind.decoding.counts
    for wrong, why in (
        (kind.kind == "autograd", f"its program is autograd's ({'; '.join(kind.reasons)})"),
        (type(layer.update) not in RULES, f"its update rule is {layer.update}"),
        (type(layer.norm) not in NORMS, f"its norm is {layer.norm}"),
        (
            type(layer.preconditioner) not in (*PRECONDITIONED, type(None)),
            f"its preconditioner is {layer.preconditioner}",
        ),
        (layer.moving or not layer.causal, "its tokens move together or see later ones"),
        (layer.tolerance is not None, "it stops at a tolerance"),
        (layer.dense or counts, "its program counts the tokens that are seen"),
        ("state" in kinds, "it keeps a state of linear attention"),
    ):
        if wrong:
            raise ValueError(
                f"{where} cannot be exported: {why}; keep it with `model.save_pretrained` and load it with cem"
            )


LOCAL = {"h", "g", "m", "x", "force", "cache", "causal", "visible", "positions", "places", "frozen"}
"""Names that the method ``forward`` uses itself."""

TYPES = {"visible": "Tensor | None", "causal": "bool"}
LEGEND = {
    "context": "    x are the tokens so far, held fixed, and V those of them that this one sees.",
    "frozen": "    h̄ is the state at the input, held fixed.",
}


class Written:
    """The source of the class of one layer, with ``$name`` for the name of the class.

    Attributes:
        source: the text.
        placed: whether the layer reads the positions of the tokens in a cache.
    """

    def __init__(self, layer: EnergyLayer, sources: Sources) -> None:
        self.layer, self.sources = layer, sources
        self.looks = layer.energy_function.context is not None
        self.ahead = type(layer.update) is cem.Nesterov and layer.steps > 1
        again = layer.steps > 1 and layer.refresh == "layer"
        program = layer.lowering.program
        if self.looks:
            border = [node for node, _ in program.kept]
            first, force, names = cut(program.graph, border)
        else:
            parameters = [p for p in program.inputs if p not in INPUTS]
            first, force, names = split(program.graph, ["frozen", *parameters] if again else ())
        self._scale(force)
        self.held = self._held(first, program)
        self.placed = any(n.target == "context_position" and n.users for n in force.nodes)
        frozen = "frozen" if again or self.ahead else "h"
        own = {"h": "x", "x": "x", "frozen": "frozen", "context_position": "positions"}
        later = {"h": "h", "x": "h", "frozen": frozen, "position": "positions", "ordered": "False"}
        later |= {"context_position": "places"} | dict(zip(names, self.held, strict=True))
        self.first, self.force = (
            self._method(name, said, graph, written)
            for name, said, graph, written in (
                ("context" if self.looks else "gates", self._said_first(), first, own),
                ("force", "-dE/dh, (B, T, D).", force, later),
            )
        )
        parts = [self._head(), self._init(), self._forward(), self.first[0], self.force[0]]
        self.source = "\n\n".join(part for part in parts if part) + "\n"

    def _scale(self, graph: fx.Graph) -> None:
        """Let a program return -dE/dh, without a factor left out."""
        factor = -self.layer.lowering.scale
        output = next(node for node in graph.nodes if node.op == "output")
        if factor != 1:
            with graph.inserting_before(output):
                output.args = (graph.call_function(operator.mul, (factor, output.args[0])),)

    def _held(self, first: fx.Graph, program) -> list[str]:
        """Names for what is computed before the force."""
        nodes = next(node for node in first.nodes if node.op == "output").args[0]
        if self.looks and len(nodes) == 1:
            return ["keys"]
        names: list[str] = []
        for node in nodes:
            stem = shown(node).name.rstrip("_0123456789").lower()
            stem = f"{stem}_held" if stem in LOCAL else stem
            same = sum(name.rstrip("0123456789") == stem for name in names)
            names.append(f"{stem}{same or ''}")
        return names

    def _said_first(self) -> str:
        if self.looks:
            return "What a token shows to later ones and a cache keeps, (B, H, T, features)."
        return "What stays the same from step to step."

    def _value(self, name: str) -> str:
        """A parameter or learned scalar, as the programs read it."""
        if hasattr(self.layer, f"log_{name}"):
            return f"self.log_{name}[0].exp()"
        learned = name in (scalar.name for scalar in self.layer.energy_function.scalars)
        return f"self.{name}[0]" if learned else f"self.{name}"

    def _method(
        self, name: str, said: str, graph: fx.Graph, written: Mapping[str, str]
    ) -> tuple[str, list[str]]:
        """A method that runs a program, and its arguments; empty for a program without outputs."""
        output = next(node for node in graph.nodes if node.op == "output")
        if output.args[0] == ():
            return "", []
        if isinstance(output.args[0], tuple) and len(output.args[0]) == 1:
            output.args = output.args[0]
        for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users]:
            graph.erase_node(node)
        used = [node.target for node in graph.nodes if node.op == "placeholder"]
        inputs = {target: written.get(target, target) for target in used}
        inputs |= {n: self._value(n) for n in used if n not in (*INPUTS, *written)}
        order = [*INPUTS[:3], *self.held, *INPUTS[3:]]
        place = {written.get(target, target): n for n, target in reversed([*enumerate(order)])}
        arguments = [a for a in dict.fromkeys(inputs.values()) if a in place and a != "False"]
        arguments.sort(key=place.__getitem__)
        called = (node.target for node in graph.nodes if node.op == "call_function")
        functions = {function.__name__ for function in called if is_own(function)}
        taken = {*inputs.values(), *functions, "torch", "F", "nn", "self"}
        lines = statements(graph, inputs, taken, self.sources.spell)
        lines = [formatted(line, 8) for line in lines]
        typed = ", ".join(f"{a}: {TYPES.get(a, 'Tensor')}" for a in arguments)
        back = "tuple[Tensor, ...]" if isinstance(output.args[0], tuple) else "Tensor"
        head = formatted(f"def {name}(self, {typed}) -> {back}:", 4)
        return "\n".join([head, f'        """{said}"""', *lines]), arguments

    def _head(self) -> str:
        derivation = self.layer.energy_function.derivation()
        given = "h | x" if self.looks else "h"
        stages = {d.stage for d in derivation.definitions} | ({"context"} if self.looks else set())
        rows = [(text(d.entry), text(d.expression)) for d in derivation.definitions]
        rows += [(f"E({given})", text(derivation.energy)), ("-dE/dh[d]", text(derivation.force))]
        wide = max(len(left) for left, _ in rows)
        legend = [said for stage, said in LEGEND.items() if stage in stages]
        pad = " " * (8 if legend else 4)
        lines = []
        for left, right in rows:
            hang = {"subsequent_indent": pad + " " * (wide + 5), "break_long_words": False}
            lines += textwrap.wrap(f"{pad}{left:<{wide}} = {right}", WIDTH, **hang)
        formulas = "\n".join([*lines, *([""] if legend else []), *legend])
        steps = "A step" if self.layer.steps == 1 else f"{self.layer.steps} steps"
        return f'class $name(nn.Module):\n    """{steps} down an energy:\n\n{formulas}\n    """'

    def _init(self) -> str:
        layer, signature = self.layer, "self, config: CEMConfig, index: int"
        lines = ["super().__init__()"]
        lines += ["self.index = index  # of its entry in the cache"] if self.looks else []
        energy = layer.energy_function
        diagonal = diagonals(energy.expression)
        for parameter in energy.parameters:
            tensor = getattr(layer, str(parameter.name))
            width = layer.dim if energy.width in parameter.shape else tensor.shape[-1]
            shape = ", ".join(map(str, tensor.shape))
            drawn = f"torch.randn({shape}) / {width}**0.5"
            drawn = f"torch.zeros({shape})" if parameter in diagonal else drawn
            lines.append(f"self.{parameter.name} = nn.Parameter({drawn})")
        for scalar in (s for s in energy.scalars if s not in layer._fixed):
            name = f"log_{scalar.name}" if scalar.is_positive else scalar.name
            lines.append(f"self.{name} = nn.Parameter(torch.zeros(1))")
        if type(layer.norm) is not nn.Identity:
            lines.append(f"self.norm = nn.{_norm(layer.norm)}")
        for name, module in (("update", layer.update), ("preconditioner", layer.preconditioner)):
            held = {} if module is None else dict(module.named_parameters())
            if held:
                entries = ", ".join(f'"{key}": {_start(key, t)}' for key, t in held.items())
                lines.append(f"self.{name} = nn.ParameterDict({{{entries}}})")
        body = "\n".join(formatted(line, 8) for line in lines)
        return f"    def __init__({signature}) -> None:\n{body}"

    def _forward(self) -> str:
        layer = self.layer
        read = {*self.first[1], *self.force[1]}
        more = ["visible: Tensor | None"] if self.looks else []
        more += [f"{name}: Tensor" for name in ("positions", "places") if name in read]
        named = f"*, {', '.join(more)}, " if more else ""
        lines = [formatted(f"def forward(self, h: Tensor, {named}**kwargs) -> Tensor:", 4)]
        plain = type(layer.norm) is nn.Identity
        norm, g = ("{}", "h") if plain else ("self.norm({})", "g")
        one = layer.steps == 1
        body = [f"g = {norm.format('h')}"] if not plain and (one or self.first[0]) else []
        names = {"x": g, "h": g, "frozen": g}
        if self.first[0]:
            called = ", ".join(names.get(a, a) for a in self.first[1])
            method = "context" if self.looks else "gates"
            body.append(f"{', '.join(self.held)} = self.{method}({called})")
        if self.looks:
            body += self._cached()
        step = []
        if "frozen" in self.force[1]:
            taken = f"frozen = {norm.format('h')}"
            (body if layer.refresh == "layer" else step).append(taken)
        if self.ahead or not (one or plain):
            step.append(f"g = {norm.format(self._point())}")
        g = "g" if self.ahead else g
        called = ", ".join({"h": g}.get(a, a) for a in self.force[1])
        step.append(f"force = self.force({called})")
        step += self._preconditioned()
        moves = type(layer.update) is not cem.GradientDescent and not one
        body += ["m = torch.zeros_like(h)"] if moves else []
        body += self._steps(step, moves)
        return "\n".join([*lines, *(formatted(line.lstrip(), 8 + _indent(line)) for line in body)])

    def _point(self) -> str:
        return f"h + {self._momentum()} * m" if self.ahead else "h"

    def _momentum(self) -> str:
        rule = self.layer.update
        return "self.update.momentum" if rule.learn else repr(rule.momentum)

    def _cached(self) -> list[str]:
        if len(self.held) == 1:
            kept = "keys, _ = cache.update(keys, keys[..., :0], self.index)"
        else:
            self.sources.add(appended)
            kept = f"{', '.join(self.held)} = appended(cache, self.index, [{', '.join(self.held)}])"
        lines = ["cache = kwargs[CACHE]", "if cache is not None:", f"    {kept}"]
        if "causal" in self.force[1]:
            lines.append("causal = visible is None and h.shape[1] > 1")
        return lines

    def _preconditioned(self) -> list[str]:
        part = self.layer.preconditioner
        if part is None:
            return []
        diagonal = "F.softplus(P.d)" if part.definite else "(1 + P.d)"
        left, blocks = ("V" if part.definite else "U"), getattr(part, "blocks", None)
        product = PRECONDITIONED[type(part)].format(diagonal=diagonal, left=left, blocks=blocks)
        return ["P = self.preconditioner", f"force = {product}"]

    def _steps(self, step: Sequence[str], moves: bool) -> list[str]:
        rule, count = self.layer.update, self.layer.steps
        size = "step_size" if rule.per_step else repr(rule.step_size)
        if rule.learn:
            size = "step_size" if rule.per_step and count > 1 else "self.update.step_size"
            along = f"torch.addcmul(@, {size}, force)"
        else:
            sizes = rule.step_size[0] if rule.per_step and count == 1 else size
            along = f"torch.add(@, force, alpha={sizes})"
            along = "@ + force" if sizes in (1, "1.0") else along
        if count == 1:
            return [*step, f"return {along.replace('@', 'h')}"]
        over = f"for _ in range({count}):"
        if rule.per_step:
            over = f"for step_size in {'self.update.step_size' if rule.learn else rule.step_size}:"
        taken = [f"h = {along.replace('@', 'h')}"]
        if moves:
            taken = [f"m = {along.replace('@', f'{self._momentum()} * m')}", "h = h + m"]
        return [over, *(f"    {line}" for line in (*step, *taken)), "return h"]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _norm(norm: nn.Module) -> str:
    """The call that makes a norm."""
    (width,) = norm.normalized_shape
    affine = "" if norm.weight is not None else ", elementwise_affine=False"
    bias = ", bias=False" if affine == "" and getattr(norm, "bias", 0) is None else ""
    return f"{type(norm).__name__}({width}, eps={norm.eps}{affine}{bias})"


def _start(key: str, tensor: Tensor) -> str:
    """A start for a learned number or array of an update rule or a preconditioner."""
    shape = ", ".join(map(str, tensor.shape))
    if key == "L":
        return f"torch.eye({tensor.shape[-1]}).repeat({tensor.shape[0]}, 1, 1)"
    if key == "d":
        return f"torch.full(({tensor.shape[0]},), {math.log(math.expm1(1)):.4f})"
    if key in ("U", "V"):
        return f"torch.randn({shape}) / {tensor.shape[0]}**0.5"
    return f"torch.ones({shape})"
