"""The layers of a model that move its state, with what they were called with.

Legend: B batch, T tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..layer import EnergyLayer
from .tie import kind_of

# (norm, module) of half a block, by their names in the block: Llama and its relatives, and `cem.lm`.
HALVES = (
    ("input_layernorm", "self_attn"),
    ("post_attention_layernorm", "mlp"),
    ("norm", "module"),
)
# What a module of transformers is given beside its state and has to be given again.
KEPT = ("attention_mask", "position_embeddings")
# What an energy layer of a language model may be given beside them, and cannot be given again.
DROPPED = ("cache", "memory")


@dataclass(frozen=True)
class Sublayer:
    """One call of a part of a model that moves the state: h becomes h + u.

    Attributes:
        name: its path in the model.
        kind: ``"energy"``, ``"attention"`` or ``"mlp"`` (of transformers), or ``"module"``.
        module: an :class:`~cem.EnergyLayer`, or what gives u, or h + u if ``residual``, from ``norm(h)``.
        norm: what stands in front, or None.
        rotary: of rotary attention, what makes its cosines and sines.
        h, u: the state before and the update, (B, T, D).
        inputs: further arguments of the module.
    """

    name: str
    kind: str
    module: nn.Module
    norm: nn.Module | None = None
    rotary: nn.Module | None = None
    residual: bool = False
    h: Tensor | None = field(default=None, repr=False)
    u: Tensor | None = field(default=None, repr=False)
    inputs: dict = field(default_factory=dict, repr=False)

    def rows(self, chosen: slice) -> Sublayer:
        """The same call of some of the sequences."""
        count = len(self.h)

        def cut(value):
            if isinstance(value, tuple):
                return tuple(map(cut, value))
            batched = isinstance(value, Tensor) and value.dim() > 1 and len(value) == count
            return value[chosen] if batched else value

        inputs = {name: cut(value) for name, value in self.inputs.items()}
        return replace(self, h=self.h[chosen], u=self.u[chosen], inputs=inputs)


def sublayers(
    model: nn.Module, *inputs, layers: Sequence[str] = (), **keywords
) -> tuple[Sublayer, ...]:
    """Run a model once and return its layers that move the state, in the order of their calls.

    Found are energy layers, attention and gated MLPs of Llama and its relatives, and ``nn.TransformerEncoderLayer``;
    of other modules give the names in ``layers``.

    Raises:
        ValueError: nothing is found, or nothing that is found was called; a name that is not there.
    """
    found = list(_found(model, layers))
    if not found:
        raise ValueError(
            f"no layer to analyse in {type(model).__name__}: energy layers, attention and gated MLPs like Llama's and"
            ' nn.TransformerEncoderLayer are found; name others, `layers=("blocks.0",)`'
        )
    calls: list[Sublayer] = []
    states: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack, torch.no_grad():
        for part in found:
            if part.norm is not None:

                def read(_, args, out, name=part.name):
                    states[name] = args[0].detach(), out.detach()

                stack.callback(part.norm.register_forward_hook(read).remove)

            def called(_, args, given, out, part=part):
                calls.append(_call(part, states.get(part.name), args, dict(given), out))

            stack.callback(part.module.register_forward_hook(called, with_kwargs=True).remove)
        model(*inputs, **keywords)
    if not calls:
        raise ValueError(
            f"{type(model).__name__} called none of its layers {', '.join(p.name for p in found)}"
        )
    return tuple(calls)


def _found(model: nn.Module, layers: Sequence[str]) -> Iterator[Sublayer]:
    known = dict(model.named_modules())
    for name in layers:
        if name not in known:
            raise ValueError(
                f"{type(model).__name__} has no submodule {name!r}: type one of its names, such as"
                f" {', '.join(list(known)[1:4])}"
            )
        yield Sublayer(name, "module", known[name])
    if layers:
        return
    shared = next(
        (m for m in known.values() if isinstance(getattr(m, "inv_freq", None), Tensor)), None
    )
    for path, module in known.items():
        if isinstance(module, EnergyLayer):
            yield Sublayer(path or module.energy_function.name, "energy", module)
        elif isinstance(module, nn.TransformerEncoderLayer):
            yield Sublayer(path or "layer", "module", module, residual=True)
        for norm, part in HALVES:
            inner = getattr(module, part, None)
            kind = kind_of(inner) if isinstance(inner, nn.Module) else None
            if kind is not None:
                rotary = getattr(module, "rotary", shared)
                name = f"{path}.{part}" if path else part
                yield Sublayer(name, kind, inner, getattr(module, norm, None), rotary)
    if kind_of(model) is not None:
        yield Sublayer(kind_of(model), kind_of(model), model, rotary=shared)


def _call(part: Sublayer, read, args: tuple, given: dict, out) -> Sublayer:
    out = (out[0] if isinstance(out, tuple) else out).detach()
    g = (args[0] if args else given.pop("hidden_states")).detach()
    if part.kind == "energy":
        inputs = {name: value for name, value in given.items() if name not in DROPPED}
        return replace(part, h=g, u=out - g, inputs=inputs)
    if part.kind == "module":
        return replace(part, h=g, u=out - g if part.residual else out, inputs=given)
    inputs = {name: given[name] for name in KEPT if given.get(name) is not None}
    if read is None or read[1].shape != g.shape or not torch.equal(read[1], g):
        return replace(
            part, norm=None, h=g, u=out, inputs=inputs
        )  # another norm than the one known
    rotary = part.rotary if "position_embeddings" in inputs else None
    return replace(part, rotary=rotary, h=read[0], u=out, inputs=inputs)
