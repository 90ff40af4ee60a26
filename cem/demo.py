"""The demonstration: energies become layers, layers become a language model, and its descent is
measured, drawn and compared with counting.

Everything that is printed is measured in the run that prints it.
Legend: B batch, T tokens, N windows or steps, L layers.
"""

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

import cem
from cem import lm, plot
from cem.language.document import as_html
from cem.lm.model import CEMForCausalLM
from cem.lm.quiet import quiet
from cem.lm.training import build

STEPS = 900  # a minute and three quarters on one core
DIM = 128
SIZES = {"heads": 16, "rank": 8, "hidden": 344, "beta": 8**-0.5}
"""What the energies of the demonstration get of the sizes and scalars that they know by name."""

_TRACED = 64  # windows
_SHOWN = 48  # tokens under a picture


def recipe(
    energies: Sequence[cem.Energy], *, steps: int = STEPS, source: str = "stdlib", seed: int = 0
) -> lm.Run:
    """What is trained: two rounds of the energies, each in a layer of its own, on single bytes.

    It is a run as ``cem train`` reads it from a file; the file stands in the folder of the run.

    Raises:
        ValueError: an energy that cannot be written as JSON.
    """
    layers = [[_description(energy)] for energy in energies] * 2
    return lm.Run(
        model={
            "model_type": "cem",
            "hidden_size": DIM,
            "layers": layers,
            "initializer_range": DIM**-0.5,
        },
        data={"source": source, "tokenizer": "bytes", "context": 64, "megabytes": None},
        trainer={
            "max_steps": steps,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "learning_rate": 1.2e-2,
            "warmup_steps": 0.1,
            "logging_steps": 0.05,
            "eval_strategy": "no",
            "save_strategy": "no",
        },
        optimizer="muon",
        trace_steps=0,
        seed=seed,
    )


