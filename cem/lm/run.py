"""Run: everything that a training run depends on, as one YAML file says it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

from .data import Data

# What is usual in pretraining, where `transformers.TrainingArguments` is made for fine-tuning.
# A number of steps below 1 is a share of all steps.
DEFAULTS = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.02,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "dataloader_drop_last": True,
    "ddp_find_unused_parameters": False,
}

# Names of TrainingArguments that a Run says elsewhere.
_ELSEWHERE = {
    "output_dir": "the folder is an argument of `train`: type `--out DIR`",
    "seed": "type `seed=0`, without `trainer.`",
    "include_num_input_tokens_seen": "tokens are always counted: leave it out",
    "use_cache": "training needs no cache, and with one packed documents see each other: leave it out",
}

# What may change between the start of a run and its resumption: how it is computed, not what.
_HOW = {
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "save_total_limit",
    "report_to",
    "run_name",
    "disable_tqdm",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "ddp_backend",
    "ddp_find_unused_parameters",
    "torch_compile",
    "use_cpu",
    "dataloader_num_workers",
    "dataloader_pin_memory",
}


@dataclass(frozen=True)
class Run:
    """What to train, on what, and how; the same for every kind of model.

    Args:
        model: the name of a preset, or a dictionary: ``{"preset": name}`` with changes, or a whole
            configuration with its ``model_type``. The size of the vocabulary is the tokenizer's.
        data: the fields of :class:`cem.lm.Data`.
        trainer: names of ``transformers.TrainingArguments``, verbatim, over :data:`DEFAULTS`.
        optimizer: ``"adamw"`` is what ``trainer.optim`` names, by default fused AdamW; ``"muon"``
            is :class:`cem.lm.optimizer.Muon`.
        groups: learning rates and weight decay of some parameters by patterns of their names,
            ``{"*.Q": {"learning_rate": 0.5, "weight_decay": 0.0}}``, see
            :func:`cem.lm.optimizer.parameter_groups`.
        trace_steps: after how many steps the energies of the layers are recorded; 0 is never.
        threads: of torch, on a CPU.
        seed: of the parameters and of the order of the data.
        grow: begin with the model of a finished run and grow it, in place of ``model``:
            ``{"from": FOLDER, "hidden": 704}``, see :func:`cem.lm.grow.check`.
        plan: a YAML file of ``cem allocate``, whose heads and ranks the layers of the model take; None for those of
            the model.

    Raises:
        ValueError: a name that nothing reads, or a value of the wrong kind.

    >>> run = Run(model="tiny", trainer={"max_steps": 20})
    >>> run.trainer["max_steps"], run.trainer["adam_beta2"]
    (20, 0.95)
    >>> Run.from_yaml(run.to_yaml()) == run
    True
    """

    model: str | dict = "tiny"
    data: dict = field(default_factory=dict)
    trainer: dict = field(default_factory=dict)
    optimizer: str = "adamw"
    groups: dict = field(default_factory=dict)
    trace_steps: int = 100
    threads: int = 1
    seed: int = 0
    grow: dict | None = None
    plan: str | None = None

    def __post_init__(self):
        for name in ("data", "trainer", "groups"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(
                    f"`{name}` of a run holds names and values: got {getattr(self, name)!r}; "
                    f"type `{name}.NAME=VALUE`"
                )
        if not isinstance(self.model, str | dict):
            raise ValueError(
                f"`model` of a run is a preset or a configuration: got {self.model!r}; "
                "type `model=tiny`"
            )
        if not isinstance(self.plan, str | None) or (self.plan and self.grow):
            raise ValueError(
                f"`plan` of a run is the path of a plan, and not beside `grow`: got {self.plan!r}; type"
                " `plan=plan.yaml`"
            )
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(
                f"`optimizer` of a run must be adamw or muon: got {self.optimizer!r}; "
                "another one is named by `trainer.optim=NAME`"
            )
        for pattern, said in self.groups.items():
            numbers = isinstance(said, dict) and all(
                type(value) in (int, float) and value >= 0 for value in said.values()
            )
            if not numbers or not set(said) <= {"learning_rate", "weight_decay"}:
                raise ValueError(
                    f"`groups` of a run hold numbers from 0 under a pattern of names: got {pattern!r}: {said!r}; "
                    'type `groups={"*.Q": {learning_rate: 0.5, weight_decay: 0.0}}`'
                )
        for name, least in (("trace_steps", 0), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"`{name}` of a run must be an integer from {least}: got {value!r}; "
                    f"type `{name}={max(1, least)}`"
                )
        for name, advice in _ELSEWHERE.items():
            if name in self.trainer:
                raise ValueError(
                    f"`trainer.{name}` has another place: got {self.trainer[name]!r}; {advice}"
                )
        from transformers import TrainingArguments

        refuse_unknown(self.trainer, [f.name for f in fields(TrainingArguments)], "trainer.")
        refuse_unknown(self.data, [f.name for f in fields(Data)], "data.")
        object.__setattr__(self, "trainer", DEFAULTS | self.trainer)
        if self.grow is not None:
            from .grow import check

            check(self.grow)

    @classmethod
    def from_yaml(cls, text: str, changes: Sequence[str] = ()) -> Run:
        """The run that a YAML text says, with changes such as ``"trainer.max_steps=20"``.

        Raises:
            ValueError: not YAML, not names and values, or a name that nothing reads.

        >>> Run.from_yaml("seed: 3", ["trainer.learning_rate=3e-4"]).trainer["learning_rate"]
        0.0003
        """
        said = read_yaml(text, "a run")
        said = {} if said is None else said
        if not isinstance(said, dict):
            raise ValueError(
                f"a run is written `name: value`: got {said!r:.60}; type `model: tiny`"
            )
        for change in changes:
            set_value(said, *parsed(change))
        refuse_unknown(said, [f.name for f in fields(cls)], "")
        return cls(**said)

    @classmethod
    def read(cls, path: str | Path, changes: Sequence[str] = ()) -> Run:
        """The run in a YAML file, with changes such as ``"trainer.max_steps=20"``.

        Raises:
            ValueError: there is no such file, or as :meth:`from_yaml`.
        """
        return cls.from_yaml(file_text(path, "run"), changes)

    def to_yaml(self) -> str:
        """The run with all its defaults, as :meth:`from_yaml` reads it."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)

    def difference(self, other: Run) -> tuple[str, object, object] | None:
        """The first name whose value would change what is computed, with both values.

        >>> Run(seed=0).difference(Run(seed=1))
        ('seed', 0, 1)
        >>> Run(threads=1).difference(Run(threads=2)) is None
        True
        """
        mine, theirs = _flat(asdict(self)), _flat(asdict(other))
        how = {"threads", "trace_steps", "data.cache", *(f"trainer.{name}" for name in _HOW)}
        for name in (*mine, *theirs):
            if name not in how and mine.get(name) != theirs.get(name):
                return name, mine.get(name), theirs.get(name)
        return None


