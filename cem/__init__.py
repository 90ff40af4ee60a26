"""CEM: write an energy, get the layer that descends it."""

from ._version import __version__
from .certificate import Certificate
from .derivation import Derivation
from .energy import Energy, energy
from .language.symbols import Dim, context, dims, frozen, index, logsumexp, parameter, scalar, state
from .language.words import (
    antiderivative,
    gelu,
    gelu_antiderivative,
    gelu_tanh,
    log_cosh,
    normal_cdf,
    normal_pdf,
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
from .lowering import LoweringError
from .preconditioner import AbstractPreconditioner, Diagonal, ScaledIdentity
from .trace import EnergyTrace, LayerTrace, trace
from .update import AbstractUpdate, GradientDescent

__all__ = [
    "AbstractPreconditioner",
    "AbstractUpdate",
    "Certificate",
    "Derivation",
    "Diagonal",
    "Dim",
    "Energy",
    "EnergyLayer",
    "EnergyTrace",
    "GradientDescent",
    "LayerTrace",
    "LoweringError",
    "ScaledIdentity",
    "__version__",
    "antiderivative",
    "context",
    "derive",
    "dims",
    "energy",
    "frozen",
    "gelu",
    "gelu_antiderivative",
    "gelu_tanh",
    "index",
    "log_cosh",
    "logsumexp",
    "normal_cdf",
    "normal_pdf",
    "parameter",
    "relu",
    "relu_antiderivative",
    "scalar",
    "sigmoid",
    "silu",
    "silu_antiderivative",
    "softplus",
    "softplus_antiderivative",
    "state",
    "step",
    "trace",
]


def __getattr__(name: str):
    # The galleries and the pictures are imported when they are first asked for.
    if name in ("plot", "testing", "energies", "derivations"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
