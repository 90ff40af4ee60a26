"""A model of energy layers as a folder that anybody loads, with its layers written out in torch."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Collection
from itertools import count
from os import PathLike
from pathlib import Path
from string import Template

from transformers import AutoConfig, AutoTokenizer

from cem import EnergyLayer, Routed

from .config import CEMConfig
from .layers import Residual
from .model import CEMForCausalLM
from .quiet import quiet
from .skeleton import CONFIGURATION, IMPORTS, LLAMA, MASK, MODELING, PLACES
from .sources import Sources, formatted
from .written import Written, check

RESERVED = set(re.findall(r"[A-Z]\w+", IMPORTS + MODELING))
AUTO_MAP = {
    "AutoConfig": "configuration_cem.CEMConfig",
    "AutoModel": "modeling_cem.CEMModel",
    "AutoModelForCausalLM": "modeling_cem.CEMForCausalLM",
}


def export(model: CEMForCausalLM, folder: str | PathLike, *, tokenizer=None) -> Path:
    """Write a model as a folder that loads without cem, with torch and transformers alone.

        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    ``modeling_cem.py`` has one class for each layer that differs, whose methods are the programs of that layer,
    ``layer.code``, cut where a cache holds what the context gives. Weights keep their names, so cem loads the
    folder too.

    Args:
        model: the model.
        folder: where to write; files of the same names are replaced.
        tokenizer: one of transformers, to be saved beside it.

    Returns:
        The folder.

    Raises:
        TypeError: another kind of model.
        ValueError: a layer that cannot be written out: one lowered to autograd, with an update rule that asks for
            energies or Hessians, or with a state of linear attention.

    >>> import tempfile, cem.hf
    >>> config = cem.hf.CEMConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)
    >>> folder = export(cem.hf.CEMForCausalLM(config), tempfile.mkdtemp())
    >>> sorted(file.name for file in folder.glob("*.py"))
    ['configuration_cem.py', 'modeling_cem.py']
    """
    if not isinstance(model, CEMForCausalLM):
        raise TypeError(
            f"`export` takes a CEMForCausalLM: got {type(model).__name__}; other models of transformers are saved by"
            " `model.save_pretrained(folder)`"
        )
    config, folder = copy.deepcopy(model.config), Path(folder)
    written = modeling(model)
    model.save_pretrained(folder)
    config.architectures, config.auto_map = [type(model).__name__], AUTO_MAP
    config.dtype = model.dtype
    config.save_pretrained(folder)
    fields = {key: repr(value) for key, value in config.to_dict().items()}
    (folder / "configuration_cem.py").write_text(Template(CONFIGURATION).substitute(fields))
    (folder / "modeling_cem.py").write_text(written)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@quiet()
def export_saved(saved: str | PathLike, folder: str | PathLike) -> Path:
    """:func:`export` a model that ``save_pretrained`` or a run wrote, with its tokenizer if it has one.

    Raises:
        ValueError: there is no model of energy layers in the folder, or one that :func:`export` refuses.
    """
    if not (Path(saved) / "config.json").is_file():
        raise ValueError(
            f"there is no trained model in {saved}: got no config.json there; "
            "type the folder of a finished run, or of one of its checkpoints"
        )
    config = AutoConfig.from_pretrained(saved)
    if not isinstance(config, CEMConfig):
        raise ValueError(
            f"{saved} holds no model of energy layers: got a {config.model_type}, "
            "which loads without cem as it is"
        )
    model = CEMForCausalLM.from_pretrained(saved)
    has_tokenizer = (Path(saved) / "tokenizer_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(saved) if has_tokenizer else None
    return export(model, folder, tokenizer=tokenizer)


def modeling(model: CEMForCausalLM) -> str:
    """The text of ``modeling_cem.py``."""
    sources, classes, blocks, extra = Sources(), {}, [], dict.fromkeys((MASK, PLACES), False)
    for block in model.model.layers:
        row = []
        for name, part in block.parts.items():
            if isinstance(part, Routed):
                raise ValueError(
                    f"block {block.index}, part `{name}` cannot be exported: a router stands before it; keep it with"
                    " `model.save_pretrained` and load it with cem"
                )
            if isinstance(part, EnergyLayer):
                check(part, f"block {block.index}, part `{name}`")
                written = Written(part, sources)
                source, extra[PLACES] = written.source, extra[PLACES] or written.placed
            else:
                source, extra[MASK] = _llama(part), extra[MASK] or part.context
            label = classes.setdefault(source, _class_name(name, classes.values()))
            row.append(f'"{name}": {label}')
        blocks.append(f"{{{', '.join(row)}}}")
    layers = [source.replace("$name", label, 1) for source, label in classes.items()]
    slots = [block.slot for block in model.model.layers]
    behind = slots != list(range(len(slots)))  # some block keeps nothing in a cache
    body = Template(MODELING).substitute(
        imports="",
        parts="\n\n\n".join(part.rstrip() for part in (*sources.texts.values(), *layers)),
        blocks=_blocks(blocks),
        forward=inspect.getsource(CEMForCausalLM.forward),
        extra="".join(text for text, wanted in extra.items() if wanted),
        slot="index" if not behind else f"{slots}[index]",
    )
    sources.read_imports(IMPORTS)
    imports = sources.import_lines(body) + "\n\nfrom .configuration_cem import CEMConfig\n"
    return body.replace("\n\n\n\n", f"\n\n{imports}\n", 1)


def _class_name(name: str, taken: Collection[str]) -> str:
    """``rotary_interaction`` as ``RotaryInteraction``, with a number where another layer has that name."""
    stem = "".join(word[:1].upper() + word[1:] for word in re.split(r"\W|_", name))
    stem = f"Layer{stem}" if stem in RESERVED or not stem[:1].isalpha() else stem
    numbers = count(2)
    label = stem
    while label in taken:
        label = f"{stem}{next(numbers)}"
    return label


def _blocks(rows: list[str]) -> str:
    """The table of the parts of all blocks; blocks that are equal are written once."""
    kinds = list(dict.fromkeys(rows))
    if len(kinds) == 1:
        table = [f"PARTS = {kinds[0]}", f"BLOCKS = [PARTS] * {len(rows)}"]
    else:
        names = {row: f"PARTS_{number}" for number, row in enumerate(kinds, 1)}
        table = [f"{name} = {row}" for row, name in names.items()]
        table.append(f"BLOCKS = [{', '.join(names[row] for row in rows)}]")
    return "\n".join(["# The parts of each block, by name.", *(formatted(t, 0) for t in table)])


def _llama(part: Residual) -> str:
    """The class of a half of a Llama block."""
    its = part.config
    fields = {key: json.dumps(value) for key, value in its.to_dict().items()}
    return Template(LLAMA["attention" if part.context else "mlp"]).safe_substitute(fields)
