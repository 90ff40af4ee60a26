"""Models whose attention was cut to lower ranks, saved and loaded."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cem.compression import LowRankAttention, described
from cem.layer import EnergyLayer

from .config import CEMConfig
from .layers import OPTIONS, energy_in_groups, usual_sizes
from .model import CEMForCausalLM
from .quiet import quiet
from .routed import layers_of

KEY = "low_rank_attention"


@quiet()
def save_compressed(model: PreTrainedModel, folder: str | PathLike) -> Path:
    """Save a model that :func:`cem.compression.compress_model` has cut.

    Energy layers stand in the configuration with their new energy and sizes, so ``from_pretrained`` reads such a model
    as any other. Attention of Llama or GPT-2 is written with its ranks beside the configuration of the model, for
    :func:`load_compressed`.

    Args:
        model: of transformers.
        folder: where to write.

    Returns:
        The folder.
    """
    low = {
        name: {"ranks": module.ranks, "planes": module.planes}
        for name, module in model.named_modules()
        if isinstance(module, LowRankAttention)
    }
    config = model.config
    if isinstance(config, CEMConfig):
        blocks = [list(parts) for parts in config.blocks]
        for block, parts in zip(model.model.layers, blocks, strict=True):
            for place, (name, part) in enumerate(block.parts.items()):
                said, layers = parts[place], layers_of(part)
                if "parts" in said:
                    pairs = zip(layers, said["parts"], strict=True)
                    parts[place] = {**said, "parts": [_now(*pair) for pair in pairs]}
                else:
                    parts[place] = _now(layers[0], said, name)
        config.layers = blocks
    if low:
        setattr(config, KEY, low)
    model.save_pretrained(folder)
    return Path(folder)


def _now(layer: nn.Module, part: dict, name: str | None = None) -> dict:
    """The description of a layer after a cut, from the one before."""
    if not isinstance(layer, EnergyLayer) or _is_as_said(layer, part):
        return part
    kept = {k: v for k, v in part.items() if k in OPTIONS and k not in ("head_groups", "init")}
    return kept | described(layer) | ({} if name is None else {"name": name})


def _is_as_said(layer: EnergyLayer, part: dict) -> bool:
    energy, said = energy_in_groups(part, "layer")
    sizes = usual_sizes(layer.dim, said.get("heads")) | said
    sized = all(sizes.get(size, value) == value for size, value in layer.sizes.items())
    return sized and energy == layer.energy_function


@quiet()
def load_compressed(folder: str | PathLike) -> PreTrainedModel:
    """A causal language model that :func:`save_compressed` wrote, or any other, in eval mode.

    Raises:
        ValueError: the folder holds no model, or weights of other layers.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"there is no model in {folder}: got no config.json there; type the folder of a saved model"
        )
    config = AutoConfig.from_pretrained(folder)
    low = getattr(config, KEY, None)
    if not low:
        kind = CEMForCausalLM if isinstance(config, CEMConfig) else AutoModelForCausalLM
        return kind.from_pretrained(folder).eval()
    model = AutoModelForCausalLM.from_config(config)
    for name, said in low.items():
        module: nn.Module = model.get_submodule(name)
        model.set_submodule(name, LowRankAttention.like(module, said["ranks"], said["planes"]))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise ValueError(
            f"{folder} has the weights of other layers: got {[*unexpected, *missing][:4]}; save it with"
            " `cem.hf.save_compressed`"
        )
    model.tie_weights()
    return model.eval()
