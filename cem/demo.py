"""The demonstration: energies become layers, layers become a language model, and its descent is
measured, drawn and compared with counting.

Everything that is printed is measured in the run that prints it.
Legend: B batch, T tokens, N windows or steps, L layers.
"""

import glob
import io
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import nn
from tqdm import tqdm

import cem
from cem import lm, plot
from cem.language.document import as_html


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings of the demonstration, chosen for a minute on one CPU core."""

    dim: int = 96
    heads: int = 3
    rank: int = 32
    hidden: int = 256
    blocks: int = 2
    context: int = 64
    recent: int = 8
    batch: int = 8
    learning_rate: float = 4e-3
    warm_up: float = 0.1  # share of the training
    weight_decay: float = 0.1
    test_windows: int = 4096
    trace_windows: int = 64

    def sizes_for(self, energy: cem.Energy) -> dict[str, float]:
        """The sizes and scalars of the recipe that the energy knows by name."""
        known = {name: getattr(self, name) for name in ("dim", "heads", "rank", "hidden")}
        known["beta"] = self.rank**-0.5
        names = {str(name) for name in (*energy.dims, *energy.scalars)}
        return {name: value for name, value in known.items() if name in names}

    def learning_rate_at(self, done: float) -> float:
        """Linear warm-up, then a cosine down to 2 %; `done` is the share of the training so far."""
        if done < self.warm_up:
            return self.learning_rate * (done / self.warm_up)
        rest = (done - self.warm_up) / (1 - self.warm_up)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * rest)))


@dataclass(frozen=True)
class Training:
    """What a training did; `windows` are those that it read, uint8, shape (N, T + 1)."""

    steps: int
    seconds: float
    windows: np.ndarray


def run(
    energies: Sequence[cem.Energy],
    *,
    seconds: float = 60.0,
    steps: int | None = None,
    text: Path | None = None,
    out: Path = Path("cem-demo"),
    seed: int = 0,
    recipe: Recipe | None = None,
) -> None:
    """Train a language model made of the energies, print a report and write three files.

    Args:
        energies: the energies of one block, in order; each block derives them anew.
        seconds: how long to train. The learning rate follows the clock, so the time is kept
            whatever else the machine does.
        steps: train for this many steps instead; then the same seed gives the same numbers.
        text: the folder whose ``*.py`` files are the text; None takes the standard library.
        out: the folder for ``descent.png``, ``tokens.png`` and ``derivation.html``.
        seed: of the initial parameters and of the order of the text.
        recipe: sizes and settings; None takes those of `Recipe`.

    Raises:
        ValueError: the text is too short, or an energy cannot be derived at the sizes.
    """
    recipe = recipe or Recipe()
    torch.manual_seed(seed)
    corpus = lm.read_corpus("stdlib" if text is None else f"{glob.escape(str(text))}/**/*.py")
    train_bytes, held_out_bytes = lm.joined(corpus.train), lm.joined(corpus.held_out)
    source = f"Python {platform.python_version()} standard library" if text is None else text
    _say("text", f"{source}, digest {corpus.digest}")
    _say("", f"{len(train_bytes):,} bytes in {len(corpus.train)} files to train on")
    _say("", f"{len(held_out_bytes):,} bytes in {len(corpus.held_out)} files held out")

    model = build(energies, recipe)
    block = model.layers[: len(energies)]
    for energy, layer in zip(energies, block, strict=True):
        how = dict.fromkeys((layer.lowering.kind, *layer.lowering.kernels))
        _say("derived", f"{energy.name}: {', '.join(how)}")
        for reason in layer.lowering.reasons:
            _say("", reason)
    parameters = sum(p.numel() for p in model.parameters())
    blocks = f"{_count(recipe.blocks, 'block')} of {_count(len(block), 'layer')}"
    _say("model", f"{blocks}, {parameters:,} parameters, {recipe.context} bytes of context")

    windows = lm.batches(train_bytes, batch=recipe.batch, context=recipe.context, seed=seed)
    training = train(model, windows, recipe, seconds=seconds, steps=steps)
    read = training.steps * recipe.batch * recipe.context
    threads = _count(torch.get_num_threads(), "thread")
    _say("trained", f"{training.steps:,} steps, {read:,} bytes read, seed {seed}")
    _say(
        "", f"{training.seconds:.1f} s on {threads}, {read / training.seconds:,.0f} bytes a second"
    )

    held_out, positions = lm.even_windows(
        held_out_bytes, count=recipe.test_windows, context=recipe.context
    )
    bits = held_out_bits(model, held_out)
    positions = positions[:, recipe.context // 2 :]
    counted = [
        lm.ngram_bits(known, held_out_bytes, positions, order=5)
        for known in (train_bytes, training.windows)
    ]
    _report_bits(bits, counted, positions.size, recipe.context)

    traced = held_out[:: max(1, len(held_out) // recipe.trace_windows)][:, :-1]
    trace = cem.trace(model, torch.tensor(traced))
    _report_descent(model, trace, traced.size)

    print()
    excerpt = max(held_out[:, :48], key=_letters)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in _files(model, block, trace, excerpt):
        _write(out / name, content)
        _say("wrote", str(out / name))


def build(energies: Sequence[cem.Energy], recipe: Recipe) -> lm.LanguageModel:
    """A byte-level model of `recipe.blocks` blocks, with one derived layer for each energy."""
    layers = [
        cem.derive(
            energy,
            # Without a gain the norm is a gradient itself, and small steps are sure to descend.
            norm=nn.RMSNorm(recipe.dim, elementwise_affine=False),
            update=cem.GradientDescent(step_size=1.0, learn=True),
            **recipe.sizes_for(energy),
        )
        for _ in range(recipe.blocks)
        for energy in energies
    ]
    return lm.LanguageModel(256, recipe.dim, layers, recipe.context, recent=recipe.recent)


def train(
    model: lm.LanguageModel,
    windows: Iterator[np.ndarray],
    recipe: Recipe,
    *,
    seconds: float,
    steps: int | None = None,
) -> Training:
    """Train on windows of shape (B, T + 1) with AdamW for a time, or for a number of steps."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    read, losses = [], []
    total, unit = (seconds, "s") if steps is None else (steps, "steps")
    # On a terminal the bar moves; in a log it says a line now and then.
    bar = tqdm(
        total=total,
        desc="training",
        bar_format="{desc}  {percentage:3.0f}%|{bar:24}| {n:.0f}/{total:.0f} " + unit + "{postfix}",
        mininterval=0.2 if os.isatty(2) else 15.0,
    )
    start = time.perf_counter()
    elapsed = 0.0
    with bar:
        while (done := (elapsed / seconds if steps is None else len(read) / steps)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(done)
            read.append(next(windows))
            loss = model.losses(torch.from_numpy(read[-1])).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            elapsed = time.perf_counter() - start
            losses.append(loss.item() / math.log(2))
            speed = len(read) * recipe.batch * recipe.context / elapsed
            bar.set_postfix_str(
                f"loss {np.mean(losses[-50:]):.2f} bits, {speed:,.0f} tokens/s", refresh=False
            )
            bar.update(min(elapsed, seconds) - bar.n if steps is None else 1)
    return Training(len(read), elapsed, np.concatenate(read))


@torch.no_grad()
def held_out_bits(model: lm.LanguageModel, windows: np.ndarray) -> float:
    """Mean cross entropy in bits per byte over windows of shape (N, T + 1), lower is better.

    The second half of each window counts: every byte is predicted from more than T/2 bytes.
    """
    losses = torch.cat([model.losses(part) for part in torch.tensor(windows).split(64)])
    return losses[:, losses.shape[1] // 2 :].double().mean().item() / math.log(2)


def _say(label: str, text: str) -> None:
    print(f"{label:<10}{text}".rstrip(), flush=True)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _report_bits(bits: float, counted: list[np.ndarray], size: int, context: int) -> None:
    print(f"\nheld-out bits per byte, {size:,} bytes, lower is better")
    print(f"  {'':<34}{'whole text':>12}{'bytes read':>12}")
    print(f"  {'uniform':<34}{8:>12.3f}{8:>12.3f}")
    for k, (whole, same) in enumerate(zip(*counted, strict=True)):
        name = f"n-gram, {_count(k, 'byte')} of context"
        print(f"  {name:<34}{whole:>12.3f}{same:>12.3f}")
    name = f"this model, {context // 2 + 1} to {context} bytes"
    print(f"  {name:<34}{'':>12}{bits:>12.3f}")
    print("  whole text: fitted to all of the training text; bytes read: to what the model read")
    print("  n-gram: interpolated counts with Witten-Bell smoothing")


def _report_descent(model: lm.LanguageModel, trace: cem.EnergyTrace, size: int) -> None:
    print(f"\nenergy before and after each layer, {size:,} held-out tokens, context fixed")
    heads = f"{'step size':>11}{'median drop':>13}{'tokens that fell':>18}"
    print(f"  {'layer':<10}{'energy':<13}{'kernels':<14}{heads}")
    layers = dict(model.named_modules())
    for part in trace:
        layer = layers[part.name]
        drop = part.before[0] - part.after[-1]  # (B, T)
        fell = (drop > 0).double().mean().item()
        kernels, step_size = ", ".join(layer.lowering.kernels), layer.update.step_size.item()
        print(
            f"  {part.name:<10}{part.energy_name:<13}{kernels:<14}"
            f"{step_size:>11.3f}{drop.median().item():>13.3g}{fell:>18.2%}"
        )


def _files(model, block, trace, excerpt):
    """The three files as pairs (name, bytes)."""
    yield "descent.png", _png(plot.descent(trace))
    short = cem.trace(model, torch.tensor(excerpt[None]))
    text = [chr(b) if 32 < b < 127 or b == 10 else " " for b in excerpt.tolist()]
    ax = plt.subplots(figsize=(10.5, 2.9), layout="constrained")[1]  # room for every letter
    yield "tokens.png", _png(plot.tokens(short, ax=ax, text=text))
    yield "derivation.html", _page([layer.derivation for layer in block]).encode()


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


def _letters(window: np.ndarray) -> int:
    """How many bytes are letters: what a person can read under a picture."""
    return int(np.isin(window | 32, np.arange(ord("a"), ord("z") + 1)).sum())


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
