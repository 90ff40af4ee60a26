"""The command line: ``demo``, ``derive``, ``plot``.

Heavy imports stand inside the commands, so that help and mistakes are answered at once.
"""

from . import energies as energies
from .app import UserError as UserError
from .app import main as main
