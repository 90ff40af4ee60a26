"""Growth: larger named sizes of trained layers and models, without a jump where that is possible."""

from .layer import Growth as Growth
from .layer import grow_layer as grow_layer
from .model import Grown as Grown
from .model import grow as grow
from .model import warm_restart as warm_restart
from .search import RULES as RULES
