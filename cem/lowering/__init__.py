"""From an energy to the torch functions of its layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from sympy import Expr, Idx, Symbol
from torch import Tensor, fx

from ..calculus.gradient import hessian_product, output_index, where_frozen
from ..energy import INPUTS, Energy
from ..language.conversion import as_expression
from ..language.symbols import Scalar
from .emit import Emitter
from .listing import compiled, listing
from .program import Program, program
from .reference import (
    TokenEnergy,
    branches_on_data,
    energy_of,
    from_callable,
    gradient_of,
    hessian_of,
    joint_gradient_of,
    loop_tokens,
    map_tokens,
)
from .schedule import cut, split
from .span import Span, span_of


class LoweringError(ValueError):
    """An explicit lowering that does not fit the energy."""


@dataclass(frozen=True)
class _Plan:
    """What every program of one layer has in common."""

    energy: Energy
    sizes: Mapping[Symbol, int]
    scalars: Mapping[Scalar, float]
    names: tuple[str, ...]
    joint: bool = False
    still: bool = False

    @property
    def force(self) -> Expr:
        """The derivative that the layer follows."""
        return self.energy.joint_gradient if self.joint else self.energy.gradient

    @property
    def step(self) -> Expr:
        """The same at a state of the layer, where what is frozen may be the state itself."""
        return where_frozen(self.force, self.energy.state) if self.still else self.force

    def program(self, expressions: Sequence[Expr], over: Idx | None = None, **options) -> Program:
        return program(Emitter(self.sizes, self.scalars, **options), expressions, over)

    @property
    def arguments(self) -> list[str]:
        return [*INPUTS, *self.names]

    def compile(self, graph: fx.Graph, name: str, extra: Sequence[str] = ()) -> Callable:
        return compiled(listing(graph, name, [*self.arguments, *extra]), name)

    def token_energy(self) -> TokenEnergy:
        if self.energy.expression is None:
            fixed = {str(scalar): value for scalar, value in self.scalars.items()}
            return from_callable(
                self.energy.function, self.names, fixed, self.energy.context is not None
            )
        program = self.program([self.energy.expression], batched=False)
        scale = program.scale
        arguments = [name for name in self.arguments if name not in ("causal", "states", "ordered")]
        function = compiled(listing(program.graph, "energy", arguments), "energy")
        return function if scale == 1 else lambda *inputs: scale * function(*inputs)

    def sample(self) -> tuple[Tensor | None, ...]:
        """Small inputs of the right shapes, in the order of ``arguments``."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: Expr | int) -> Tensor:
            lengths = [int(as_expression(size).xreplace(dict(self.sizes))) for size in shape]
            return torch.randn(lengths, generator=generator)

        energy = self.energy
        h = draw(1, 2, energy.width)
        x = None if energy.context is None else draw(1, 2, energy.context.shape[1])
        shapes = {str(parameter.name): tuple(parameter.shape) for parameter in energy.parameters}
        values = (draw(*shapes[name]) if name in shapes else torch.ones(()) for name in self.names)
        places = torch.arange(2.0)[None]
        return h, h, x, None, energy.masks_itself, places, places, None, False, *values


@dataclass(frozen=True)
class Decoding:
    """The program of ``gradient`` for a decoder, cut where the context alone ends.

    ``context`` gives what is to be kept of new tokens as a tuple, ``gradient`` takes what is held after the
    parameters. ``kinds`` says of each whether it is appended, a state, or new; ``window`` and ``counts`` as in
    :class:`~cem.lowering.program.Program`. ``placed`` says whether ``gradient`` reads the positions of the context.
    """

    context: Callable[..., tuple]
    gradient: Callable[..., Tensor]
    kinds: tuple[str, ...]
    window: int | None
    counts: bool
    placed: bool


@dataclass(frozen=True)
class EnergyFunction:
    """Energies (B, T) from (h, frozen, *seen, *parameters); ``needs_mask`` as in ``Lowering``.

    ``gradient_and_energy`` returns a pair, the unscaled gradient (B, T, D) first.
    """

    function: Callable[..., Tensor | tuple[Tensor, Tensor]]
    needs_mask: bool = False
    scale: float = 1.0

    def __call__(self, *inputs) -> Tensor | tuple[Tensor, Tensor]:
        found = self.function(*inputs)
        return found if self.scale == 1 else self.scale * found


