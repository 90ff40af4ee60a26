"""Which layers of token-parameter attention are steps down an energy, and which energy that is.

Legend: h the state, (..., D); K (N, D) keys and c (N,) gains of tied tokens; a = K h, and with a bar what is
read at the frozen state; s the scale; F the antiderivative of the activation f, F(0) = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from .normalisers import ACTIVATIONS, log_partition, norm_of, primitive

if TYPE_CHECKING:
    from .attention import TokenParameterAttention

Function = Callable[["TokenParameterAttention", Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Potential:
    """Whether the output of a layer is -dE/dh for an energy E.

    Attributes:
        label: ``"exact"``: E depends on the state alone. ``"frozen-context"``: on the state and on one number for
            each token, read at the frozen state, as a context is. ``"none"``.
        reason: one sentence.
        formula: E as text; empty without one.
        layer: the layer.
    """

    label: str
    reason: str
    formula: str
    layer: TokenParameterAttention
    function: Function | None = None

    def energy(self, h: Tensor, *, frozen: Tensor | None = None) -> Tensor:
        """E of every state, (...,), lower is better; ``frozen`` is where the context is read, h itself if None.

        Raises:
            ValueError: a layer without a potential, or an activation whose antiderivative is not a word.
        """
        if self.function is None:
            raise ValueError(f"this layer descends no energy: {self.reason}; type `tie=True`")
        scores = (functional.linear(z, self.layer.K) for z in (h, h if frozen is None else frozen))
        return self.function(self.layer, *scores)

    def __str__(self) -> str:
        return f"{self.label}: {self.reason}"


def potential(layer: TokenParameterAttention) -> Potential:
    """The energy that a layer descends, from its normaliser, its tie, its activation and the signs of its gains.

    >>> from cem.token_parameters import TokenParameterAttention, potential
    >>> layer = TokenParameterAttention(8, 8, tokens=32, normaliser="gelu_l2_norm", activation="relu", tie=True)
    >>> found = potential(layer)
    >>> found.label, found.formula
    ('exact', 'E = -s sqrt(sum_j c_j relu(a_j)^2)')
    """
    if not layer.tie:
        reason = "the values are not tied to the keys, so the Jacobian is not symmetric"
        return Potential("none", reason, "", layer)
    row = TABLE[layer.normaliser]
    if layer.normaliser == "gelu_l2_norm" and layer.activation == "relu":
        row = RELU_NORM
    if row.signs and (layer.gain < 0).any():
        row = OF_BOTH_SIGNS[layer.normaliser]
    return Potential(row.label, row.reason, row.formula, layer, row.function)


@dataclass(frozen=True)
class _Row:
    """``signs``: whether the label needs gains that are not negative."""

    label: str
    reason: str
    formula: str
    function: Function
    signs: bool = False


def _element_wise(layer: TokenParameterAttention, a: Tensor, frozen: Tensor) -> Tensor:
    return -layer.scale * (primitive(ACTIVATIONS[layer.activation], a) @ layer.gain)


def _partition(layer: TokenParameterAttention, a: Tensor, frozen: Tensor) -> Tensor:
    return -layer.scale * log_partition(a, layer.gain).squeeze(-1)


def _frozen_partition(layer: TokenParameterAttention, a: Tensor, frozen: Tensor) -> Tensor:
    return -layer.scale * ((a - log_partition(frozen, layer.gain)).exp() @ layer.gain)


def _frozen_temperature(layer: TokenParameterAttention, a: Tensor, frozen: Tensor) -> Tensor:
    norm = norm_of(frozen, layer.gain, layer.additive_eps)
    beta = layer.scale / norm.where(norm.isfinite(), 1.0)
    return -(primitive(ACTIVATIONS[layer.activation], beta * a) @ layer.gain) / beta.squeeze(-1)


def _moving_temperature(layer: TokenParameterAttention, a: Tensor, frozen: Tensor) -> Tensor:
    return _frozen_temperature(layer, a, a)


def _frozen_norm(layer: TokenParameterAttention, a: Tensor, frozen: Tensor) -> Tensor:
    word = ACTIVATIONS[layer.activation]
    norm = norm_of(word.torch(frozen), layer.gain, layer.additive_eps).squeeze(-1)
    return -layer.scale / norm * (primitive(word, a) @ layer.gain)


def _relu_norm(layer: TokenParameterAttention, a: Tensor, frozen: Tensor) -> Tensor:
    norm, eps = (a.relu().square() @ layer.gain).sqrt(), layer.additive_eps
    return -layer.scale * (norm - eps * (1 + norm / eps).log() if eps else norm)


TABLE = {
    "none": _Row(
        "exact",
        "each token adds the force of its own energy, c_j F(a_j)",
        "E = -s sum_j c_j F(a_j)",
        _element_wise,
    ),
    "softmax": _Row(
        "exact",
        "the softmax is the gradient of a log-sum-exp in which token j counts c_j times",
        "E = -s log sum_j c_j exp(a_j)",
        _partition,
        signs=True,
    ),
    "l2_norm_gelu": _Row(
        "frozen-context",
        "the norm of the scores moves with the state, and held fixed it is a temperature",
        "E = -(r/s) sum_j c_j F(s a_j / r),  r = sqrt(sum_j |c_j| abar_j^2)",
        _frozen_temperature,
    ),
    "gelu_l2_norm": _Row(
        "frozen-context",
        "the norm of the activations moves with the state, and held fixed it is a step size",
        "E = -(s/r) sum_j c_j F(a_j),  r = sqrt(sum_j |c_j| f(abar_j)^2)",
        _frozen_norm,
    ),
    "energy_consistent": _Row(
        "exact",
        "the step is the gradient with the temperature moving along",
        "E = -(r/s) sum_j c_j F(s a_j / r),  r = sqrt(sum_j |c_j| a_j^2)",
        _moving_temperature,
    ),
}
RELU_NORM = _Row(
    "exact",
    "relu' relu = relu, so the step is the gradient of a norm",
    "E = -s sqrt(sum_j c_j relu(a_j)^2)",
    _relu_norm,
    signs=True,
)
OF_BOTH_SIGNS = {
    "softmax": _Row(
        "frozen-context",
        "gains are negative, and the partition function counts their size; it must be held fixed",
        "E = -(s/Z) sum_j c_j exp(a_j),  Z = sum_j |c_j| exp(abar_j)",
        _frozen_partition,
    ),
    "gelu_l2_norm": TABLE["gelu_l2_norm"],
}
