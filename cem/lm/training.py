"""Train a language model, compare it with what was held out, and let it write.

Nothing here knows which model it is, except that energy layers get an energy trace. The loop is
the one of ``transformers.Trainer``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from .._version import __version__
from . import grow, pictures
from .callbacks import Clock, Energies, Finite, Metrics, Progress, Records, has_energies
from .data import Data
from .model import CEMForCausalLM  # noqa: F401 (so that the Auto classes know it)
from .presets import preset
from .quiet import quiet
from .run import Run, planned, refuse_unknown
from .throughput import flops_per_token, peak_flops
from .trainer import PARTIAL, Trainer, checkpoints

_TRACED_TOKENS = 2048  # of the fixed batch whose energies are recorded
_ENGINES = ("fsdp", "fsdp_config", "deepspeed")  # of training; a finished model needs none


@dataclass(frozen=True)
class Result:
    """What a finished run has to show; ``out/result.json``.

    Attributes:
        loss: held-out loss in nats a token, over all held-out windows.
        bits_per_byte: the same per byte of text, so that tokenizers can be compared.
        parameters: numbers that were learned; tied ones count once.
        tokens: how many were trained on.
        tokens_per_second: the median over the logged intervals, without evaluating and saving.
        flops_per_token: of training; :func:`cem.lm.throughput.flops_per_token` says what is counted.
        mfu: the share of the devices' peak that tokens_per_second is.
        peak_memory: bytes; on a GPU what torch allocated, on a CPU the whole process.
        seconds: spent training, over all interruptions.
        device, digest, seed: where, on which data, from which start.
    """

    loss: float
    bits_per_byte: float
    parameters: int
    steps: int
    tokens: int
    tokens_per_second: float
    flops_per_token: float
    mfu: float
    peak_memory: int
    seconds: float
    device: str
    processes: int
    digest: str
    seed: int

    @classmethod
    def read(cls, out: str | Path) -> Result:
        """The result in the folder of a finished run."""
        return cls(**json.loads((Path(out) / "result.json").read_text("utf-8")))


def build(model: str | dict, tokenizer, plan: str | None = None) -> transformers.PreTrainedModel:
    """A new model for a tokenizer, from the ``model`` and ``plan`` of a :class:`Run`; raises as :func:`configure`."""
    return AutoModelForCausalLM.from_config(planned(configure(model, tokenizer), plan))


def configure(model: str | dict, tokenizer) -> transformers.PreTrainedConfig:
    """The configuration of the model for a tokenizer that the ``model`` of a :class:`Run` says.

    Raises:
        ValueError: there is no such preset or kind of model, its configuration has no such name, or
            its vocabulary is smaller than the tokenizer's.
    """
    said = {"preset": model} if isinstance(model, str) else dict(model)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    given = {name: getattr(tokenizer, name) for name in special}
    given["vocab_size"] = len(tokenizer)
    if "preset" in said:
        usual = preset(said.pop("preset"))
        make = partial(preset, model["preset"] if isinstance(model, dict) else model)
    elif "model_type" in said:
        name = said.pop("model_type")
        refuse_unknown([name], transformers.CONFIG_MAPPING, "model_type ")
        usual = AutoConfig.for_model(name)
        make = type(usual)
    else:
        raise ValueError(
            f"`model` of a run needs a preset or a model_type: got {said}; type `model.preset=tiny`"
        )
    refuse_unknown(said, {*usual.to_dict(), "attn_implementation", "dtype"}, "model.")
    config = make(**(given | said))
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"the vocabulary of the model is smaller than the tokenizer's: got {config.vocab_size} "
            f"and {len(tokenizer)}; leave out `model.vocab_size`"
        )
    return config


def arguments(run: Run, out: str | Path) -> TrainingArguments:
    """The training arguments of a run: bfloat16 on a GPU, of which a process takes one.

    Raises:
        ValueError: TrainingArguments does not take one of the values, or the processes that were
            started do not find each other.
    """
    gpu = torch.cuda.is_available()
    given = {"bf16": gpu, "dataloader_pin_memory": gpu, "data_seed": run.seed}
    # Without this, processes on a CPU would each train alone.
    given |= {"use_cpu": not torch.accelerator.is_available()} | run.trainer
    try:
        args = TrainingArguments(output_dir=str(out), seed=run.seed, **given)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(
            f"`trainer` of the run is refused: got {' '.join(str(error).split())}"
        ) from error
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != args.world_size:
        raise ValueError(
            f"the processes of {out} do not work together: got {started} that were started and "
            f"{args.world_size} on {args.device.type} in a group; type `trainer.use_cpu=true`, or start one"
        )
    args._n_gpu = min(1, args.n_gpu)
    return args


@quiet()
def train(run: Run, out: str | Path) -> Result:
    """Train a model, or go on where an interrupted training of the same run stopped.

    The folder ``out`` then holds run.yaml, versions.json, metrics.jsonl, energies.jsonl (for energy
    layers), loss.png, energies.png, the model with its tokenizer as ``from_pretrained`` reads them,
    the last checkpoints, and result.json, which is written last. A run that has a result is not
    run again. On a CPU a resumed run takes the same losses to the last bit.

    Raises:
        ValueError: ``out`` holds another run, or something in the run cannot be had.
        FloatingPointError: the training loss is not a number.
    """
    out = Path(out)
    _same_run(run, out)
    if (out / "result.json").is_file():
        return Result.read(out)
    trainer, prepared = _trainer(run, out)
    args, model = trainer.args, trainer.model
    last = checkpoints(out)[-1] if checkpoints(out) else None
    state = transformers.TrainerState.load_from_json(last / "trainer_state.json") if last else None
    step = state.global_step if state else 0
    sequences = trainer.get_total_train_batch_size(args)
    _same_batch(sequences, args, out)
    _enough(prepared.train, sequences)
    trainer.accelerator.wait_for_everyone()  # all have read what is now written
    if args.should_save:
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        if not (out / "run.yaml").is_file():
            versions = _versions() | {"digest": prepared.digest, "data": prepared.versions}
            versions["sequences_per_step"] = sequences
            _write(out / "versions.json", json.dumps(versions, indent=2))
            _write(out / "run.yaml", run.to_yaml())
    context = len(prepared.train[0]["input_ids"])
    per_token = flops_per_token(model, prepared.train[0])
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    peak = peak_flops(args.device.type, dtype) * args.world_size

    def utilisation(tokens_per_second: float) -> float:
        return per_token * tokens_per_second / peak

    def records(name: str) -> Records | None:
        return Records(out / name, step) if args.should_save else None

    metrics = records("metrics.jsonl")
    before = metrics.lines[-1]["seconds"] if metrics and metrics.lines else 0.0
    clock = Clock(before)
    trainer.add_callback(clock)
    if run.trace_steps and has_energies(model):
        count = min(len(prepared.held_out), max(1, _TRACED_TOKENS // context))
        batch = transformers.default_data_collator([prepared.held_out[i] for i in range(count)])
        trainer.add_callback(Energies(records("energies.jsonl"), batch, run.trace_steps, clock))
    trainer.add_callback(Metrics(metrics, clock))
    trainer.add_callback(Finite())
    trainer.add_callback(Progress(clock, utilisation))

    if state and state.global_step >= state.max_steps:  # only the result is missing
        trainer.model = model = type(model).from_pretrained(last).to(args.device)
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    step = trainer.state.global_step
    logs = [line for line in trainer.state.log_history if "eval_loss" in line]
    held_out = logs[-1] if logs and logs[-1]["step"] == step else trainer.evaluate()
    model.config.use_cache = True  # which the trainer turned off
    trainer.save_model(str(out))
    if args.should_save:
        rate = _rate(metrics.lines)
        result = Result(
            loss=held_out["eval_loss"],
            bits_per_byte=held_out["eval_bits_per_byte"],
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            steps=step,
            tokens=trainer.state.num_input_tokens_seen,
            tokens_per_second=rate,
            flops_per_token=per_token,
            mfu=utilisation(rate),
            peak_memory=_peak_memory(args.device),
            seconds=clock.seconds,
            device=_device(args.device),
            processes=args.world_size,
            digest=prepared.digest,
            seed=run.seed,
        )
        pictures.save(out)
        _write(out / "result.json", json.dumps(asdict(result), indent=2))
    trainer.accelerator.wait_for_everyone()
    return Result.read(out)


@quiet()
def evaluate(out: str | Path) -> dict[str, float]:
    """The held-out loss of a trained model, computed anew: ``{"loss": nats, "bits_per_byte": bits}``.

    Raises:
        ValueError: there is no trained model in the folder.
    """
    out = _trained(out, "result.json")
    run = Run.read(out / "run.yaml")
    run = replace(run, trainer={k: v for k, v in run.trainer.items() if k not in _ENGINES})
    model = AutoModelForCausalLM.from_pretrained(out)
    trainer, _ = _trainer(run, out, model)
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in ("loss", "bits_per_byte")}


@quiet()
def sample(out: str | Path, prompt: str, *, tokens: int = 128, seed: int = 0, **options) -> str:
    """What a trained model writes after a prompt, with the prompt in front.

    Args:
        out: the folder of a trained run, or of one of its checkpoints.
        prompt: may be empty.
        tokens: how many to write at most.
        seed: of the draws.
        **options: of ``model.generate``, such as ``temperature=0.8``, ``top_k=50``.

    Raises:
        ValueError: there is no trained model in the folder.
    """
    out = _trained(out, "config.json")
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    ids = torch.tensor([ids], device=model.device)
    transformers.set_seed(seed)
    options = {"do_sample": True, "pad_token_id": tokenizer.eos_token_id} | options
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)
    return prompt + tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def _same_run(run: Run, out: Path) -> None:
    if not (out / "run.yaml").is_file():
        return
    if difference := run.difference(Run.read(out / "run.yaml")):
        name, mine, theirs = difference
        raise ValueError(
            f"{out} holds another run: its `{name}` is {theirs!r}, got {mine!r}; name another folder"
        )


def _trainer(run: Run, out: Path, model=None):
    """The trainer of a run, with a new model unless one is given, and its data."""
    args = arguments(run, out)
    if args.device.type == "cpu":
        torch.set_num_threads(run.threads)
    prepared = Data(**run.data).prepare()
    _same_data(prepared, out)
    begins = model is None
    if begins:
        transformers.set_seed(run.seed)
        words = prepared.tokenizer
        model = grow.begun(run, out, words) if run.grow else build(run.model, words, run.plan)
    trainer = Trainer(
        model,
        args,
        train_dataset=prepared.train,
        eval_dataset=prepared.held_out,
        processing_class=prepared.tokenizer,
        bytes_per_token=prepared.bytes_per_token,
        muon=run.optimizer == "muon",
        groups=run.groups,
    )
    for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
        trainer.remove_callback(callback)
    if begins and run.grow:
        grow.grown(trainer, run, out)
    return trainer, prepared


def _same_data(prepared, out: Path) -> None:
    if not (out / "versions.json").is_file():
        return
    versions = json.loads((out / "versions.json").read_text("utf-8"))
    if versions["digest"] != prepared.digest:
        raise ValueError(
            f"the data of {out} have changed since it began: got digest {prepared.digest} and not "
            f"{versions['digest']}; install the versions in {out / 'versions.json'}, or name another folder"
        )


def _same_batch(sequences: int, args: TrainingArguments, out: Path) -> None:
    """Refuse to go on with other steps than the run began with."""
    if not (out / "versions.json").is_file():
        return
    began = json.loads((out / "versions.json").read_text("utf-8")).get("sequences_per_step")
    if began in (None, sequences):
        return
    each, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    share, rest = divmod(began, args.world_size)
    advice = (
        f"type `trainer.gradient_accumulation_steps=1 trainer.per_device_train_batch_size={share}`"
    )
    advice = "start it with another number of processes" if rest else advice
    raise ValueError(
        f"a training step of {out} takes {began} sequences: got {each} a device x {times} accumulated "
        f"x {args.world_size} processes = {sequences}; {advice}"
    )


def _enough(windows, sequences: int) -> None:
    if len(windows) < sequences:
        raise ValueError(
            f"the data has fewer windows than one training step takes: got {len(windows)} and "
            f"{sequences}; type `trainer.per_device_train_batch_size={max(1, len(windows) // 2)}`"
        )


def _trained(out: str | Path, name: str) -> Path:
    """The folder, if it holds the file that a trained model has."""
    out = Path(out)
    if not (out / name).is_file():
        raise ValueError(
            f"there is no trained model in {out}: got no {name} there; "
            f"type `cem train RUN.yaml --out {out}`"
        )
    return out


def _rate(lines: list[dict]) -> float:
    """The median of tokens a second between two logs."""
    lines = [{"tokens": 0, "seconds": 0.0}, *(line for line in lines if "loss" in line)]
    rates = [
        (b["tokens"] - a["tokens"]) / max(b["seconds"] - a["seconds"], 1e-9)
        for a, b in zip(lines[:-1], lines[1:], strict=True)
    ]
    return statistics.median(rates) if rates else 0.0


def _versions() -> dict:
    names = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), "cem": __version__, **found}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # getrusage may tell the peak of the parent process
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write(path: Path, text: str) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
