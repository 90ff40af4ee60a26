"""``cem allocate``: which head of which layer of a trained model needs how much rank."""

from pathlib import Path
from typing import Annotated

import typer

from .app import UserError, answered, app, prepare, write


@app.command()
def allocate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="A trained run, or a saved model.")
    ],
    budget: Annotated[
        float, typer.Option(help="Share of what the attention scores cost now.", min=0, max=1)
    ] = 0.5,
    cost: Annotated[
        str, typer.Option(help="What is counted: parameters, flops, cache or rank.")
    ] = "parameters",
    by: Annotated[
        str, typer.Option(help="loss (measured, fits included), spectra, schedule or uniform.")
    ] = "loss",
    groups: Annotated[
        str, typer.Option(help="head: a rank for each; layer: one for all that a layer keeps.")
    ] = "head",
    multiple: Annotated[int, typer.Option(help="Ranks are multiples of it.", min=1)] = 1,
    source: Annotated[
        str | None, typer.Option("--data", help="Text to calibrate on, where the model has no run.")
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows of text to read.", min=2)] = 32,
    out: Annotated[
        Path | None, typer.Option(help="Folder; by default MODEL_DIR and -allocated.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Save the compressed model too.")] = False,
) -> None:
    """Measure what every head needs and share out a budget.

    Prints the plan, writes plan.yaml and pictures of it and of the gains; with --save also the
    model, cut to the plan. `plan: plan.yaml` in a run trains a model with these heads and ranks.
    """
    if by not in ("loss", "spectra", "schedule", "uniform"):
        raise UserError(f"`--by` is loss, spectra, schedule or uniform: got {by}; type `--by loss`")
    if not 0 < budget <= 1:
        raise UserError(f"`--budget` is a share in (0, 1]: got {budget}; type `--budget 0.5`")
    prepare(1)
    out = out or model.with_name(f"{model.name}-allocated")
    with answered():
        from cem.lm.compressed import load_compressed, save_compressed
        from cem.lm.planning import Calibration, pictures, plan_for, shares

        found = load_compressed(model)
        text = Calibration.of(model, source, windows)
        layers, plan = plan_for(
            found, text, budget, by=by, cost=cost, groups=groups, multiple=multiple
        )
        print(plan)
        print(shares(found, plan, text))
        write(out / "plan.yaml", plan.to_yaml().encode())
        for name, content in pictures(layers, plan).items():
            write(out / name, content)
        if save:
            from cem.compression import compress_model, cross_entropy

            before = cross_entropy(found, text.held_out)
            done = compress_model(found, plan, text.train)
            after = cross_entropy(found, text.held_out)
            for layer, one in done.items():
                if one.calibrated is not None:
                    print(f"{layer}: {one.calibrated}")
            print(f"held out: {before:.4f} nats a token before, {after:.4f} after")
            save_compressed(found, out / "model")
            text.tokenizer.save_pretrained(out / "model")
            print(f"wrote {out / 'model'}")
