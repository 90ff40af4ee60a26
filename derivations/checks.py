"""Checks of a derivation: SymPy's own ``diff`` at concrete sizes, a layer beside its closed form.

SymPy's side shares no code with the calculus or the lowering: an energy is written out at concrete
sizes, every sum as its terms and every word by its elementary formula, and SymPy differentiates
the result.
"""

import itertools
from collections.abc import Callable

import mpmath
import numpy as np
import sympy
import torch
from sympy import Add, Expr, Idx, Indexed, Integer, Rational, Sum, Symbol, exp, log
from torch import Tensor

import cem
from cem.calculus.gradient import output_index
from cem.language.entmax import EntmaxConjugate
from cem.language.evaluation import Evaluator
from cem.language.positions import ContextPosition, Lookup, Rope, TokenPosition
from cem.language.reductions import LogSumExp
from cem.language.symbols import SEQ, size_of
from cem.language.tokens import Decay
from cem.language.words import step

TOLERANCE = 1e-12


def _normal_cdf(z: Expr) -> Expr:
    return (1 + sympy.erf(z / sympy.sqrt(2))) / 2


def _normal_pdf(z: Expr) -> Expr:
    return exp(-(z**2) / 2) / sympy.sqrt(2 * sympy.pi)


class Dilogarithm(sympy.Function):
    """Li2(z) for z < 1; ``sympy.polylog(2, z)`` simplifies its argument, which takes seconds."""

    def fdiff(self, argindex: int = 1) -> Expr:
        z = self.args[0]
        return -log(1 - z) / z

    def _eval_evalf(self, prec: int) -> Expr:
        with mpmath.workprec(prec):
            return Expr._from_mpmath(mpmath.polylog(2, self.args[0]._to_mpmath(prec)).real, prec)


class SparseMaximum(sympy.Function):
    """max_p p.z + (1 - sum p^alpha) / (alpha (alpha - 1)), called with alpha and the numbers z."""

    def fdiff(self, argindex: int = 1) -> Expr:
        """The p of the maximum, by Danskin's theorem."""
        return SparseWeight(Integer(argindex - 2), *self.args)


class SparseWeight(sympy.Function):
    """One weight of that maximum, called with its place, alpha and the numbers z."""

    def _eval_evalf(self, prec: int) -> Expr:
        place, alpha, *z = self.args
        with mpmath.workprec(2 * prec):
            slope = mpmath.mpf(alpha.p) / alpha.q - 1
            z = [slope * entry._to_mpmath(2 * prec) for entry in z]
            power, high = 1 / slope, max(z)
            low = high - 1
            for _ in range(2 * prec):
                middle = (low + high) / 2
                above = sum(max(entry - middle, 0) ** power for entry in z) >= 1
                low, high = (middle, high) if above else (low, middle)
            return Expr._from_mpmath(max(z[int(place)] - low, 0) ** power, prec)


ELEMENTARY: dict[type, Callable[[Expr], Expr]] = {
    step: lambda z: sympy.Heaviside(z, 0),
    cem.relu: lambda z: sympy.Max(z, 0),
    cem.relu_antiderivative: lambda z: sympy.Max(z, 0) ** 2 / 2,
    cem.gelu: lambda z: z * _normal_cdf(z),
    cem.gelu_antiderivative: lambda z: ((z**2 - 1) * _normal_cdf(z) + z * _normal_pdf(z)) / 2,
    cem.sigmoid: lambda z: 1 / (1 + exp(-z)),
    cem.softplus: lambda z: log(1 + exp(z)),
    cem.softplus_antiderivative: lambda z: -Dilogarithm(-exp(z)),
    cem.silu: lambda z: z / (1 + exp(-z)),
    cem.silu_antiderivative: lambda z: z * log(1 + exp(z)) + Dilogarithm(-exp(z)),
}
"""The words of the language that SymPy lacks, in functions that it has."""