def run(
    energies: Sequence[cem.Energy],
    *,
    steps: int = STEPS,
    source: str = "stdlib",
    out: Path = Path("cem-demo"),
    seed: int = 0,
) -> None:
    """Train a language model made of the energies, print a report and draw it.

    Args:
        energies: the energies of the layers, in order.
        steps: how long to train; the same steps and seed give the same numbers.
        source: the text, as `cem.lm.Data` takes it.
        out: the folder for ``descent.png``, ``tokens.png``, ``derivation.html`` and ``model``, the
            folder of the run; those of an earlier demonstration are replaced.
        seed: of the initial parameters and of the order of the text.

    Raises:
        ValueError: the text is too short, or an energy cannot be derived at the sizes or written
            as JSON.
    """
    what, folder = recipe(energies, steps=steps, source=source, seed=seed), out / "model"
    data = lm.Data(**what.data).prepare()
    _say("text", *str(data).splitlines())
    model = build(what.model, data.tokenizer)
    layers = [part for block in model.model.layers for part in block.parts.values()]
    for layer in layers[: len(energies)]:
        how = dict.fromkeys((layer.lowering.kind, *layer.lowering.kernels))
        _say("derived", f"{layer.energy_function.name}: {', '.join(how)}", *layer.lowering.reasons)
    parameters, context = model.num_parameters(), what.data["context"]
    _say("model", f"{len(layers)} layers, {parameters:,} parameters, {context} bytes of context")

    if (folder / "run.yaml").is_file():
        shutil.rmtree(folder)
    result = lm.train(what, folder)
    _say(
        "trained",
        f"{result.steps:,} steps, {result.tokens:,} bytes read, seed {seed}",
        f"{result.seconds:.1f} s on {result.device}, {result.tokens_per_second:,.0f} bytes a second",
    )
    _report_bits(data, result)

    with quiet():
        model = CEMForCausalLM.from_pretrained(folder).eval()
    chosen = [
        data.held_out[i] for i in range(0, len(data.held_out), len(data.held_out) // _TRACED + 1)
    ]
    trace = _trace(model, chosen)
    _report_descent(model, trace)

    print()
    layers = [part for block in model.model.layers for part in block.parts.values()]
    for name, content in _files(model, layers[: len(energies)], trace, chosen):
        _write(out / name, content)
        _say("wrote", str(out / name))
    _say("", f"{folder}, the model: cem sample {folder} --prompt 'def '")


def _description(energy: cem.Energy) -> dict:
    """An energy as a part of a block, with the sizes that it knows."""
    known = {str(name) for name in (*energy.dims, *energy.scalars)}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    return {"energy": json.loads(energy.to_json()), **sizes}


def _say(label: str, *lines: str) -> None:
    for line in lines:
        print(f"{label:<10}{line}", flush=True)
        label = ""


def _trace(model: CEMForCausalLM, windows: Sequence[dict]) -> cem.EnergyTrace:
    batch = {n: torch.stack([w[n] for w in windows]) for n in ("input_ids", "position_ids")}
    return cem.trace(model, use_cache=False, **batch)


def _report_bits(data: lm.Prepared, result: lm.Result) -> None:
    """The held-out loss beside what counting achieves on the very same bytes."""
    order = np.random.default_rng(result.seed).permutation(len(data.train))
    context = data.held_out.context
    order = np.resize(order, min(len(order), -(-result.tokens // context)))
    read = np.stack([_bytes(data.train[i]["input_ids"].numpy()) for i in order])
    text = _bytes(np.asarray(data.held_out.tokens))
    asked = np.delete(np.arange(len(text)), data.held_out.starts)
    whole, same = (
        lm.ngram_bits(known, text, asked, order=5) / data.bytes_per_token
        for known in (_bytes(np.asarray(data.train.tokens)), read)
    )
    print(f"\nheld-out bits per byte, {data.about['held_out']['bytes']:,} bytes, lower is better")
    print(f"  {'':<34}{'whole text':>12}{'bytes read':>12}")
    print(f"  {'uniform':<34}{8:>12.3f}{8:>12.3f}")
    for k, (bits, fewer) in enumerate(zip(whole, same, strict=True)):
        name = f"n-gram, {k} byte{'s' * (k != 1)} of context"
        print(f"  {name:<34}{bits:>12.3f}{fewer:>12.3f}")
    name = f"this model, 1 to {context - 1} bytes"
    print(f"  {name:<34}{'':>12}{result.bits_per_byte:>12.3f}")
    print(
        "  whole text: fitted to all of the training text; bytes read: to as much as the model read"
    )
    print("  n-gram: interpolated counts with Witten-Bell smoothing")


def _bytes(tokens: np.ndarray) -> np.ndarray:
    """Tokens as bytes; the end of a document, token 256, is the byte 0."""
    return tokens.astype(np.uint8)


def _report_descent(model: CEMForCausalLM, trace: cem.EnergyTrace) -> None:
    size = trace[0].before[0].numel()
    print(f"\nenergy before and after each layer, {size:,} held-out tokens, context fixed")
    heads = f"{'step size':>11}{'median drop':>13}{'tokens that fell':>18}"
    print(f"  {'layer':<7}{'energy':<16}{'kernels':<14}{heads}")
    for number, part in enumerate(trace):
        layer = model.get_submodule(part.name)
        drop = part.before[0] - part.after[-1]  # (B, T)
        fell = (drop > 0).double().mean().item()
        kernels, step_size = ", ".join(layer.lowering.kernels), layer.update.step_size.item()
        print(
            f"  {number:<7}{part.energy_name:<16}{kernels:<14}"
            f"{step_size:>11.3f}{drop.median().item():>13.3g}{fell:>18.2%}"
        )


def _files(model, layers, trace, windows):
    """The three files as pairs (name, bytes)."""
    ax = plt.subplots(figsize=(5.4, 2.9), layout="constrained")[1]  # names stay level
    yield "descent.png", _png(plot.descent(trace, ax=ax))
    excerpt = max((w["input_ids"][:_SHOWN] for w in windows), key=_letters)
    short = _trace(model, [{"input_ids": excerpt, "position_ids": torch.arange(len(excerpt))}])
    text = [chr(b) if 32 < b < 127 or b == 10 else " " for b in excerpt.tolist()]
    ax = plt.subplots(figsize=(10.5, 2.9), layout="constrained")[1]  # room for every letter
    yield "tokens.png", _png(plot.tokens(short, ax=ax, text=text))
    yield "derivation.html", _page([layer.derivation for layer in layers]).encode()


def _page(derivations) -> str:
    """The derivations one after another on one page."""
    steps = [
        replace(step, title=f"{found.name}: {step.title}")
        for found in derivations
        for step in found.steps
    ]
    title = " and ".join(found.name for found in derivations)
    return as_html(
        f"From energies to layers: {title}", "Every formula is computed from the energy.", steps
    )


def _letters(tokens: torch.Tensor) -> int:
    """How many tokens are letters: what a person can read under a picture."""
    lower = tokens | 32
    return int(((lower >= ord("a")) & (lower <= ord("z"))).sum())


def _png(ax) -> bytes:
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png")
    plt.close(ax.figure)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
