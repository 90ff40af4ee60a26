"""The checks that every energy should pass.

Legend: T tokens, D dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call

from ..calculus.gradient import output_index
from ..energy import Energy
from ..language.evaluation import Evaluator
from ..language.symbols import SEQ
from ..layer import EnergyLayer, derive
from .comparison import relative_error
from .reference import derivative, reference_of, values_of


@dataclass(frozen=True)
class EnergyReport:
    """What :func:`check_energy` measured: by check, a relative error or the slope of a remainder.

    The slope is infinite where the remainder is rounding, as it is for an energy linear in h.
    """

    energy: str
    kind: str
    kernels: tuple[str, ...]
    checks: Mapping[str, float]

    def __str__(self) -> str:
        lines = [f"energy `{self.energy}`: {self.kind} ({', '.join(self.kernels)})"]
        width = max(map(len, self.checks))
        lines += [f"  {name:<{width}}  {value:.3g}" for name, value in self.checks.items()]
        return "\n".join(lines)


def check_energy(
    energy: Energy, *, causal: bool = True, seed: int = 0, **sizes_and_scalars: float
) -> EnergyReport:
    """Check an energy and the layer that is derived from it, in float64.

    * ``gradient``: the symbolic dE/dh equals autograd's, to 1e-12;
    * ``taylor``: E(h + eps v) - E(h) - eps v.dE/dh falls with slope 2 in log-log, between 1.9 and
      2.1, at a fixed context;
    * ``gradcheck``: finite differences give the layer's derivatives for h and every parameter;
    * ``reference``: the layer equals :func:`reference_update`, as do its gradients, to 1e-12;
    * ``lowering``: it equals the layer with ``lowering="autograd"``, if it is fused;
    * ``causality``: the future changes no bit of the past (causal layers with a context).

    Small sizes that are all different find the most: ``dim=6, heads=2, rank=3``.

    Raises:
        AssertionError: a check failed; the message names it.
        ValueError: as :func:`cem.derive`.

    >>> import cem
    >>> from cem.energies import gated
    >>> report = cem.testing.check_energy(gated, dim=6, hidden=5)
    >>> report.kind, round(report.checks["taylor"], 1)
    ('fused', 2.0)
    """
    options = {"causal": causal, "dtype": torch.float64, **sizes_and_scalars}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = derive(energy, **options)
        slow = derive(energy, lowering="autograd", **options)
        for parameter in layer.parameters():
            # A diagonal starts at zero, where a wrong term would not show.
            fan = parameter.shape[-1] if parameter.dim() > 1 else 1
            torch.nn.init.normal_(parameter, std=fan**-0.5)
        slow.load_state_dict(layer.state_dict())
        h, v = torch.randn(2, 2, 5, layer.dim, dtype=torch.float64)
        inputs = {}
        if energy.context is not None:
            x = torch.randn(2, 5, layer.context_dim, dtype=torch.float64)
            inputs["context"] = h if layer.context_dim == layer.dim else x
        checks: dict[str, float] = {}
        if energy.expression is not None:
            checks["gradient"] = _check_gradient(layer, h[0], inputs)
        checks["taylor"] = _check_taylor(layer, h, v, inputs)
        _check_gradcheck(layer, h, inputs)
        truth = _with_gradients(lambda *z, **k: reference_of(layer, *z, **k), layer, h, inputs)
        found = _with_gradients(layer, layer, h, inputs)
        checks["reference"] = _check_equal("reference", energy.name, found, truth)
        if layer.lowering.kind == "fused":
            other = _with_gradients(slow, slow, h, inputs)
            checks["lowering"] = _check_equal("lowering", energy.name, found, other)
        if causal and energy.context is not None:
            _check_causality(layer, inputs["context"], h, v)
    return EnergyReport(energy.name, layer.lowering.kind, layer.lowering.kernels, checks)


def _fail(name: str, check: str, what: str) -> AssertionError:
    return AssertionError(f"energy `{name}` fails the check `{check}`: {what}")


def _check_gradient(layer: EnergyLayer, h: Tensor, inputs: Mapping[str, Tensor]) -> float:
    """The symbolic gradient against autograd, at a token that sees the whole first sequence."""
    energy, values = layer.energy_function, values_of(layer)
    tensors = {name: torch.as_tensor(value, dtype=h.dtype) for name, value in values.items()}
    tensors |= {str(energy.state.name): h[-1], f"{energy.state.name}bar": h[0]}
    x = None
    if energy.context is not None:
        tensors[str(energy.context.name)] = x = inputs["context"][0]
    if energy.has_positions:
        places = torch.arange(len(h) if x is None else len(x)).to(h)
        tensors |= {"position": places[-1], "context_position": places}
    evaluate = Evaluator(tensors, {**layer._sizes, SEQ: len(h)})
    with torch.no_grad():
        symbolic = evaluate(energy.gradient, (output_index(energy.width),))
        automatic = derivative(lambda z: energy(z, x, frozen=h[0], **values), h[-1])
    return _check_equal("gradient", energy.name, {"dE/dh": symbolic}, {"dE/dh": automatic})


def _check_taylor(layer: EnergyLayer, h: Tensor, v: Tensor, inputs: Mapping[str, Tensor]) -> float:
    """The slope of the Taylor remainder of the energy along v; context and gates stay at h."""

    def energies(eps: float) -> Tensor:
        return layer.energy(h + eps * v, frozen=h, **inputs)

    with torch.no_grad():
        start = energies(0.0)
        first = ((h - layer(h, **inputs)) * v).sum(-1)
        steps = [2.0**-n for n in range(4, 13)]
        remainders = [float((energies(eps) - start - eps * first).abs().sum()) for eps in steps]
        scale = float(start.abs().sum() + first.abs().sum())
    # Below this the remainder is rounding; 1e3 leaves three digits to measure a slope with.
    known = [r for r in remainders if not r <= 1e3 * torch.finfo(h.dtype).eps * scale]
    if len(known) < 3:
        return math.inf
    slopes = sorted(math.log2(a / b) for a, b in zip(known, known[1:], strict=False))
    slope = slopes[len(slopes) // 2]
    if not 1.9 <= slope <= 2.1:
        what = (
            f"the remainder of first order falls with slope {slope:.3g}, not 2: dE/dh is not the"
            " gradient of the energy at a fixed context, or the energy is not smooth"
        )
        raise _fail(layer.energy_function.name, "taylor", what)
    return slope


def _check_gradcheck(layer: EnergyLayer, h: Tensor, inputs: Mapping[str, Tensor]) -> None:
    names = [name for name, _ in layer.named_parameters()]

    def update(h: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (h,), inputs)

    points = [z.detach().clone().requires_grad_() for z in (h, *layer.parameters())]
    try:
        torch.autograd.gradcheck(update, points, fast_mode=True)
    except GradcheckError as error:
        what = " ".join(str(error).split())[:300]
        raise _fail(layer.energy_function.name, "gradcheck", what) from None


def _with_gradients(
    function: Callable, layer: EnergyLayer, h: Tensor, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The output, and the gradients of one weighted sum of it for all inputs and parameters."""
    points = {"h": h, **inputs}
    points = {name: z.detach().clone().requires_grad_() for name, z in points.items()}
    out = function(**points)
    points |= dict(layer.named_parameters())
    weights = torch.linspace(0.0, 9.0, out.numel(), dtype=out.dtype).cos().reshape(out.shape)
    found = torch.autograd.grad((out * weights).sum(), list(points.values()), allow_unused=True)
    named = zip(points.items(), found, strict=True)
    return {"output": out} | {
        f"gradient for {name}": torch.zeros_like(z) if g is None else g for (name, z), g in named
    }


def _check_equal(check: str, name: str, found: Mapping, truth: Mapping) -> float:
    worst = 0.0
    for what, tensor in found.items():
        error = relative_error(tensor, truth[what])
        if not error <= 1e-12:
            raise _fail(name, check, f"the {what} is off by {error:.3g}, more than 1e-12")
        worst = max(worst, error)
    return worst


def _check_causality(layer: EnergyLayer, x: Tensor, h: Tensor, v: Tensor) -> None:
    t = h.shape[1] // 2
    h, x = h.clone().requires_grad_(), x.clone().requires_grad_()
    later = torch.cat([x[:, :t], x[:, t:].cos()], dim=1)
    past = layer(h, context=x)[:, :t]
    changed = float((layer(h, context=later)[:, :t] - past).detach().abs().max())
    slopes = torch.autograd.grad((past * v[:, :t]).sum(), [h, x])
    leak = max(float(slope[:, t:].abs().max()) for slope in slopes)
    if changed or leak:
        what = f"the future moves the past by {changed:.3g}; the derivative is {leak:.3g}"
        raise _fail(layer.energy_function.name, "causality", what)
