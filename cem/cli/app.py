"""The application of the command line, and what its commands share."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cem._version import __version__

app = typer.Typer(
    name="cem",
    help="Turn energies into layers: derive, run and look at them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class UserError(Exception):
    """What the person who typed the command can mend: one sentence, no traceback, exit code 2."""


def main() -> None:
    """The entry point of the command ``cem``."""
    try:
        app(prog_name="cem")
    except UserError as error:
        print(f"cem: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cem {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    del version


def prepare(threads: int) -> None:
    """Set the threads of torch, and what torch and matplotlib read when they are loaded."""
    # Threads that wait sleep: where other programs run, spinning ones are many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("MPLBACKEND", "Agg")
    import torch

    torch.set_num_threads(threads)


@contextmanager
def answered() -> Iterator[None]:
    """Mistakes of the person who typed a command about language models end in one sentence."""
    missing = [
        name for name in ("transformers", "accelerate") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise UserError(
            f"language models need {' and '.join(missing)}: got an environment without; "
            "type `pip install 'causal-energy-minimization[lm]'`"
        )
    try:
        yield
    except (ValueError, ImportError, FloatingPointError) as error:
        raise UserError(sentence(error)) from error


def sentence(error: Exception) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())


def write(path: Path, content: bytes) -> None:
    """Write whole or not at all, and say where."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: got {error.strerror}; name another file") from None
    print(f"wrote {path}")
