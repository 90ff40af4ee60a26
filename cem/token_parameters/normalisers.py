"""What turns a row of scores into the weights of the values.

Tied tokens have gains c, and every sum over tokens counts token j as c_j of them: the norm is
sqrt(sum_j |c_j| a_j^2), the partition function sum_j |c_j| exp(a_j). A token of gain 0 is not there, and a
token may be split into two whose gains add up to its own.

Legend: a the scores, (..., N) for N parameter tokens; s the scale, a number; f the activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..language.words import WORDS, Word, antiderivative, word_of

TINY = 1e-15
"""A row whose norm is not above this counts as zeros."""

CLAMP = 60.0
"""The largest logarithm of a weight under gains; tokens with gains above exp(-60) cannot reach it."""

NAMES = ("gelu", "gelu_tanh", "relu", "silu", "tanh", "softplus", "sigmoid")
ACTIVATIONS: dict[str, Word] = {word.name: word for word in WORDS if word.name in NAMES}


class _Normalised(torch.autograd.Function):
    """z = r a and r = s / |a|, whose derivatives are written in z and r, so that nothing else is kept.

    The Jacobian of z is symmetric: forwards and backwards are the same map.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        r = (s / norm_of(a)).to(a.dtype)
        return a * r, r

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        kept = (*output, inputs[1])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx, da: Tensor, ds: None) -> tuple[Tensor, Tensor]:
        z, r, s = ctx.saved_tensors
        along = -r / s.square() * (z * da).sum(-1, keepdim=True)
        return da * r + along * z, along * r

    @staticmethod
    def backward(ctx, dz: Tensor | None, dr: Tensor | None) -> tuple[Tensor | None, None]:
        z, r, s = ctx.saved_tensors
        along = 0.0 if dr is None else dr * r
        if dz is None:
            return -r / s.square() * along * z, None
        along = -r / s.square() * (along + (z * dz).sum(-1, keepdim=True))
        return torch.addcmul(dz * r, along.to(z.dtype), z), None


def norm_of(a: Tensor, gain: Tensor | None = None, eps: float | None = None) -> Tensor:
    """The norm of every row, (..., 1); infinite for a row of zeros, which it divides into zeros.

    The derivative of that quotient is zero as well. With ``eps`` it is the norm plus ``eps``.
    """
    if gain is None:
        norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        norm = norm if eps is not None else norm.where(norm > TINY, math.inf)
    else:
        squares = a.square() @ gain.abs().unsqueeze(-1)
        norm = squares.where(squares > TINY**2, math.inf).sqrt()
    return norm if eps is None else norm + eps


def normalised(a: Tensor, s: Tensor, gain: Tensor | None, eps: float | None) -> Tensor:
    """s a / |a|, row by row."""
    # Dynamo refuses functions with a `jvp` (torch 2.13), and fuses what is below anyway.
    if gain is None and eps is None and not torch.compiler.is_compiling():
        return _Normalised.apply(a, s)[0]
    return a * (s / norm_of(a, gain, eps)).to(a.dtype)


def log_partition(a: Tensor, gain: Tensor) -> Tensor:
    """log sum_j |c_j| exp(a_j), (..., 1), without overflow."""
    top = a.detach().masked_fill(gain == 0, -math.inf).amax(-1, keepdim=True)
    return top + ((a - top).clamp(max=CLAMP).exp() @ gain.abs().unsqueeze(-1)).log()


def primitive(word: Word, z: Tensor) -> Tensor:
    """The antiderivative of an activation that is 0 at 0; ``ValueError`` where the language has none."""
    F = word_of(antiderivative(word.function)).torch
    return F(z) - F(z.new_zeros(()))


def _norm_first(a: Tensor, s: Tensor, f: Word, gain: Tensor | None, eps: float | None) -> Tensor:
    return f.torch(normalised(a, s, gain, eps))


def _norm_last(a: Tensor, s: Tensor, f: Word, gain: Tensor | None, eps: float | None) -> Tensor:
    return normalised(f.torch(a), s, gain, eps)


def _softmax(a: Tensor, s: Tensor, f: Word, gain: Tensor | None, eps: float | None) -> Tensor:
    if gain is None:
        return s * a.softmax(-1)
    return s * (a - log_partition(a, gain)).clamp(max=CLAMP).exp()


def _none(a: Tensor, s: Tensor, f: Word, gain: Tensor | None, eps: float | None) -> Tensor:
    return s * f.torch(a)


def _consistent(a: Tensor, s: Tensor, f: Word, gain: Tensor | None, eps: float | None) -> Tensor:
    u = a / norm_of(a, gain)
    w = f.torch(s * u)
    lift = primitive(f, s * u) / s - u * w
    if gain is None:
        return w + u * lift.sum(-1, keepdim=True)
    return w + gain.sign() * u * (lift @ gain.unsqueeze(-1))


@dataclass(frozen=True)
class Normaliser:
    """A row of the table.

    Attributes:
        weights: (a, scale, activation, gain or None, eps or None) -> w, (..., N).
        power: the scale of N tokens is N to this power, so that weights are of size 1.
        vanishes: whether tokens that all score 0 leave every other weight alone, at a fixed scale.
        has_norm: whether ``eps`` has a meaning.
    """

    weights: Callable[[Tensor, Tensor, Word, Tensor | None, float | None], Tensor]
    power: float
    vanishes: bool = True
    has_norm: bool = False


NORMALISERS = {
    "l2_norm_gelu": Normaliser(_norm_first, 0.5, has_norm=True),
    "gelu_l2_norm": Normaliser(_norm_last, 0.5, has_norm=True),
    "softmax": Normaliser(_softmax, 1.0, vanishes=False),
    "none": Normaliser(_none, 0.0),
    "energy_consistent": Normaliser(_consistent, 0.5),
}
