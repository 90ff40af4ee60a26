"""What measuring is worth when rank is taken away: ``python -m benchmarks.allocation``.

Trains the models of models.yaml where their runs are missing (``--out``), or takes finished runs (``--run llama=DIR``);
then shares out 1/8, 1/4 and 1/2 of the rank of their attention scores in four ways, and measures the held-out loss.
"""

from __future__ import annotations

import argparse
import json
import platform
from copy import deepcopy
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
import yaml

from cem import rank_plots
from cem._version import __version__
from cem.compression import compress_model, cross_entropy, inputs_of, layer_weights
from cem.lm.compressed import load_compressed
from cem.lm.planning import Calibration, plan_for, png, savings
from cem.lm.run import Run
from cem.lm.training import train

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
SHARES = (1 / 8, 1 / 4, 1 / 2)
WAYS = {
    "uniform": "the same share everywhere",
    "spectra": "greedy by score variance",
    "weights": "the same, weighed by the measured loss",
    "schedule": "more in early layers",
}


NOT_FITTED = ("uniform", "weights")  # measured once more with the cut alone


def trained(name: str, said: dict, out: Path) -> Path:
    """The folder of a trained model of models.yaml."""
    row = said["models"][name]
    base = said["base"]
    trainer = base["trainer"] | {"learning_rate": row["learning_rate"]}
    run = Run(model=row["model"], **base | {"trainer": trainer})
    train(run, out / name)
    return out / name


def measure(folder: Path, windows: int, checked: int) -> dict:
    """Loss increases of one model, with what the bounds on its weights say on held-out text."""
    model, text = load_compressed(folder), Calibration.of(folder, windows=windows)
    before = cross_entropy(model, text.held_out)
    layers, _ = plan_for(model, text, 0.5, by="spectra", cost="rank")
    weights = layer_weights(model, text.train)
    rows = []
    for share in SHARES:
        for way in WAYS:
            _, plan = plan_for(
                model, text, share, by=way, cost="rank", layers=layers, weights=weights
            )
            small, extra = deepcopy(model), {}
            done = compress_model(small, plan, text.train)
            if way in NOT_FITTED:
                bare = deepcopy(model)
                compress_model(bare, plan, text.train, steps=0)
                extra = {"not_fitted": cross_entropy(bare, text.held_out) - before}
            seen = inputs_of(model, text.held_out[:checked])
            bounds = [one.bounds(seen[layer]) for layer, one in done.items()]
            rows.append(
                {
                    "share": share,
                    "way": way,
                    "increase": cross_entropy(small, text.held_out) - before,
                    **extra,
                    "ranks": plan.ranks,
                    "exact": plan.exact,
                    "parameters": sum(p.numel() for p in small.parameters()),
                    **savings(model, plan, text),
                    "bounds": [asdict(one) for one in bounds],
                }
            )
            print(f"  {share:.3f} {way:9} {rows[-1]['increase']:+.4f}", flush=True)
    return {
        "loss": before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": [layer.name for layer in layers],
        "full": [layer.rank * layer.heads for layer in layers],
        "weights": weights,
        "held_out_tokens": text.held_out.numel(),
        "checked_tokens": text.held_out[:checked].numel(),
        "rows": rows,
    }


def bars(found: dict) -> list[tuple[str, float, float]]:
    """What was asked for: (what, figure, at most)."""
    by = {(row["share"], row["way"]): row for row in found["rows"]}
    eighth, quarter = (
        by[share, "weights"]["increase"] / by[share, "uniform"]["increase"] for share in SHARES[:2]
    )
    broken = sum(sum(one["violations"]) for row in found["rows"] for one in row["bounds"])
    return [
        ("1/8: weighed / uniform", eighth, 0.7),
        ("1/4: weighed / uniform", quarter, 0.4),
        ("1/2: weighed, nats", by[1 / 2, "weights"]["increase"], 0.005),
        ("rows above a bound", broken, 0),
    ]


def text_of(results: dict, said: dict) -> str:
    """The results as Markdown."""
    lines = []
    for name, found in results["models"].items():
        first = found["weights"][0]
        relative = ", ".join(f"{weight / first:.3f}" for weight in found["weights"])
        lines += [
            f"**{name}**: {said['models'][name]['about']}; held out {found['loss']:.4f} nats before, over"
            f" {found['held_out_tokens']:,} tokens; weights of the layers relative to the first: {relative}",
            "",
            "| rank kept | "
            + " | ".join(WAYS)
            + " | uniform, not fitted | weights, not fitted | ranks by layer, weights"
            + " | left of the model's FLOPs |",
            "| --- |" + " ---: |" * (len(WAYS) + 2) + " --- | ---: |",
        ]
        for share in SHARES:
            rows = {row["way"]: row for row in found["rows"] if row["share"] == share}
            one = rows["weights"]
            lines.append(
                f"| 1/{round(1 / share)} of {sum(found['full'])} | "
                + " | ".join(f"{rows[way]['increase']:+.4f}" for way in WAYS)
                + "".join(f" | {_bare(rows[way]):+.4f}" for way in NOT_FITTED)
                + f" | {' '.join(str(sum(r)) for r in one['ranks'])} | {one['model_flops']:.1%} |"
            )
        lines.append("")
        for what, value, most in bars(found):
            verdict = "met" if value <= most else "missed"
            lines.append(f"- {what}: {value:.4g}, at most {most:g}: {verdict}")
        lines += ["", f"![loss increase of {name}](results/{name}.png)", ""]
    return "\n".join(lines)


def _bare(row: dict) -> float:
    """The increase by the cut alone; rows without a fit have no other."""
    return row.get("not_fitted", row["increase"])


def publish(said: str) -> None:
    """Write the results into README.md, between its markers."""
    page = HERE / "README.md"
    before, rest = page.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{said}\n{END}{after}", "utf-8")


def main(argv: list[str] | None = None) -> None:
    said = yaml.safe_load((HERE / "models.yaml").read_text("utf-8"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocation", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*said["models"], []], help="all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/allocation"), help="of the runs")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=DIR", help="finished")
    parser.add_argument("--windows", type=int, default=64, help="of text, each side")
    parser.add_argument("--checked", type=int, default=8, help="windows whose rows are compared")
    parser.add_argument("--report", action="store_true", help="measure nothing, publish")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    folders = dict(pair.split("=", 1) for pair in given.run)
    file = RESULTS / "allocation.json"
    results = json.loads(file.read_text("utf-8")) if file.is_file() else {"models": {}}
    for name in [] if given.report else given.names or said["models"]:
        print(name, flush=True)
        folder = folders.get(name) or trained(name, said, given.out)
        results["models"][name] = measure(Path(folder), given.windows, given.checked)
        results |= {
            "command": "python -m benchmarks.allocation",
            "seed": said["base"]["seed"],
            "device": f"cpu, {torch.get_num_threads()} thread, float32; spectra and bounds float64",
            "versions": {
                "python": platform.python_version(),
                "cem": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "date": datetime.now(UTC).date().isoformat(),
        }
        file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    publish(text_of(results, said))
    for name, found in results["models"].items():
        table = {
            way: {
                row["share"]: max(row["increase"], 1e-4)
                for row in found["rows"]
                if row["way"] == way
            }
            for way in WAYS
        }
        (RESULTS / f"{name}.png").write_bytes(png(rank_plots.increases(table)))
    print(text_of(results, said))


if __name__ == "__main__":
    main()
