"""Growth in a training run: it begins with the model of a finished run, made larger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..growth import RULES, Grown, grow
from .trainer import Trainer, checkpoints

_KEYS = {"from": str, "rule": str, "where": str, "noise": (int, float), "moments": bool}


def check(said: Mapping[str, Any]) -> None:
    """Refuse a ``grow`` of a run that cannot be read.

    Its keys are ``from``, the folder of a finished run; the sizes, ``hidden: 704``; and ``rule``, ``where`` and
    ``noise`` of :func:`cem.grow`. The optimiser goes on from the last checkpoint of the finished run, if it kept
    one; with ``moments: false``, FSDP or new gains it begins afresh.

    Raises:
        ValueError: no folder, no size, or a value of the wrong kind.

    >>> check({"from": "runs/tiny", "hidden": "704"})
    Traceback (most recent call last):
        ...
    ValueError: `grow.hidden` of a run is a size: got '704'; type `grow.hidden=704`
    """
    if not isinstance(said, Mapping) or "from" not in said:
        raise ValueError(
            f"`grow` of a run names the finished run that it begins with: got {said!r}; type `grow.from=runs/tiny`"
        )
    for key, value in said.items():
        if key in _KEYS:
            if not isinstance(value, _KEYS[key]):
                raise ValueError(
                    f"`grow.{key}` of a run has the wrong kind: got {value!r}; type `grow.{key}="
                    f"{dict(rule='frozen', where='*.gated*', noise=0.05, moments='true').get(key, 'runs/tiny')}`"
                )
        elif type(value) is not int:
            raise ValueError(
                f"`grow.{key}` of a run is a size: got {value!r}; type `grow.{key}=704`"
            )
    if said.get("rule", "frozen") not in RULES:
        raise ValueError(
            f"`grow.rule` of a run is one of {', '.join(RULES)}: got {said['rule']!r}; type `grow.rule=frozen`"
        )
    if not set(said) - set(_KEYS):
        raise ValueError(
            f"`grow` of a run needs a size that grows: got {dict(said)}; type `grow.hidden=704`"
        )


def begun(run, out: Path, tokenizer) -> PreTrainedModel:
    """The model of the finished run; of an interrupted run in ``out``, the one of its last checkpoint, which has grown.

    Raises:
        ValueError: there is no finished run, or it has another tokenizer.
    """
    if checkpoints(out):
        return AutoModelForCausalLM.from_pretrained(checkpoints(out)[-1])
    source = Path(run.grow["from"])
    if not (source / "result.json").is_file():
        raise ValueError(
            f"there is no finished run in {source} to grow: got no result.json there; "
            f"type `cem train RUN.yaml --out {source}`"
        )
    if AutoTokenizer.from_pretrained(source).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"the run in {source} has another tokenizer: got `data.tokenizer={run.data.get('tokenizer')}`; "
            f"type what `data` is in {source / 'run.yaml'}"
        )
    return AutoModelForCausalLM.from_pretrained(source)


def grown(trainer: Trainer, run, out: Path) -> Grown | None:
    """Grow the model of a trainer before its first step, with the moments of the finished run where it kept them.

    What was done is written to ``out/growth.txt``.
    """
    if checkpoints(out):
        return None
    args, said = trainer.args, dict(run.grow)
    source = checkpoints(said.pop("from"))
    state = source[-1] / "optimizer.pt" if source else None
    optimizer = None
    keeps = said.pop("moments", True) and not args.fsdp and said.get("rule") != "gain"
    if keeps and state is not None and state.is_file():
        optimizer = _restored(trainer, state)
    draw = torch.Generator().manual_seed(run.seed)
    found = grow(trainer.model, optimizer=optimizer, generator=draw, **said)
    if args.should_save:
        out.mkdir(parents=True, exist_ok=True)
        kept = "the finished run's" if optimizer is not None else "fresh"
        (out / "growth.txt").write_text(f"{found}\nmoments of the optimiser: {kept}\n", "utf-8")
    return found


def _restored(trainer: Trainer, file: Path) -> torch.optim.Optimizer | None:
    """The optimiser of a trainer, with the memory of the finished run; None where the two do not fit."""
    optimizer = trainer.create_optimizer()
    options = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    state = torch.load(file, map_location=trainer.args.device, weights_only=True)
    if [len(group["params"]) for group in state["param_groups"]] != sizes:
        trainer.optimizer = None
        return None
    optimizer.load_state_dict(state)
    for group, fresh in zip(optimizer.param_groups, options, strict=True):
        group.pop("initial_lr", None)
        group.update(fresh)
    return optimizer
