"""``cem demo``, ``cem derive``, ``cem plot``: energies and what they become."""

import importlib
import importlib.util
import io
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from .app import UserError, answered, app, prepare, sentence, write

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_DEMO = ("attention_energy.py:interaction", "gated_energy.py:gated")

EnergyArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE:NAME",
        help="An energy: file.py:name, or dotted.module:name of an installed module.",
    ),
]
SizesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SIZE=VALUE]...", help="Sizes and scalars, such as dim=64 heads=4."),
]


@app.command()
def demo(
    steps: Annotated[
        int | None,
        typer.Option(help="How long to train; by default a minute and three quarters.", min=1),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the pictures, the page and the model.")
    ] = Path("cem-demo"),
    seed: Annotated[int, typer.Option(help="Of the parameters and of the order of the text.")] = 0,
    energy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE:NAME",
            help="An energy, in order; repeatable. By default those of examples/.",
        ),
    ] = None,
    source: Annotated[
        str,
        typer.Option(help="The text: stdlib, python, a folder, a file, a glob or hf:NAME."),
    ] = "stdlib",
) -> None:
    """Train a small language model made of energies.

    It takes about two and a half minutes: most of it is training, then come the comparison with counting
    and the pictures of the descent.
    """
    if not energy:
        energy = [str(_EXAMPLES / name) for name in _DEMO]
        if not _EXAMPLES.is_dir():
            raise UserError(
                f"the energies of the demo stand in examples/ of a clone: got no {_EXAMPLES}; "
                "clone the repository, or type `cem demo --energy FILE:NAME`"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {out}: got {error.strerror}; name a folder") from None
    prepare(1)
    energies = [_load(name) for name in energy]
    with answered():
        from cem.demo import STEPS, run

        run(energies, steps=steps or STEPS, source=source, out=out, seed=seed)


@app.command()
def derive(
    energy: EnergyArgument,
    sizes: SizesArgument = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Also write the derivation as a page.")
    ] = None,
) -> None:
    """Print the way from an energy to its layer.

    Without sizes that is the mathematics; with sizes also the program and its kernels.
    """
    found = _load(energy)
    derivation = _layer(found, sizes).derivation if sizes else found.derivation()
    print(derivation)
    if out is not None:
        write(out, derivation.html().encode())


@app.command()
def plot(
    energy: EnergyArgument,
    sizes: SizesArgument = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE.png", help="Where to; by default the energy's name."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the random input.", min=1)] = 32,
    steps: Annotated[int, typer.Option(help="How often the energy is descended.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of the parameters and of the input.")] = 0,
) -> None:
    """Draw how the energy of random tokens falls.

    On the left the energy around the last token, with the path of the steps; on the right how far
    the energy of each token fell, step by step.
    """
    prepare(1)
    found = _load(energy)
    import torch
    from matplotlib import pyplot as plt

    import cem
    from cem import plot as pictures

    torch.manual_seed(seed)
    layer = _layer(found, sizes or [], steps=steps)
    out = out or Path(f"{found.name}.png")
    buffer = io.BytesIO()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
    try:
        trace = cem.trace(layer, torch.randn(1, tokens, layer.dim))
        pictures.landscape(trace, ax=left)
        pictures.tokens(trace, ax=right)
        figure.savefig(buffer, format=out.suffix[1:] or "png", dpi=150)
    except ValueError as error:  # a state of one coordinate, a picture of an unknown format
        raise UserError(sentence(error)) from error
    finally:
        plt.close(figure)
    write(out, buffer.getvalue())
    print(trace.table())


def _load(spec: str):
    """The energy that FILE:NAME means."""
    import cem

    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise UserError(
            f"an energy is written FILE.py:NAME or MODULE:NAME: got `{spec}`; "
            f"type `{spec.rstrip(':')}:NAME` with the name that the energy has in there"
        )
    module = _module(place)
    thing = getattr(module, name, None)
    if isinstance(thing, cem.Energy):
        return thing
    held = [key for key, value in vars(module).items() if isinstance(value, cem.Energy)]
    advice = "make one there with `cem.Energy(expression)` or `@cem.energy(...)`"
    if held:
        advice = f"type `{place}:{held[0]}`"
    if hasattr(module, name):
        kind = type(thing).__name__
        raise UserError(
            f"`{name}` in {place} must be an energy: got {kind} {thing!r:.40}; {advice}"
        )
    raise UserError(f"{place} has no `{name}`: it holds {', '.join(held) or 'no energy'}; {advice}")


def _module(place: str):
    """A module by the path of its file or by its dotted name."""
    if not place.endswith(".py") and "/" not in place and os.sep not in place:
        return _imported(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise UserError(f"there is no file {place}: got the path {path}; type that of a .py file")
    sys.path.insert(0, str(path.parent))  # what `python file.py` does: its neighbours import
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file of a user may raise
        raise UserError(
            f"{place}, line {_line(error, path)}, cannot be run: got {type(error).__name__}: "
            f"{sentence(error)}; `python {place}` shows where it comes from"
        ) from error
    return module


def _imported(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"there is no module `{error.name}`: got `{name}`; install it, or for a file type "
            "its path, `FILE.py:NAME`"
        ) from None
    except Exception as error:  # whatever the module of a user may raise
        raise UserError(
            f"module `{name}` cannot be imported: got {type(error).__name__}: {sentence(error)}; "
            f'`python -c "import {name}"` shows where it comes from'
        ) from error


def _line(error: Exception, path: Path) -> int:
    """The last line of the file that ran before the error, or where its syntax breaks."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    lines = [
        line.lineno
        for line in traceback.extract_tb(error.__traceback__)
        if line.filename == str(path)
    ]
    return lines[-1] if lines else 1


def _layer(energy, sizes: list[str], **options):
    """The layer of an energy at sizes such as ``["dim=64", "heads=4"]``."""
    import cem

    # `dim` also names a width that is a product of sizes, such as heads*block.
    known = list(dict.fromkeys([*map(str, (*energy.dims, *energy.scalars)), "dim"]))
    values = {}
    for pair in sizes:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"a size is written NAME=VALUE: got `{pair}`; type `{pair}=64`")
        if name not in known:
            raise UserError(
                f"energy `{energy.name}` has no size or scalar `{name}`: got `{pair}`; "
                f"type one of {', '.join(known)}"
            )
        if name in values:
            raise UserError(f"`{name}` is given twice: got `{pair}` last; type it once")
        try:
            values[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise UserError(f"`{name}` must be a number: got `{pair}`; type `{name}=64`") from None
    if not values:
        raise UserError(
            f"energy `{energy.name}` needs its sizes: got none; "
            f"type {' '.join(f'{size}=16' for size in energy.dims)}"
        )
    try:
        return cem.derive(energy, **values, **options)
    except (ValueError, TypeError) as error:
        raise UserError(sentence(error)) from error
