"""Sweeps of two sides over three learning rates, trained by a function that trains nothing."""

import json

SIDES = {"llama": {"model": "llama-tiny"}, "cem": {"model": "tiny"}}
RATES = {"trainer.learning_rate": [0.001, 0.002, 0.004]}
RESULT = {
    "loss": 2.0,
    "bits_per_byte": 2.9,
    "parameters": 1000,
    "steps": 10,
    "tokens": 640,
    "tokens_per_second": 100.0,
    "flops_per_token": 6000.0,
    "mfu": 0.1,
    "peak_memory": 2**20,
    "seconds": 6.4,
    "device": "cpu",
    "processes": 1,
    "digest": "abc",
}


class Fake:
    """Trains nothing: the loss is a function of the run, and what was called is kept."""

    def __init__(self, loss=lambda run: 2.0 + 0.01 * run.seed):
        self.loss, self.runs = loss, []

    def __call__(self, run, out):
        self.runs.append(run)
        loss = self.loss(run)
        out.mkdir(parents=True, exist_ok=True)
        (out / "run.yaml").write_text(run.to_yaml())
        lines = [{"step": s, "tokens": 64 * s, "seconds": s, "loss": loss + 5 / s} for s in (2, 6)]
        lines += [line | {"held_out_loss": line["loss"]} for line in lines]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (out / "versions.json").write_text('{"torch": "2", "digest": "abc", "data": {}}')
        result = RESULT | {"loss": loss, "seed": run.seed}
        if run.model == "tiny":
            result |= {"parameters": 1500, "tokens_per_second": 80.0}
        (out / "result.json").write_text(json.dumps(result))


def names(sweep, rows=None):
    return [trial.name for trial in sweep.trials(rows or {})]
