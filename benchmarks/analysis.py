"""Which layers of trained models are gradients, and of what: ``python -m benchmarks.analysis``.

Language models of ``parity/cpu.yaml`` at their tuned learning rates, and Llama as it was drawn. Trained ones are taken
from ``--runs``, where ``python -m benchmarks.parity cpu`` leaves them; what is missing is trained. README.md says what
the figures are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
import transformers

import cem.hf  # noqa: F401  registers its models
from cem.analysis import Report, analyse
from cem.analysis.pictures import overview
from cem.lm.data import Data
from cem.lm.quiet import quiet
from cem.lm.sweep import Sweep, Trial
from cem.lm.training import build, train

from .report import RESULTS, machine
from .settings import Settings

PROTOCOL = Path(__file__).parent / "parity" / "cpu.yaml"
# title: side, the learning rate that it was tuned to, and whether it is trained
SIDES = {
    "Llama, untrained": ("llama", 0.003, False),
    "Llama, trained": ("llama", 0.003, True),
    "tied energies, trained": ("both", 0.006, True),
    "partly tied, trained": ("partly-tied", 0.006, True),
}
TOKENS = 16  # that move one at a time
DRAWN = tuple(SIDES)[:3]


def held_out(run, sequences: int) -> torch.Tensor:
    """Windows spread over the text that a run has held out, (sequences, context); each is read as one text."""
    windows = Data(**run.data).prepare().held_out
    places = torch.linspace(0, len(windows) - 2, sequences).round().long()
    return torch.stack([windows[int(place)]["input_ids"] for place in places])


def model_of(run, folder: Path, trained: bool) -> transformers.PreTrainedModel:
    """The model of a run in float64: as drawn from its seed, or as trained, now if it was not before."""
    if not trained:
        transformers.set_seed(run.seed)
        return build(run.model, Data(**run.data).prepare().tokenizer).double().eval()
    if not (folder / "result.json").is_file():
        train(run, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()


@quiet()
def measure(runs: Path, seed: int, sequences: int, changes=()) -> dict[str, Report]:
    """A report a side, by its title."""
    sweep, found = Sweep.read(PROTOCOL, changes), {}
    for title, (side, rate, trained) in SIDES.items():
        trial = Trial(side, {"trainer.learning_rate": rate}, seed)
        run = sweep.run_of(trial)
        model = model_of(run, runs / trial.name, trained)
        generator = torch.Generator().manual_seed(seed)
        ids = held_out(run, sequences)
        options = {"use_cache": False, "tokens": TOKENS, "generator": generator}
        found[title] = analyse(model, ids, **options)
        print(f"{title}\n{found[title].table()}\n", flush=True)
    return found


def save(reports: dict[str, Report], folder: Path, command: str, asked: dict) -> None:
    """Write analysis.json, analysis.md and analysis.png."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"transformers": transformers.__version__}
    about = {"command": command, "machine": machine(Settings()) | versions, "settings": asked}
    about["reports"] = {title: report.to_dict() for title, report in reports.items()}
    (folder / "analysis.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    where = about["machine"]
    lines = [f"{command}; seed {asked['seed']}; {where['device']}, {where['cpu']}"]
    lines += [f"torch {where['torch']}, transformers {where['transformers']}; float64"]
    lines += [f"commit {where['commit']}; {where['date']}", ""]
    for title, report in reports.items():
        lines += [title, report.table(), ""]
    body = "\n".join(lines).rstrip()
    (folder / "analysis.md").write_text(f"```\n{body}\n```\n", "utf-8")
    figure = overview({title: reports[title] for title in DRAWN})
    figure.savefig(folder / "analysis.png", dpi=130)


def main(argv: list[str] | None = None) -> dict[str, Report]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/parity/cpu"), help="of the models")
    parser.add_argument("--out", type=Path, default=RESULTS / "analysis", help="of the result")
    parser.add_argument("--seed", type=int, default=1, help="of the runs and the probes")
    parser.add_argument("--sequences", type=int, default=16, help="half of them to fit with")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    reports = measure(given.runs, given.seed, given.sequences)
    typed = shlex.join(sys.argv[1:] if argv is None else argv)
    command = f"python -m benchmarks.analysis {typed}".rstrip()
    asked = {"seed": given.seed, "sequences": given.sequences, "tokens": TOKENS}
    save(reports, given.out, command, asked)
    return reports


if __name__ == "__main__":
    main()
