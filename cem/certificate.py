"""What is guaranteed about the descent of a layer: a verdict, and the theorems behind it.

A certificate speaks of the energy of each token at the context and the frozen values that a step
saw, in exact arithmetic. Here g = dE/dh (behind a norm: dE/dN at N(h)), P is the preconditioner,
eta >= 0 the step size, and E is differentiable or, at a kink of a concave E, g is a supergradient.

Theorem 1 (concave). For a concave E and P >= 0, every step h+ = h - eta P g has
    E(h+) <= E(h) - eta g.Pg.
Proof. A concave function lies below its tangent: E(h+) <= E(h) + g.(h+ - h), and
h+ - h = -eta P g. Nothing else is used, so eta is free.

Theorem 2 (bounded curvature). If no eigenvalue of d2E/dh2 is above L anywhere and P >= 0 has no
eigenvalue above p, every step with eta <= 2 / (L p) descends.
Proof. Along the step, E(h+) <= E(h) - eta g.Pg + (L/2) eta^2 |Pg|^2 by Taylor's formula. As
|Pg|^2 <= p g.Pg, the change is at most -eta (1 - eta L p / 2) g.Pg, which is not positive.

Theorem 3 (a norm in front). Let N be the gradient of a convex function with Lipschitz constant l,
P = p I with p >= 0, and h+ = h - eta p g with g = dE/dN at N(h). For a concave E every step
descends: E(N(h+)) <= E(N(h)). If no eigenvalue of d2E/dN2 is above L, every step with
eta <= 2 / (L p l) descends.
Proof. Write d = h+ - h and v = N(h+) - N(h). The gradient of a convex function is monotone and
co-coercive (Baillon and Haddad, 1977): v.d >= |v|^2 / l >= 0. With g = -d / (eta p),
E(N(h+)) - E(N(h)) <= g.v + (L/2) |v|^2 <= -(1 / (eta p l) - L/2) |v|^2; for L = 0 use v.d >= 0.

Lemma. RMSNorm and LayerNorm without a gain, or with one equal gain c >= 0 and any bias, are such.
Proof. h / sqrt(|h|^2/D + e) is the gradient of D sqrt(|h|^2/D + e), and with the centring
projection C, C h / sqrt(|Ch|^2/D + e) is that of D sqrt(|Ch|^2/D + e). Both functions are norms of
a linear map of (h, 1), hence convex, and their Hessians are at most 1/sqrt(e). With unequal gains
c the map is diag(c) N, whose Jacobian is not symmetric, and even a small step may climb; so may
one with a P that is not scalar, since a product J P of positive matrices need not be positive.

Theorem 4 (proximal). For R convex, P = I and h+ = prox_{eta R}(h - eta g), F = E + R obeys
F(h+) <= F(h) - (1/eta - L/2) |h+ - h|^2 where no eigenvalue of d2E/dh2 is above L: every eta
descends for a concave E (L = 0), and otherwise every eta <= 2/L. E alone may rise.
Proof. (h - h+)/eta - g is a subgradient of R at h+, so R(h+) <= R(h) - |h+ - h|^2/eta
- g.(h+ - h); add E(h+) <= E(h) + g.(h+ - h) + (L/2) |h+ - h|^2. For any R the minimum property
of prox still gives F(h+) <= F(h) - (1/(2 eta) - L/2) |h+ - h|^2.

Theorem 5 (Newton). Let d be what conjugate gradients, started at 0, make of A d = g for a positive
definite A, after any number of steps >= 1. Then g.d > 0 for g != 0, so for a concave E every step
h+ = h - eta d descends.
Proof. Iterates minimise d.Ad/2 - g.d over Krylov spaces that contain 0 and g; the minimum is
negative, so g.d > d.Ad/2 >= 0. A concave function lies below its tangent.

Theorem 6 (line search). A step that is accepted only where E(h+) <= E(h) - c eta g.Pg, and is zero
otherwise, descends for every energy and every P >= 0.
Proof. Both cases are E(h+) <= E(h).

The first step of momentum and of Nesterov, from rest, is a gradient step; of later ones nothing is
promised: a heavy ball rolls uphill. Nothing is promised either where the context moves with the
states (also for the total energy of all tokens, which is not concave in all of them together), or
where the energy is a callable without an expression. There the descent is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .calculus.curvature import Reason, explain
from .calculus.smoothness import Term, smoothness
from .language.symbols import Frozen

ANY = "any step size"
BOUNDED = "bounded step size"
MEASURED = "measured only"


@dataclass(frozen=True)
class Certificate:
    """What is guaranteed about the descent of one layer, for its present parameters.

    Attributes:
        verdict: ``"any step size"``, ``"bounded step size"`` or ``"measured only"``.
        bound: the largest step size that is safe, in units of the state per unit of gradient; inf for any, None
            where nothing is promised.
        holds: whether the layer's own step sizes are safe: no step can raise the energy of a token, or with a proximal
            rule the energy plus the function of its prox.
        statement: the same in sentences: energy, curvature, preconditioner, norm, promise, recursion.
        reasons: the steps that prove the curvature of the energy, or the bounds of its terms.

    >>> import cem
    >>> from cem.energies import interaction, memory
    >>> cem.derive(interaction, dim=16, heads=2, rank=8).certificate.verdict
    'any step size'
    >>> found = cem.derive(memory, dim=16, hidden=24).certificate
    >>> found.verdict, round(found.bound, 6), found.holds
    ('bounded step size', 2.0, True)
    """

    verdict: str
    bound: float | None
    holds: bool
    statement: str
    reasons: tuple[Reason | Term, ...]

    def __str__(self) -> str:
        return self.statement


def certify(layer) -> Certificate:
    """The certificate of a layer; see the docstring of this module for the theorems.

    ``layer`` says of itself what an :class:`~cem.EnergyLayer` does: ``energy_function``, ``update``,
    ``preconditioner``, ``norm``, ``steps``, ``refresh``, ``sizes``, ``scalars`` and its parameters.
    """
    energy = layer.energy_function
    if any(tensor.is_meta for tensor in layer.parameters()):
        told = "The parameters have no values, so nothing is promised."
        return Certificate(MEASURED, None, False, told, ())
    curved, about_energy, reasons = _curvature(layer)
    slope, about_norm = _norm(layer.norm)
    stretch, scalar, about_preconditioner = _preconditioner(layer.preconditioner)
    normed = not isinstance(layer.norm, nn.Identity)
    said = [about_energy, about_preconditioner, about_norm]
    total = _product(curved, stretch, slope)
    bound, holds = None, False
    if getattr(layer, "joint", False):
        said.append("Every state moves in the total energy of all tokens, of which no rule speaks.")
    elif getattr(layer, "moving", False):
        said.append(
            "The context moves with the states, and an energy may rise when its context does."
        )
    elif layer.update.searches:
        bound, holds = math.inf, True
        said.append(
            "A step is taken only as long as makes the energy fall, and none where none does."
        )
    elif total is None:
        said.append(_limit(stretch, slope, normed, scalar))
    elif normed and not scalar:
        said.append(
            "Behind a norm even a small step may climb unless P is a multiple of the identity."
        )
    else:
        promise = layer.update.promise(total, steps=layer.steps, scalar=scalar, normed=normed)
        bound, holds = promise.bound, promise.holds
        said.append(promise.statement)
    verdict = MEASURED if bound is None else ANY if math.isinf(bound) else BOUNDED
    if bound is None:
        said.append("Whether the layer descends is measured, for instance by `cem.trace`.")
    elif energy.context is not None:
        said.append(
            "The energies before and after are those at the context that the step saw; at the context after all"
            " tokens have moved nothing is promised."
        )
    if layer.steps > 1:
        said.append(_recursion(layer))
    return Certificate(verdict, bound, holds, " ".join(filter(None, said)), tuple(reasons))


def _product(curved: float, stretch: float | None, slope: float | None) -> float | None:
    """The largest curvature that a step can meet, or None where it is not known."""
    if stretch is None or slope is None or math.isinf(curved):
        return None
    if curved == 0.0:
        return 0.0
    found = curved * stretch * slope
    return found if math.isfinite(found) else None


def _limit(stretch: float | None, slope: float | None, normed: bool, scalar: bool) -> str:
    """What is left where no step size is promised: the limit of small steps."""
    told = "So no step size is promised to descend"
    if stretch is None or slope is None or (normed and not scalar):
        return f"{told}."
    rate = "-g.JPg <= 0, with J the Jacobian of the norm" if normed else "-g.Pg <= 0"
    return f"{told}; in the limit of small steps the energy does not rise, since dE/dt = {rate}."


def _curvature(layer) -> tuple[float, str, list[Reason] | tuple[Term, ...]]:
    """The largest eigenvalue that the Hessian can have, in words, and why."""
    energy = layer.energy_function
    name = f"the energy `{energy.name}`"
    if energy.expression is None:
        told = f"Of {name}, a torch callable that could not be translated, no curvature is known."
        return math.inf, told, ()
    what = "in the state" if isinstance(layer.norm, nn.Identity) else "in the state after the norm"
    gates = bool(energy.expression.atoms(Frozen))
    fixed = ["a fixed context"] * (energy.context is not None) + ["fixed gates"] * gates
    what += f" at {' and '.join(fixed)}" if fixed else ""
    if energy.curvature in ("concave", "affine"):
        told = f"For all parameters {name} is {energy.curvature} {what}."
        return 0.0, told, explain(energy.expression)
    values = {str(p.name): getattr(layer, str(p.name)) for p in energy.parameters}
    sizes = {size: layer.sizes[str(size)] for size in energy.dims}
    found = smoothness(energy.expression, {**layer.scalars, **values}, sizes)
    if math.isinf(found.largest):
        told = f"No rule bounds the Hessian of {name} {what} from above"
        told += "; it is convex." if energy.curvature == "convex" else "."
    elif found.largest:
        told = (
            f"For the present parameters the Hessian of {name} {what} has no eigenvalue above"
            f" {found.largest:.4g}."
        )
    else:
        told = f"For the present parameters {name} is concave {what}."
    return found.largest, told, found.terms


def _preconditioner(module: nn.Module | None) -> tuple[float | None, bool, str]:
    """The largest eigenvalue of P, None unless P >= 0; whether P is scalar; and in words."""
    if module is None:
        return 1.0, True, ""
    name = f"The preconditioner `{type(module).__name__}`"
    if not getattr(module, "definite", False):
        told = f"{name} is not positive semi-definite by construction, so a step may point uphill."
        return None, False, told
    largest = module.largest_eigenvalue()
    if not math.isfinite(largest):
        return None, False, f"{name} is not finite."
    told = f"{name} is positive semi-definite, with eigenvalues of at most {largest:.4g}."
    return largest, module.scalar, told


def _norm(norm: nn.Module) -> tuple[float | None, str]:
    """The Lipschitz constant of a norm that is the gradient of a convex function, else None."""
    if isinstance(norm, nn.Identity):
        return 1.0, ""
    name = f"The norm in front, `{type(norm).__name__}`,"
    if type(norm) not in (nn.RMSNorm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
        told = f"{name} is not known to be the gradient of a convex function: even a small step may climb."
        return None, told
    gain = torch.ones(1) if norm.weight is None else norm.weight.detach()
    if not (gain == gain[0]).all() or not gain[0] >= 0.0:
        told = (
            f"{name} has a gain that differs between coordinates or is negative, so it is not the gradient of a"
            " convex function: even a small step may climb."
        )
        return None, told
    eps = torch.finfo(torch.float64).eps if norm.eps is None else norm.eps
    told = f"{name} is the gradient of a convex function, so it is monotone."
    return (float(gain[0]) / math.sqrt(eps) if eps > 0 else math.inf), told


def _recursion(layer) -> str:
    expression = layer.energy_function.expression
    if expression is not None and expression.atoms(Frozen) and layer.refresh == "step":
        return (
            f"Each of the {layer.steps} steps speaks of the energy with the gates of its own start: there is no"
            " common energy that all of them descend."
        )
    return f"All {layer.steps} steps speak of the same energy."
