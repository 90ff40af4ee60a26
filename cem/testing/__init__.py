"""The meaning of a layer, token by token, and the checks that an energy of your own should pass."""

from .checks import EnergyReport, check_energy
from .comparison import assert_close, relative_error
from .reference import reference_energy, reference_of, reference_update

__all__ = [
    "EnergyReport",
    "assert_close",
    "check_energy",
    "reference_energy",
    "reference_of",
    "reference_update",
    "relative_error",
]
