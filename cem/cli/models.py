"""``cem train``, ``cem eval``, ``cem sample``, ``cem export``, ``cem sweep``: language models."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .app import UserError, answered, app, prepare

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a trained run.")]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder to write; by default runs/ and the file's name.")
]
ChangesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=VALUE]...", help="Such as trainer.max_steps=20 model=tiny."),
]


@app.command()
def train(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN.yaml", help="Model, data and training.")
    ] = None,
    changes: ChangesArgument = None,
    out: OutOption = None,
    grow: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Begin with this finished run, grown: grow.hidden=704."),
    ] = None,
) -> None:
    """Train a language model as a file says.

    Typed again it goes on where it was interrupted, and shows the result of a finished run. The
    names under `trainer` are those of transformers.TrainingArguments. With --grow the file may be
    left out: it is then that of the finished run. On several GPUs:
    torchrun --nproc-per-node GPUS -m cem train RUN.yaml
    """
    changes = list(changes or ())
    if grow is not None:
        if run is None or ("=" in str(run) and not run.is_file()):
            changes = [*([str(run)] if run else []), *changes]
            run, out = grow / "run.yaml", out or Path("runs") / f"{grow.name}-grown"
        changes.insert(0, f"grow={{from: {json.dumps(str(grow))}}}")
    if run is None:
        raise UserError("a run is trained from a file: got none; type `cem train RUN.yaml`")
    prepare(1)
    with answered():
        from cem.lm.run import Run
        from cem.lm.training import train

        said = Run.read(run, changes)
        out = out or Path("runs") / run.stem
        result = train(said, out)
    if int(os.environ.get("RANK", 0)):  # the first process speaks for all
        return
    print(
        f"held out {result.loss:.4f} nats a token, {result.bits_per_byte:.4f} bits a byte; "
        f"{result.parameters:,} parameters, {result.tokens:,} tokens, "
        f"{result.tokens_per_second:,.0f} tokens/s, MFU {result.mfu:.0%}; "
        f"data {result.digest}; see {out}"
    )


@app.command("eval")
def evaluate(out: OutArgument) -> None:
    """Compute the held-out loss of a trained model anew."""
    prepare(1)
    with answered():
        from cem.lm.training import evaluate

        found = evaluate(out)
    print(f"held out {found['loss']:.4f} nats a token, {found['bits_per_byte']:.4f} bits a byte")


@app.command()
def sample(
    out: OutArgument,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option(help="How many to write at most.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among this many; 0 is all.", min=0)] = 50,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Let a trained model write."""
    prepare(1)
    options = {"temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    with answered():
        from cem.lm.training import sample

        text = sample(out, prompt, tokens=tokens, seed=seed, **options)
    print(text)


@app.command()
def export(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder of a trained run, or of a checkpoint.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write it.")],
) -> None:
    """Write a trained model as a folder that loads without cem.

    Its layers are written out as plain torch. Who has transformers loads it with
    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    """
    prepare(1)
    with answered():
        from cem.lm.export import export_saved

        export_saved(out, folder)
    print(f"wrote {folder}")


@app.command()
def sweep(
    file: Annotated[
        Path | None, typer.Argument(metavar="[SWEEP.yaml]", help="Sides, grid and seeds.")
    ] = None,
    changes: ChangesArgument = None,
    out: OutOption = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only compare what a sweep has trained.")
    ] = None,
) -> None:
    """Train and compare several models, over a grid and with seeds.

    Typed again it goes on where it was interrupted; typed twice at once, both work on it. Then,
    and with --report alone, it prints a table and draws differences.png, pareto.png and curves.png.
    """
    if (file is None) == (report is None):
        raise UserError(
            "a sweep is trained from a file or reported from a folder: got "
            f"{'neither' if file is None else 'both'}; type `cem sweep SWEEP.yaml` or "
            "`cem sweep --report DIR`"
        )
    prepare(1)
    with answered():
        from cem.lm.sweep import Sweep

        said = Sweep.read(report or file, changes or ())
        out = report or out or Path("runs") / file.stem
        rows = said.rows(out) if report else said.run(out)
        from cem.lm.comparison import compare

        print(compare(said, rows, out))
    print(f"see {out}")
