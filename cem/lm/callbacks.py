"""What watches a training run: its clock, its bar, its metrics, the energies of its layers.

All of them are ``transformers.TrainerCallback``; a record is a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..layer import EnergyLayer
from ..trace import trace


class Records:
    """A file of JSON lines that belongs to one run, interrupted or not.

    Args:
        path: the file.
        step: what was recorded after this step, or half recorded, is dropped: it comes again.

    >>> records = Records("metrics.jsonl", step=0)
    >>> records.write({"step": 1, "loss": 2.5})
    >>> Records("metrics.jsonl", step=1).lines
    [{'step': 1, 'loss': 2.5}]
    >>> Records("metrics.jsonl", step=0).lines
    []
    """

    def __init__(self, path: str | Path, step: int):
        self.path = Path(path)
        self.lines = [line for line in read_records(self.path) if line["step"] <= step]
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(f"{json.dumps(line)}\n" for line in self.lines), "utf-8")
        partial.replace(self.path)

    def write(self, line: dict) -> None:
        """Append one line."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")


def read_records(path: str | Path) -> list[dict]:
    """The lines of a file of JSON lines, without a last one that was cut short."""
    if not Path(path).is_file():
        return []
    pieces = Path(path).read_text("utf-8").split("\n")
    return [json.loads(piece) for piece in pieces[:-1]]


class Clock(TrainerCallback):
    """The seconds spent training: without evaluating, saving, and recording energies.

    Args:
        seconds: what earlier parts of the same run took.
    """

    def __init__(self, seconds: float):
        self.seconds, self._mark = seconds, 0.0

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What runs inside does not count."""
        yield
        self._mark = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        # A GPU runs behind; logging waits for it, so that the time between two logs is right.
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        # A loss is a mean since the last log: both the straight run and the resumed one start a new
        # mean where a checkpoint is, so their losses are the same.
        control.should_log |= control.should_save

    def on_log(self, args, state, control, logs=None, **kwargs):
        now = time.perf_counter()
        if "loss" in logs:  # and not the result of an evaluation
            self.seconds += now - self._mark
        self._mark = now

    def on_evaluate(self, args, state, control, **kwargs):
        self._mark = time.perf_counter()

    on_save = on_evaluate


class Metrics(TrainerCallback):
    """Writes metrics.jsonl: loss, learning rate, norm of the gradient, tokens, seconds.

    A line with ``loss`` is the mean of the training loss since the line before, in nats a token;
    one with ``held_out_loss`` is an evaluation on everything held out.
    """

    NAMES = {
        "loss": "loss",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
        "eval_loss": "held_out_loss",
        "eval_bits_per_byte": "bits_per_byte",
    }

    def __init__(self, records: Records, clock: Clock):
        self.records, self.clock = records, clock

    def on_log(self, args, state, control, logs=None, **kwargs):
        found = {new: logs[old] for old, new in self.NAMES.items() if old in logs}
        if state.is_world_process_zero and ("loss" in found or "held_out_loss" in found):
            counts = {"tokens": state.num_input_tokens_seen, "seconds": self.clock.seconds}
            self.records.write({"step": state.global_step, **found, **counts})


class Finite(TrainerCallback):
    """Ends a training whose loss is not a number any more: it would stay so."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"training diverged: got the loss {logs['loss']} at step {state.global_step}; "
                f"type `trainer.learning_rate={args.learning_rate / 2:g}`, or more warmup_steps"
            )


class Progress(TrainerCallback):
    """One bar with the loss, tokens a second, and the share of the device's peak; lines in a log file.

    Args:
        clock: the run's.
        utilisation: tokens a second -> the share of the peak that they use (MFU).
    """

    def __init__(self, clock: Clock, utilisation):
        self.clock, self.utilisation = clock, utilisation
        self.bar, self.shown, self.last = None, {}, (0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = state.num_input_tokens_seen, self.clock.seconds
        if state.is_world_process_zero and not args.disable_tqdm:
            total, start = state.max_steps, state.global_step
            self.bar = tqdm(total=total, initial=start, disable=None, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not {"loss", "eval_loss"} & set(logs):
            return
        if "loss" in logs:
            now = state.num_input_tokens_seen, self.clock.seconds
            rate = (now[0] - self.last[0]) / max(now[1] - self.last[1], 1e-9)
            self.last = now
            found = {"loss": f"{logs['loss']:.3f}", "tokens/s": f"{rate:,.0f}"}
            found["MFU"] = f"{self.utilisation(rate):.0%}"
        else:
            found = {"held out": f"{logs['eval_loss']:.3f}"}
        if self.bar.disable:  # not a terminal
            shown = ", ".join(f"{name} {value}" for name, value in found.items())
            print(f"step {state.global_step}/{state.max_steps}: {shown}", flush=True)
        else:
            self.shown |= found
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def has_energies(model: nn.Module) -> bool:
    """Whether any layer of a model descends an energy."""
    return any(isinstance(part, EnergyLayer) for part in model.modules())


class Energies(TrainerCallback):
    """Writes energies.jsonl: what every energy layer does to a fixed held-out batch, as it learns.

    A line is one step of one layer: its mean energy per token before and after, at the same context
    and gates, and ``down``, the share of tokens whose energy did not rise.

    Args:
        records: where to.
        batch: what the model is called with.
        every: after how many training steps.
        clock: the run's; it stands still meanwhile.
    """

    def __init__(self, records: Records, batch: dict, every: int, clock: Clock):
        self.records, self.every, self.clock = records, every, clock
        self.batch = {name: value for name, value in batch.items() if name != "labels"}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.record(model, state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.record(model, state)

    def record(self, model: nn.Module, state) -> None:
        """Trace the batch once, and write what was found."""
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in self.batch.items()}
        training = model.training
        model.eval()
        with self.clock.stopped(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            found = trace(model, states=False, use_cache=False, **batch)
        model.train(training)
        if not state.is_world_process_zero:
            return
        for layer in found:
            for step, (before, after) in enumerate(zip(layer.before, layer.after, strict=True)):
                line = {"step": state.global_step, "layer": layer.name, "energy": layer.energy_name}
                line |= {"descent_step": step + 1}
                line |= {"before": before.nanmean().item(), "after": after.nanmean().item()}
                line["down"] = (after <= before).double().mean().item()
                self.records.write(line)
