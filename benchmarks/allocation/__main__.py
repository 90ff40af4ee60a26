"""What measuring is worth when rank is taken away: ``python -m benchmarks.allocation``.

Trains the models of models.yaml where their runs are missing (``--out``), or takes finished runs (``--run llama=DIR``);
then shares out 1/8, 1/4 and 1/2 of the rank of their attention scores, and measures the held-out loss with cuts that
are fitted and with the cut alone. Plans by loss are made for the one or the other.
"""

from __future__ import annotations

import argparse
import json
import platform
from copy import deepcopy
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import transformers
import yaml

from cem import rank_plots
from cem._version import __version__
from cem.compression import compress_model, cross_entropy, inputs_of, spectra
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
    "loss": "by what each rank of each head is worth to the predictions",
    "spectra": "by score variance",
    "schedule": "more in early layers",
}
CUTS = {  # kind: (steps of the fit, the ways that are measured)
    "fitted": (40, ("uniform", "loss")),
    "cut alone": (0, tuple(WAYS)),
}


def trained(name: str, said: dict, out: Path) -> Path:
    """The folder of a trained model of models.yaml."""
    row = said["models"][name]
    base = said["base"]
    trainer = base["trainer"] | {"learning_rate": row["learning_rate"]}
    run = Run(model=row["model"], **base | {"trainer": trainer})
    train(run, out / name)
    return out / name


def measure(folder: Path, windows: int, held_out: int, checked: int) -> dict:
    """Loss increases of one model, with what the bounds on its weights say on held-out text."""
    model = load_compressed(folder)
    text = Calibration.of(folder, windows=windows, held_out=held_out)
    before = cross_entropy(model, text.held_out)
    bare, rows = spectra(model, text.train), []
    for kind in CUTS:
        rows += rows_of(model, text, kind, CUTS[kind][1], checked)
    return {
        "loss": before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": [layer.name for layer in bare],
        "full": [layer.rank * layer.heads for layer in bare],
        "fitted_tokens": text.train.numel(),
        "held_out_tokens": text.held_out.numel(),
        "checked_tokens": text.held_out[:checked].numel(),
        "rows": rows,
    }


def rows_of(model, text: Calibration, kind: str, ways: tuple[str, ...], checked: int) -> list[dict]:
    """The measurements of one kind of cut, for some ways to share the rank out."""
    before, steps, rows = cross_entropy(model, text.held_out), CUTS[kind][0], []
    for way in ways:
        layers, _ = plan_for(model, text, 0.5, by=way, steps=steps)
        for share in SHARES:
            _, plan = plan_for(model, text, share, by=way, cost="rank", layers=layers)
            small = deepcopy(model)
            done = compress_model(small, plan, text.train, steps=steps)
            seen = inputs_of(model, text.held_out[:checked])
            bounds = [one.bounds(seen[layer]) for layer, one in done.items()]
            row = {
                "kind": kind,
                "share": share,
                "way": way,
                "increase": cross_entropy(small, text.held_out) - before,
                "ranks": plan.ranks,
                "exact": plan.exact,
                "parameters": sum(p.numel() for p in small.parameters()),
                **savings(model, plan, text),
                "bounds": [asdict(one) for one in bounds],
            }
            rows.append(row)
            print(f"  {kind:9} {share:.3f} {way:9} {row['increase']:+.4f}", flush=True)
    return rows


def of(found: dict, kind: str, share: float, way: str) -> dict:
    """The row of one measurement."""
    return next(
        row
        for row in found["rows"]
        if (row["kind"], row["share"], row["way"]) == (kind, share, way)
    )


def bars(found: dict) -> list[tuple[str, float, float]]:
    """What was asked for: (what, figure, at most)."""
    rows = []
    for kind in CUTS:
        nats = partial(of, found, kind)
        for share, most in zip(SHARES[:2], (0.7, 0.4), strict=True):
            ratio = nats(share, "loss")["increase"] / nats(share, "uniform")["increase"]
            rows.append((f"{kind}, 1/{round(1 / share)}: by loss / uniform", ratio, most))
    broken = sum(sum(one["violations"]) for row in found["rows"] for one in row["bounds"])
    return [
        *rows,
        ("fitted, 1/2: by loss, nats", of(found, "fitted", 1 / 2, "loss")["increase"], 0.005),
        ("rows above a bound", broken, 0),
    ]


def text_of(results: dict, said: dict) -> str:
    """The results as Markdown."""
    columns = [(kind, way) for kind, (_, ways) in CUTS.items() for way in ways]
    lines = []
    for name, found in results["models"].items():
        lines += [
            f"**{name}**: {said['models'][name]['about']}; held out {found['loss']:.4f} nats before, over"
            f" {found['held_out_tokens']:,} tokens",
            "",
            "| rank kept | "
            + " | ".join(f"{kind}: {way}" for kind, way in columns)
            + " | ranks by layer, fitted: loss | left of the model's FLOPs |",
            "| --- |" + " ---: |" * len(columns) + " --- | ---: |",
        ]
        for share in SHARES:
            one = of(found, "fitted", share, "loss")
            lines.append(
                f"| 1/{round(1 / share)} of {sum(found['full'])} | "
                + " | ".join(
                    f"{of(found, kind, share, way)['increase']:+.4f}" for kind, way in columns
                )
                + f" | {' '.join(str(sum(r)) for r in one['ranks'])} | {one['model_flops']:.1%} |"
            )
        lines.append("")
        for what, value, most in bars(found):
            verdict = "met" if value <= most else "missed"
            lines.append(f"- {what}: {value:.4g}, at most {most:g}: {verdict}")
        lines += ["", f"![loss increase of {name}](results/{name}.png)", ""]
    return "\n".join(lines)


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
    parser.add_argument("--windows", type=int, default=32, help="of text that cuts are fitted to")
    parser.add_argument("--held-out", type=int, default=64, help="windows that losses are of")
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
        results["models"][name] = measure(
            Path(folder), given.windows, given.held_out, given.checked
        )
        results |= {
            "command": f"python -m benchmarks.allocation --windows {given.windows}",
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
            f"{way}, {kind}": {
                share: max(of(found, kind, share, way)["increase"], 1e-4) for share in SHARES
            }
            for kind in CUTS
            for way in ("uniform", "loss")
        }
        (RESULTS / f"{name}.png").write_bytes(png(rank_plots.increases(table)))
    print(text_of(results, said))


if __name__ == "__main__":
    main()
