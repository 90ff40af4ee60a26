"""CEM: write an energy, get the layer that descends it."""

from . import prox
from ._version import __version__
from .certificate import Certificate
from .derivation import Derivation
from .energy import Energy, energy
from .fixed_point import FixedPoint
from .growth import Growth, grow, warm_restart
from .language.entmax import entmax_conjugate
from .language.positions import alibi_slopes, lookup, position, rope, t5_bucket
from .language.reductions import logsumexp
from .language.symbols import Dim, context, dims, frozen, index, parameter, scalar, state
from .language.tokens import decay
from .language.words import (
    antiderivative,
    floor,
    gelu,
    gelu_antiderivative,
    gelu_tanh,
    indicator,
    log_cosh,
    normal_cdf,
    normal_pdf,
    only,
    relu,
    relu_antiderivative,
    sigmoid,
    silu,
    silu_antiderivative,
    softplus,
    softplus_antiderivative,
    step,
)
from .layer import EnergyLayer, derive
from .line_search import LineSearch
from .lowering import LoweringError
from .newton import Newton
from .preconditioner import (
    AbstractPreconditioner,
    BlockDiagonal,
    Diagonal,
    DiagonalPlusLowRank,
    NormJacobian,
    ScaledIdentity,
)
from .routing import Adapter, Routed, soft_top_k, soft_top_k_sum
from .trace import EnergyTrace, LayerTrace, trace
from .update import AbstractUpdate, GradientDescent, Momentum, Nesterov, Proximal

__all__ = [
    "AbstractPreconditioner",
    "AbstractUpdate",
    "Adapter",
    "BlockDiagonal",
    "Certificate",
    "Derivation",
    "Diagonal",
    "DiagonalPlusLowRank",
    "Dim",
    "Energy",
    "EnergyLayer",
    "EnergyTrace",
    "FixedPoint",
    "GradientDescent",
    "Growth",
    "LayerTrace",
    "LineSearch",
    "LoweringError",
    "Momentum",
    "Nesterov",
    "Newton",
    "NormJacobian",
    "Proximal",
    "Routed",
    "ScaledIdentity",
    "__version__",
    "alibi_slopes",
    "antiderivative",
    "context",
    "decay",
    "derive",
    "dims",
    "energy",
    "entmax_conjugate",
    "floor",
    "frozen",
    "gelu",
    "gelu_antiderivative",
    "gelu_tanh",
    "grow",
    "index",
    "indicator",
    "log_cosh",
    "logsumexp",
    "lookup",
    "normal_cdf",
    "normal_pdf",
    "only",
    "parameter",
    "position",
    "prox",
    "relu",
    "relu_antiderivative",
    "rope",
    "scalar",
    "sigmoid",
    "silu",
    "silu_antiderivative",
    "soft_top_k",
    "soft_top_k_sum",
    "softplus",
    "softplus_antiderivative",
    "state",
    "step",
    "t5_bucket",
    "trace",
    "warm_restart",
]


def __getattr__(name: str):
    # What is not always needed is imported when it is first asked for.
    ours = ("allocation", "analysis", "compression", "plot", "testing", "token_parameters")
    if name in (*ours, "energies", "derivations"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
