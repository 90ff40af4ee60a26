"""The smooth maximum whose weights are sparse, and the weights: sparsemax and 1.5-entmax."""

from __future__ import annotations

import torch
from sympy import Expr, Idx, Integer, Rational
from torch import Tensor

from .conversion import as_expression
from .reductions import SmoothMaximum, Weights

ALPHAS = (Rational(3, 2), Integer(2))


class EntmaxConjugate(SmoothMaximum):
    """max_p p.body + H(p) over weights p of the index, H the Tsallis entropy: ``args = (body, index, alpha)``."""

    @property
    def weights(self) -> Expr:
        return Entmax(*self.args)

    def _latex(self, printer) -> str:
        body, idx, alpha = map(printer.doprint, self.args)
        return rf"\Psi_{{{alpha}, {idx}}}\left({body}\right)"


class Entmax(Weights):
    """The p of that maximum: ``args = (body, index, alpha)``; many of them are exactly zero."""

    def _latex(self, printer) -> str:
        body, idx, alpha = map(printer.doprint, self.args)
        return rf"\operatorname{{entmax}}^{{{alpha}}}_{{{idx}}}\left({body}\right)"


def entmax_conjugate(value, index, alpha: float = 2):
    """The largest of some scores, smoothed by the Tsallis entropy; its gradient are sparse weights.

        Psi(z) = max_p p.z + (sum_s p_s - p_s^alpha) / (alpha (alpha - 1)),    p >= 0, sum_s p_s = 1
        dPsi/dz = p = entmax(z) = max((alpha - 1) z - tau, 0)^(1 / (alpha - 1)),  tau so that they sum to 1

    At alpha = 1 it would be log-sum-exp and softmax. It is convex, it grows with every score, and it
    lies between the largest score and that plus (1 - S^(1-alpha)) / (alpha (alpha - 1)) of S scores.
    Over an empty visible set it is 0.

    Args:
        value: in the symbolic pen ``entmax_conjugate(expression, index)``, over that index; in the torch
            pen ``entmax_conjugate(tensor, dim)``, over that axis, which goes.
        alpha: 2 (sparsemax) or 1.5, whose weights are found exactly by sorting.

    Raises:
        ValueError: another alpha.
        TypeError: no index to reduce.

    Source: Martins and Astudillo, arXiv:1602.02068 (sparsemax); Peters, Niculae and Martins,
    arXiv:1905.05702, section 3 (entmax, whose H this is).

    >>> import cem, torch
    >>> z = torch.tensor([1.0, 0.5, -3.0], requires_grad=True)
    >>> torch.autograd.grad(cem.entmax_conjugate(z, 0), z)
    (tensor([0.7500, 0.2500, 0.0000]),)
    >>> dim = cem.dims("dim")
    >>> cem.entmax_conjugate(cem.state(dim)[dim.index("i")], dim.index("i"), 1.5)
    EntmaxConjugate(h[i], i, 3/2)
    """
    exact = next((known for known in ALPHAS if float(known) == alpha), None)
    if exact is None:
        raise ValueError(
            f"`entmax_conjugate` is exact for alpha 1.5 and 2: got {alpha}; type `alpha=2`, or"
            " `cem.logsumexp` for alpha = 1"
        )
    if isinstance(value, torch.fx.Proxy):
        arguments = (value, index, float(exact))
        return value.tracer.create_proxy("call_function", entmax_conjugate, arguments, {})
    if isinstance(value, Tensor):
        return sparse_maximum(value, index, float(exact))
    if not isinstance(index, Idx):
        raise TypeError(
            f"`entmax_conjugate` reduces an index: got {index!r} of type {type(index).__name__}; make one"
            ' with `dim.index("i")` or `x.index("s")`'
        )
    return EntmaxConjugate(as_expression(value), index, exact)


def sparse_weights(z: Tensor, dim: int, alpha: float) -> Tensor:
    """entmax along an axis; scores of minus infinity have no weight, and nothing has where all are."""
    return _roots(z, dim, alpha).pow(round(1 / (alpha - 1)))


def sparse_maximum(z: Tensor, dim: int, alpha: float) -> Tensor:
    """The conjugate along an axis; 0 where all scores are minus infinity."""
    roots, seen = _roots(z, dim, alpha), z > -torch.inf
    p = roots.pow(round(1 / (alpha - 1)))
    entropy = (1 - (p * roots).sum(dim)) / (alpha * (alpha - 1))
    return torch.where(seen.any(dim), (p * torch.where(seen, z, 0.0)).sum(dim) + entropy, 0.0)


def _roots(z: Tensor, dim: int, alpha: float) -> Tensor:
    """p^(alpha - 1) of the weights: max((alpha - 1) z - tau, 0).

    tau is bracketed until no digit is left; the support that it leaves gives it in a form that autograd follows.
    """
    seen, power = z > -torch.inf, round(1 / (alpha - 1))
    z = (alpha - 1) * torch.where(seen, z, 0.0)
    with torch.no_grad():
        high = z.masked_fill(~seen, -torch.inf).amax(dim, keepdim=True)
        low = high - 1
        for _ in range(70):
            middle = (low + high) / 2
            mass = torch.where(seen, z - middle, 0.0).clamp_min(0).pow(power)
            above = mass.sum(dim, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        support = seen & (z > (low + high) / 2)
        count = support.sum(dim, keepdim=True, dtype=z.dtype).clamp_min(1)
    mean = torch.where(support, z, 0.0).sum(dim, keepdim=True) / count
    spread = torch.where(support, z - mean, 0.0).square().sum(dim, keepdim=True)
    gap = 1 / count if alpha == 2 else ((1 - spread) / count).sqrt()
    return torch.where(support, z - mean + gap, 0.0)