@dataclass(frozen=True)
class HessianFunction:
    """(h, frozen, *seen, *parameters) -> the linear map v -> d2E/dh2 v, (B, T, D) to (B, T, D).

    What does not depend on v is computed once; ``curvature`` is that of the energy, ``needs_mask`` as in ``Lowering``.
    """

    prepare: Callable[..., tuple]
    apply: Callable[..., Tensor]
    curvature: str
    needs_mask: bool = False
    scale: float = 1.0

    def __call__(self, *inputs) -> Callable[[Tensor], Tensor]:
        fixed = self.prepare(*inputs)
        return lambda v: self.scale * self.apply(*inputs, v, *fixed)


class Lowering:
    """The torch functions of a layer and how they were found.

    Every function takes ``(h, frozen, x, visible, causal, position, context_position, *parameters)``; ``gradient``
    takes the values of ``prepare`` after them.

    Attributes:
        kind: ``"fused"`` for a program in closed form, ``"autograd"`` for the derivative taken at run time.
        kernels: what the program is made of: ``"sdpa"``, ``"matmul"``, ``"einsum"``, ``"dense_softmax"``,
            ``"dense_logsumexp"``, ``"flex_attention"``, ``"autograd"``.
        reasons: sentences that say why something was not fused.
        scale: dE/dh is ``scale`` times what ``gradient`` returns.
        needs_mask: whether the visible set is needed as a dense mask even where a kernel knows it is causal.
        packs: whether ``gradient`` can do without one where only documents and padding hide tokens.
        code: the program of ``gradient`` as readable Python; ``graph`` is it as a torch.fx graph, None for autograd.
        prepare: the values that stay the same from step to step, as a tuple.
        gradient: dE/dh (B, T, D) divided by ``scale``.
        energy: energies (B, T).
        gradient_and_energy: what ``gradient`` and ``energy`` return, from the same kernel calls.
        hessian_product: (h, ...) -> the map v -> d2E/dh2 v (B, T, D).
        span: ``gradient`` as a step on the coefficients of what it moves h along; None where there is no such.
        decoding: the program cut for a cache; ``ValueError`` where there can be none.
    """

    kind: str
    kernels: tuple[str, ...]
    reasons: tuple[str, ...]
    scale: float = 1.0
    needs_mask: bool = False
    packs: bool = False
    code: str
    graph: fx.Graph | None = None
    prepare: Callable[..., tuple]
    gradient: Callable[..., Tensor]
    energy: EnergyFunction
    gradient_and_energy: EnergyFunction
    hessian_product: HessianFunction
    span: Span | None = None
    decoding: Decoding


class Fused(Lowering):
    """A program in closed form; ``fixed`` names the inputs that stay the same from step to step.

    ``flex`` asks for ``flex_attention`` in the gradient; energies and Hessians do without.
    """

    kind = "fused"

    def __init__(self, plan: _Plan, fixed: Sequence[str], flex: bool = False) -> None:
        self.axis = output_index(plan.energy.width)
        program = plan.program([plan.step], self.axis, flex=flex)
        self.plan = plan
        self.kernels = program.kernels
        self.reasons = program.reasons
        self.scale = program.scale
        self.needs_mask, self.packs = program.needs_mask, program.packs
        self.graph = program.graph
        self.program = program
        self.code = _code(program)
        prepare, repeat, border = split(program.graph, fixed)
        self.prepare = plan.compile(prepare, "prepare")
        self.gradient = plan.compile(repeat, "gradient", border)
        self.span = span_of(repeat, [*plan.arguments, *border])

    @cached_property
    def energy(self) -> EnergyFunction:
        """Energies, attention's from the kernel's own log-sum-exp."""
        program = self.plan.program([self.plan.energy.expression])
        function = self.plan.compile(program.graph, "energy")
        return EnergyFunction(function, program.needs_mask, program.scale)

    @cached_property
    def gradient_and_energy(self) -> EnergyFunction:
        """The pair of what ``gradient`` returns and the energies, from the same kernel calls."""
        expressions = [self.plan.force, self.plan.energy.expression]
        program = self.plan.program(expressions, self.axis)
        return EnergyFunction(self.plan.compile(program.graph, "energy"), program.needs_mask)

    @cached_property
    def decoding(self) -> Decoding:
        program, name = self.program, self.plan.energy.name
        if self.plan.joint or program.pairs:
            why = "; ".join(self.reasons) or "a mask over pairs of tokens enters it"
            why = "its tokens move together" if self.plan.joint else why
            raise ValueError(
                f"energy `{name}` cannot be decoded token by token from a cache: {why}"
            )
        if not program.kept:
            raise ValueError(
                f"energy `{name}` keeps nothing of the tokens it has seen: call the layer without `cache`"
            )
        nodes, kinds = zip(*program.kept, strict=True)
        prepare, repeat, border = cut(program.graph, nodes)
        return Decoding(
            self.plan.compile(prepare, "context"),
            self.plan.compile(repeat, "gradient", border),
            kinds,
            program.window,
            program.counts,
            any(n.target == "context_position" and n.users for n in repeat.nodes),
        )

    @cached_property
    def hessian_product(self) -> HessianFunction:
        """The Hessian times a vector in closed form: the calculus differentiates <dE/dh, v> once more."""
        energy, plan = self.plan.energy, self.plan
        program = plan.program([hessian_product(energy.gradient, energy.width)], self.axis)
        prepare, apply, border = split(program.graph, plan.arguments)
        return HessianFunction(
            plan.compile(prepare, "prepare"),
            plan.compile(apply, "hessian_product", ["direction", *border]),
            energy.curvature,
            program.needs_mask,
            program.scale,
        )


