"""Runs that train in a second: a tiny Llama on short documents of a few words."""

import atexit
import functools
import random
import shutil
import tempfile
from pathlib import Path

from cem.lm.callbacks import read_records
from cem.lm.run import Run

ENERGIES = ("rotary_interaction", "gated_silu")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
STEPS = {
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "logging_steps": 1,
    "eval_steps": 5,
    "save_steps": 3,
}


class Killed(BaseException):
    """What no code of a run catches."""


@functools.cache
def data():
    """What a run says of its data: documents in a folder that goes when the process ends."""
    folder, draw = Path(tempfile.mkdtemp()), random.Random(0)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(12)]
    for number in range(40):
        text = " ".join(draw.choices(words, k=draw.randint(3, 9)))
        (folder / f"{number}.txt").write_text(f"{number} {text}")
    where = {"source": str(folder / "*.txt"), "cache": str(folder / "cache")}
    return {"tokenizer": "bytes", "context": 16, "held_out": 0.2} | where


def tiny_run(**changes):
    trainer = STEPS | {"disable_tqdm": True} | changes.pop("trainer", {})
    return Run(**{"model": LLAMA, "data": data(), "trainer": trainer} | changes)


def losses(out):
    """What the training saw: (step, loss, norm of the gradient), and (step, held-out loss)."""
    names = ("step", "loss", "grad_norm", "learning_rate", "held_out_loss", "tokens")
    return [[line.get(name) for name in names] for line in read_records(out / "metrics.jsonl")]
