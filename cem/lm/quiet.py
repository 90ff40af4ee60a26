"""Models read and written without a bar for every file."""

from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet():
    """Inside, transformers shows no bars of its own.

    >>> with quiet():
    ...     logging.is_progress_bar_enabled()
    False
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