class Autograd(Lowering):
    """The derivative of the energy of one token, taken by autograd when the layer runs."""

    kind = "autograd"
    kernels = ("autograd",)

    def __init__(self, plan: _Plan, reasons: tuple[str, ...]) -> None:
        token, mapping = plan.token_energy(), map_tokens
        self.code = "gradient = vmap(vmap(grad(energy)))  # over batch and tokens"
        if plan.energy.expression is None and branches_on_data(token, *plan.sample()):
            mapping = loop_tokens
            self.code = "gradient = [[grad(energy)(token) for token in row] for row in h]"
            reasons = (*reasons, "it branches on its data, so tokens are taken one after the other")
        self.reasons = reasons
        self.name = plan.energy.name
        self.prepare = lambda *inputs: ()
        self.gradient = (
            joint_gradient_of(token, mapping) if plan.joint else gradient_of(token, mapping)
        )
        self.energy = EnergyFunction(energy_of(token, mapping))
        self.gradient_and_energy = EnergyFunction(
            lambda *inputs: (self.gradient(*inputs), self.energy(*inputs))
        )
        self.hessian_product = HessianFunction(
            lambda *inputs: (), hessian_of(self.gradient), plan.energy.curvature
        )

    @property
    def decoding(self) -> Decoding:
        raise ValueError(
            f"energy `{self.name}` is lowered to autograd, which keeps no cache: {'; '.join(self.reasons)}"
        )


def _code(program: Program) -> str:
    source = listing(program.graph, "gradient", list(program.inputs))
    if program.scale == 1:
        return source
    head, body = source.split("\n", 1)
    return f'{head}\n    """Returns r with dE/dh = {program.scale:g} * r."""\n{body}'


def lower(
    energy: Energy,
    sizes: Mapping[Symbol, int],
    scalars: Mapping[Scalar, float],
    names: tuple[str, ...],
    *,
    kind: str = "auto",
    fixed: tuple[str, ...] = (),
    joint: bool = False,
    still: bool = False,
) -> Lowering:
    """Choose how a layer computes dE/dh.

    ``names`` are the parameters and learned scalars in the order in which the functions take them, ``fixed`` the
    inputs that stay the same from step to step. ``"fused"`` raises ``LoweringError`` where only autograd is
    possible, ``"flex"`` also where nothing can be given to ``flex_attention``, ``"autograd"`` forces the reference,
    ``"auto"`` is fused where it can be. Equal layers share one lowering. ``joint`` asks for the derivative of the
    energies of all tokens together, ``still`` says that it is only taken where ``frozen(h)`` is the state.
    """
    if kind not in ("auto", "fused", "flex", "autograd"):
        raise ValueError(
            f'`lowering` is one of "auto", "fused", "flex", "autograd": got {kind!r}; type `lowering="auto"`'
        )
    return _lower(
        energy, tuple(sizes.items()), tuple(scalars.items()), names, kind, fixed, joint, still
    )


@lru_cache(maxsize=256)
def _lower(
    energy: Energy,
    sizes: tuple,
    scalars: tuple,
    names: tuple,
    kind: str,
    fixed: tuple,
    joint: bool,
    still: bool,
) -> Lowering:
    plan = _Plan(energy, dict(sizes), dict(scalars), names, joint, still)
    if energy.expression is None:
        if kind in ("fused", "flex"):
            raise LoweringError(
                f"energy `{energy.name}` cannot be fused: {energy.reason};"
                ' type `lowering="autograd"` or rewrite that line'
            )
        return Autograd(plan, (energy.reason,))
    if kind == "autograd":
        return Autograd(plan, ('asked for with lowering="autograd"',))
    found = Fused(plan, fixed, kind == "flex")
    if kind == "flex" and "flex_attention" not in found.kernels:
        why = "; ".join(found.reasons) or "it has no softmax over the context"
        raise LoweringError(
            f'energy `{energy.name}` has nothing for `flex_attention`: {why}; type `lowering="auto"`'
        )
    return found