def written_out(expression: Expr, values: dict[str, np.ndarray], sizes: dict[Symbol, int]) -> Expr:
    """An expression at concrete sizes, every sum as its terms.

    Args:
        expression: an energy, without free indices.
        values: SymPy entries of every tensor by name; those of a scalar are an array without axes.
        sizes: the named sizes.

    >>> hidden, dim = cem.dims("hidden dim")
    >>> h, i = cem.state(dim), dim.index("i")
    >>> entries = np.array(sympy.symbols("h0:2"))
    >>> written_out(cem.logsumexp(h[i], i), {"h": entries}, {dim: 2})
    log(exp(h0) + exp(h1))
    """

    def visit(node: Expr, at: dict[Idx, Integer]) -> Expr:
        match node:
            case Idx():
                return at[node]
            case EntmaxConjugate():
                entries = (visit(node.body, here) for here in places([node.index], at))
                return SparseMaximum(node.args[2], *entries)
            case TokenPosition():
                return Integer(sizes[SEQ] - 1)
            case Indexed() if isinstance(node.base, ContextPosition):
                return at[node.indices[0]]
            case Rope():
                return turned(node, at)
            case Lookup():
                body, idx, number = node.args
                last = size_of(idx).xreplace(sizes) - 1
                place = min(max(sympy.floor(visit(number, at)), Integer(0)), last)
                return visit(body, {**at, idx: place})
            case cem.only():
                return Integer(0) if visit(node.args[0], at) > 0 else -sympy.oo
            case Indexed():
                return values[str(node.base.name)][
                    tuple(int(visit(slot, at)) for slot in node.indices)
                ]
            case Sum():
                return Add(*(visit(node.function, here) for here in places(node.variables, at)))
            case LogSumExp():
                return log(Add(*(exp(visit(node.body, here)) for here in places([node.index], at))))
            case Decay():
                later = range(int(at[node.index]) + 1, Integer(size_of(node.index).xreplace(sizes)))
                gates = (visit(node.body, {**at, node.index: Integer(u)}) for u in later)
                return exp(Add(*gates))
            case Symbol():
                return Integer(sizes[node]) if node in sizes else values[node.name].item()
        args = [visit(arg, at) for arg in node.args]
        return ELEMENTARY.get(node.func, node.func)(*args) if args else node

    def turned(node: Rope, at: dict[Idx, Integer]) -> Expr:
        size = int(size_of(node.index).xreplace(sizes))
        place, count = int(at[node.index]), size * node.args[4] / 2
        if place >= 2 * count:
            return visit(node.body, at)
        pair, second = divmod(place, 2) if node.interleaved else divmod(place, count)[::-1]
        other = place + (1 - 2 * second) * (1 if node.interleaved else count)
        angle = visit(node.position, at) * node.args[3] ** (-pair / count)
        across = visit(node.body, {**at, node.index: Integer(other)})
        return visit(node.body, at) * sympy.cos(angle) + (2 * second - 1) * across * sympy.sin(
            angle
        )

    def places(indices: list[Idx], at: dict[Idx, Integer]):
        ranges = [range(Integer(size_of(idx).xreplace(sizes))) for idx in indices]
        for numbers in itertools.product(*ranges):
            yield {**at, **dict(zip(indices, map(Integer, numbers), strict=True))}

    return visit(expression, {})


def _rationals(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Entries n/8 with 0 < |n| < 12: exact in float64."""
    entries = generator.integers(1, 12, shape) * generator.choice([-1, 1], shape)
    return np.vectorize(lambda n: Rational(int(n), 8), otypes=[object])(entries)


def assert_gradient_matches_sympy(
    energy: cem.Energy, *, points: int = 2, seed: int = 0, **sizes: int
) -> None:
    """``energy.gradient`` is SymPy's own ``diff`` of the energy written out at the given sizes.

    Compared at random rational points; SymPy's side is exact until it is rounded to 30 digits.
    ``AssertionError`` says by how much the two differ.
    """
    dims = {cem.Dim(name): size for name, size in sizes.items()}
    state, frozen = str(energy.state.name), str(cem.frozen(energy.state).name)
    tensors = [energy.state, *energy.parameters]
    tensors += [energy.context] if energy.context is not None else []
    generator = np.random.default_rng(seed)
    for _ in range(points):
        values = {
            str(base.name): _rationals(
                generator,
                tuple(int(sympy.sympify(size, strict=True).subs(dims)) for size in base.shape),
            )
            for base in tensors
        }
        values |= {scalar.name: np.array(Rational(3, 4), dtype=object) for scalar in energy.scalars}
        moving = np.array(sympy.symbols(f"h0:{len(values[state])}"), dtype=object)
        point = dict(zip(moving, values[state], strict=True))
        # The frozen state has the value of the state and does not move.
        entries = {**values, state: moving, frozen: values[state]}
        energy_here = written_out(energy.expression, entries, dims)
        expected = [float(energy_here.diff(z).evalf(30, subs=point)) for z in moving]

        numbers = {name: torch.tensor(entry.astype(float)) for name, entry in values.items()}
        numbers[frozen] = numbers[state]
        if energy.has_positions:
            places = torch.arange(sizes["seq"], dtype=torch.float64)
            numbers |= {"position": places[-1], "context_position": places}
        gradient = Evaluator(numbers, dims)(energy.gradient, (output_index(energy.width),))
        _assert_close(gradient, torch.tensor(expected, dtype=torch.float64), energy.name)


def assert_layer_matches(
    layer: cem.EnergyLayer,
    closed_form: Callable[..., Tensor],
    h: Tensor,
    *,
    context: Tensor | None = None,
) -> None:
    """A layer in float64 equals its closed form, and so do the gradients for all of its inputs.

    ``closed_form`` is called with h, with the context if one is given, and the parameters by name.
    """
    parameters = dict(layer.named_parameters())
    name = layer.energy_function.name
    inputs = {"h": h.clone().requires_grad_()}
    if context is not None:
        inputs["context"] = context.clone().requires_grad_()
    sources = [*inputs.values(), *parameters.values()]
    derived = layer(**inputs)
    by_hand = closed_form(*inputs.values(), **parameters)
    _assert_close(derived, by_hand, f"layer of {name}")
    weights = torch.linspace(-1.0, 1.0, h.numel(), dtype=h.dtype).view_as(h)
    pairs = [
        torch.autograd.grad((output * weights).sum(), sources) for output in (derived, by_hand)
    ]
    for source, ours, theirs in zip([*inputs, *parameters], *pairs, strict=True):
        _assert_close(ours, theirs, f"gradient of the layer of {name} for `{source}`")


def _assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = float(expected.detach().abs().max()) or 1.0
    error = float((found - expected).detach().abs().max()) / scale
    assert error <= TOLERANCE, (
        f"{what}: relative error {error:.1e}, at most {TOLERANCE:.0e} was expected"
    )
