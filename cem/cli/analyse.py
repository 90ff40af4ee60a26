"""``cem analyse``: which layers of a trained model are gradients, of what, and do they descend it?"""

from pathlib import Path
from typing import Annotated

import typer

from .app import answered, app, prepare


@app.command()
def analyse(
    folder: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run, or a model saved by save_pretrained.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="What to read; by default what the run held out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where report.json and report.png go.")] = None,
    sequences: Annotated[int, typer.Option(help="How many to read.", min=1)] = 16,
    context: Annotated[
        int | None, typer.Option(help="Tokens of each; by default the run's, or 128.", min=2)
    ] = None,
) -> None:
    """Say how far every layer of a model is from descending an energy.

    For models of energies and for those with layers like Llama's. Every second sequence fits an
    energy to each of Llama's layers; the others say whether the layer descends it.
    """
    prepare(1)
    with answered():
        import torch
        from transformers import AutoModelForCausalLM

        import cem.hf  # noqa: F401  registers its models
        from cem.analysis import analyse
        from cem.lm.quiet import quiet

        if not (folder / "config.json").is_file():
            raise ValueError(
                f"there is no model in {folder}: got no config.json there; type the folder of a run"
            )
        with quiet():
            ids = _tokens(folder, text, sequences, context)
            model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
        generator = torch.Generator().manual_seed(0)
        report = analyse(model, ids, use_cache=False, generator=generator)
        print(report.table())
        print(f"energies of {report.tokens:,} tokens, half of them to fit with")
        if out is not None:
            print(f"see {report.save(out)}")


def _tokens(folder: Path, text: Path | None, sequences: int, context: int | None):
    """Tokens (sequences, context) from a text, or spread over what a run has held out."""
    import torch

    if text is None:
        from cem.lm.data import Data
        from cem.lm.run import Run

        if not (folder / "run.yaml").is_file():
            raise ValueError(
                f"nothing to read: got no run.yaml in {folder} that names its data; type --text FILE"
            )
        data = Data(**Run.read(folder / "run.yaml").data)
        tokens = torch.from_numpy(data.prepare().held_out.tokens[:].astype("int64"))
        context = context or data.context
    else:
        from transformers import AutoTokenizer

        if not text.is_file():
            raise ValueError(f"there is no text {text}: got no such file; type --text FILE")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = torch.tensor(tokenizer(text.read_text("utf-8", "replace"))["input_ids"])
        context = context or 128
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    if not len(windows):
        raise ValueError(
            f"the text is shorter than one window: got {len(tokens)} tokens and context {context}; type --context"
            f" {max(2, len(tokens))}"
        )
    count = min(sequences, len(windows))
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]
