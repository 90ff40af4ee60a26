"""Models read, written and trained further without remarks of transformers about it."""

import logging as standard
from contextlib import contextmanager

from transformers.utils import logging

# What they say when a training goes on: that the head, tied to the embedding, is not in the
# checkpoint, and that steps written as a share are not the number that the share is.
_REMARKS = ("transformers.trainer", "transformers.trainer_utils")


@contextmanager
def quiet():
    """Inside, transformers shows no bars for files, and no remarks on a training that goes on.

    >>> with quiet():
    ...     logging.is_progress_bar_enabled()
    False
    """
    shown = logging.is_progress_bar_enabled()
    levels = {name: standard.getLogger(name).level for name in _REMARKS}
    logging.disable_progress_bar()
    for name in levels:
        standard.getLogger(name).setLevel(standard.ERROR)
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        for name, level in levels.items():
            standard.getLogger(name).setLevel(level)