def planned(config, plan: str | None):
    """The configuration with the heads and ranks of a plan in a YAML file, or as it is without one.

    Raises:
        ValueError: as :meth:`cem.allocation.Plan.read` and ``apply``.
    """
    from cem.allocation import Plan

    return config if plan is None else Plan.read(plan).apply(config)


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse the first name that is not known, with the nearest that is.

    >>> refuse_unknown(["contxt"], ["context", "source"], "data.")
    Traceback (most recent call last):
        ...
    ValueError: a run has no `data.contxt`: got that name; type `data.context`
    """
    known = list(known)
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            advice = f"type `{where}{nearest[0]}`" if nearest else f"type one of {', '.join(known)}"
            raise ValueError(f"a run has no `{where}{name}`: got that name; {advice}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's is older: 3e-4 is a number, and `no` is a text, not false."""


_OLDER = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _OLDER]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_OLDER[0], re.compile("(true|false|True|False)$"), "tfTF")
_NUMBER = r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.inf$|\.nan$"
_Loader.add_implicit_resolver(_OLDER[1], re.compile(_NUMBER), "-+.0123456789")


def file_text(path: str | Path, what: str) -> str:
    """The text of a file that the user has named, or one sentence that there is none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no {what} {path}: got that path; type that of a YAML file")
    return path.read_text("utf-8")


def read_yaml(text: str, where: str):
    """What a YAML 1.2 text says.

    Raises:
        ValueError: it is not YAML; the message begins with ``where``.

    >>> read_yaml("{rate: 3e-4, answer: no}", "a run")
    {'rate': 0.0003, 'answer': 'no'}
    """
    try:
        return yaml.load(text, _Loader)  # derived from SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(
            f"{where} is not YAML: got {' '.join(str(error).split())}; type `name: value`"
        ) from None


def parsed(change: str) -> tuple[str, object]:
    """The name and the value of a change, from ``a.b=value``."""
    name, equals, value = change.partition("=")
    if not equals or not all(name.split(".")):
        raise ValueError(
            f"a change of a run is written NAME=VALUE: got `{change}`; type `trainer.max_steps=20`"
        )
    return name, read_yaml(value, f"the value of `{name}`")


def set_value(said: dict, name: str, value) -> None:
    """Set the value of a dotted name, in place; numbers count the parts of a list.

    Raises:
        ValueError: the name leads through a value that holds no others, or past the end of a list.

    >>> said = {"model": "tiny", "parts": [{"steps": 1}]}
    >>> set_value(said, "model.hidden_size", 64)
    >>> set_value(said, "parts.0.steps", 2)
    >>> said
    {'model': {'preset': 'tiny', 'hidden_size': 64}, 'parts': [{'steps': 2}]}
    """
    place, keys = said, name.split(".")
    for depth, key in enumerate(keys):
        where = ".".join(keys[:depth])
        if where == "model" and isinstance(place, str):
            place = said["model"] = {"preset": place}
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                raise ValueError(
                    f"`{where}` in `{name}={value}` has {len(place)} parts, counted from 0: "
                    f"got {key!r}; type `{where}.0`"
                )
            key = int(key)
        elif not isinstance(place, dict):
            raise ValueError(
                f"`{where}` in `{name}={value}` holds one value: got {place!r}; type `{where}=VALUE`"
            )
        if depth == len(keys) - 1:
            place[key] = value
        else:
            place = place[key] if isinstance(place, list) else place.setdefault(key, {})


def _flat(tree: dict, prefix: str = "") -> dict:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat = {}
    for name, value in tree.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        flat |= inner or {f"{prefix}{name}": value}
    return flat
