"""The command line: energies (``demo``, ``derive``, ``plot``) and models (``train``, ``eval``,
``sample``, ``export``, ``sweep``, ``analyse``, ``allocate``).

Heavy imports stand inside the commands, so that help and mistakes are answered at once.
"""

from . import allocate as allocate
from . import analyse as analyse
from . import energies as energies
from . import models as models
from .app import UserError as UserError
from .app import main as main
