"""Growth of a whole model: its layers are replaced where they are, and its optimiser goes on.

Legend: n old rows, k copies of a row.
"""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .layer import Carry, Growth, enlarged
from .search import EXACT, RULES, compared

Where = str | Callable[[str, nn.Module], bool] | None


class Grown(dict[str, tuple[Growth, ...]]):
    """What :func:`grow` did, by the name of the layer; it prints as a report, equal layers together."""

    def __str__(self) -> str:
        told: dict[str, list[str]] = {}
        for name, records in self.items():
            told.setdefault("\n".join(map(str, records)), []).append(name)
        return "\n".join(f"{', '.join(names)}\n{text}" for text, names in told.items())


def grow(
    model: nn.Module,
    *,
    rule: str = "frozen",
    where: Where = None,
    noise: float = 0.0,
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
    **sizes: int,
) -> Grown:
    """Grow named sizes of the layers inside a model, in place.

    A layer that has one of the sizes is replaced by ``layer.grow(...)`` of those that it has, see
    :meth:`cem.EnergyLayer.grow`; so is any module with a method ``grow(*, rule, generator, tokens)`` of its own.
    A layer that stands in several places grows once, and parameters that layers share stay shared. Either all of
    them grow or, where one is refused, none.

    Args:
        model: with layers inside; a language model of :mod:`cem.hf` keeps its configuration in step.
        rule, noise, generator: as for a layer.
        where: which layers: a pattern of names, ``"model.layers.?.parts.gated*"``, or called with name and module.
        optimizer: its groups are given the new parameters. What it remembers of a parameter, such as moments, is zero
            for new rows, or that of the origin's over k for copies (over k^2 for squares), and ``step`` goes on. A
            gain that a layer did not have gets a group of its own, without weight decay.
        **sizes: such as ``heads=8, hidden=704``.

    Returns:
        the records by the name of the layer; ``print`` tells what was done.

    Raises:
        ValueError: as for a layer; no layer has a size; a parameter to grow is shared with a module that does not grow.

    >>> import torch, cem
    >>> from cem.energies import gated, interaction
    >>> model = torch.nn.Sequential(
    ...     cem.derive(interaction, dim=8, heads=2, rank=4), cem.derive(gated, dim=8, hidden=16)
    ... )
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> h = torch.randn(1, 5, 8)
    >>> before, grown = model(h), grow(model, heads=3, hidden=24, optimizer=optimizer)
    >>> torch.allclose(model(h), before, atol=1e-6), model[1].U.shape, list(grown)
    (True, torch.Size([24, 8]), ['0', '1'])
    """
    if rule not in RULES:
        raise ValueError(
            f"`rule` is one of {', '.join(RULES)}: got {rule!r}; type `rule={RULES[0]!r}`"
        )
    targets = _targets(model, where, sizes)
    made: dict[int, nn.Module] = {}
    moved: dict[nn.Parameter, tuple[nn.Parameter, Carry | None]] = {}
    records, known = Grown(), {}
    options = {"rule": rule, "generator": generator}
    for name, (layer, wanted) in targets.items():
        if id(layer) in made:
            continue
        try:
            if hasattr(layer, "energy_function"):
                new, carries = enlarged(layer, wanted, noise=noise, known=known, **options)
                known |= {growth.key: growth.recipe for growth in new.growth}
            else:
                new, carries = layer.grow(**options, **wanted), {}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        made[id(layer)], records[name] = new, getattr(new, "growth", ())
        _share(name, layer, new, carries, moved)
    _refuse_shared(model, targets, moved)
    for name in targets:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(targets[name][0])])
    if optimizer is not None:
        _move(optimizer, moved)
        for layer, _ in targets.values():
            _add(optimizer, layer, made[id(layer)])
    for module in model.modules():
        if callable(getattr(module, "layers_have_grown", None)):
            module.layers_have_grown()
    return records


def _targets(model: nn.Module, where: Where, sizes: Mapping[str, int]) -> dict:
    """By every name of a layer that grows: the layer, and its sizes that do."""
    if not sizes:
        raise ValueError("`grow` grows named sizes: got none; type `cem.grow(model, hidden=704)`")
    found, known = {}, set()
    for name, module in model.named_modules(remove_duplicate=False):
        own = _sizes(module)
        if not own or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(where, str) and not fnmatch.fnmatch(name, where):
            continue
        if callable(where) and not where(name, module):
            continue
        known |= set(own)
        wanted = {key: value for key, value in sizes.items() if key in own and own[key] != value}
        if wanted and not name:
            raise ValueError(
                "`grow` replaces layers inside a model: got a layer itself; type"
                f" `layer = layer.grow({', '.join(f'{k}={v}' for k, v in wanted.items())})`"
            )
        if wanted:
            found[name] = module, wanted
    for key in sizes:
        if key not in known:
            raise ValueError(
                f"no layer{f' at {where}' if where else ''} has a size `{key}` to grow: got {key}={sizes[key]}; their"
                f" sizes are {', '.join(sorted(known)) or 'none'}"
            )
    return found


def _sizes(module: nn.Module) -> dict[str, int | None]:
    """The sizes that a module can grow, as they are: ``sizes``, or else what its method ``grow`` takes."""
    if not callable(getattr(module, "grow", None)):
        return {}
    if isinstance(getattr(module, "sizes", None), Mapping):
        return dict(module.sizes)
    taken = inspect.signature(module.grow).parameters.values()
    names = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
    return {n: getattr(module, n, None) for n in names if n not in ("rule", "generator", "noise")}


def _share(name: str, old: nn.Module, new: nn.Module, carries: Mapping[str, Carry], moved) -> None:
    """Keep what did not grow and take what another layer has grown, so that ties stay; note the rest in ``moved``."""
    shared: list[str] = []
    for key, before in old.named_parameters(remove_duplicate=False):
        parent, _, leaf = key.rpartition(".")
        after = new.get_parameter(key)
        if before in moved:
            known = moved[before][0]
            if known.shape != after.shape:
                raise ValueError(
                    f"layer `{name}` shares `{key}` with a layer that grows otherwise: got {tuple(after.shape)} and"
                    f" {tuple(known.shape)}; grow both by the same sizes"
                )
            setattr(new.get_submodule(parent), leaf, known)
            shared.append(key)
        elif before.shape == after.shape and torch.equal(before, after):
            setattr(new.get_submodule(parent), leaf, before)
        else:
            moved[before] = after, carries.get(key)
    if (
        shared
        and all(record.exact for record in new.growth)
        and (change := compared(new, old)) > EXACT
    ):
        raise ValueError(
            f"layer `{name}` shares {', '.join(shared)} with a layer whose new rows change its update: got a relative"
            f" change of {change:.1g}; give it parameters of its own"
        )


def _refuse_shared(model: nn.Module, targets: Mapping, moved) -> None:
    inside = {id(module) for layer, _ in targets.values() for module in layer.modules()}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(module) not in inside and parameter in moved:
                raise ValueError(
                    f"`{name}.{key}` is shared with a layer that grows, and does not grow itself: got"
                    f" {tuple(parameter.shape)}; give the layer a parameter of its own"
                )


def _move(optimizer: torch.optim.Optimizer, moved) -> None:
    """The optimiser holds the new parameters, and what it remembers of them."""
    for group in optimizer.param_groups:
        group["params"] = [moved[p][0] if p in moved else p for p in group["params"]]
    for old, (new, carry) in moved.items():
        state = optimizer.state.pop(old, None)
        if state:
            optimizer.state[new] = {
                key: _padded(key, value, old, new, carry) for key, value in state.items()
            }


def _add(optimizer: torch.optim.Optimizer, old: nn.Module, new: nn.Module) -> None:
    """Parameters that the old layer lacks, in a group with the options of its other parameters."""
    known, held = dict(old.named_parameters()), {}
    for group in optimizer.param_groups:
        held |= dict.fromkeys(group["params"], group)
    groups = [held[p] for p in new.parameters() if p in held]
    fresh = [p for n, p in new.named_parameters() if n not in known and p not in held]
    if groups and fresh:
        options = {k: v for k, v in groups[0].items() if k != "params"}
        optimizer.add_param_group(options | {"params": fresh, "weight_decay": 0.0})


def _padded(key: str, value, old: Tensor, new: Tensor, carry: Carry | None):
    """What an optimiser remembers of a parameter, at its new shape."""
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    if carry is not None:
        return carry(value, 2 if key.endswith("_sq") else 1)
    found = value.new_zeros(new.shape)
    found[tuple(map(slice, old.shape))] = value
    return found


def warm_restart(
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    warmup: float = 0.02,
    lowest: float = 0.0,
    lr: float | None = None,
) -> LambdaLR:
    """A fresh schedule after growth: a linear warm-up to the peak, then a cosine down.

        lr(t) = peak * t / w                                             t < w
        lr(t) = peak * (lowest + (1 - lowest) (1 + cos(pi (t - w) / (steps - w))) / 2)   else

    Args:
        optimizer: whose learning rates; the peak of a group is the one it began with.
        steps: how many will be taken.
        warmup: w, a number of steps, or a share of them below 1.
        lowest: the last learning rate, as a share of the peak.
        lr: another peak for all groups.

    Raises:
        ValueError: no step, or a warm-up that takes them all.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> schedule, rates = warm_restart(optimizer, 4, warmup=2), []
    >>> for _ in range(4):
    ...     rates.append(round(optimizer.param_groups[0]["lr"], 3))
    ...     optimizer.step()
    ...     schedule.step()
    >>> rates
    [0.0, 0.05, 0.1, 0.05]
    """
    warm = round(warmup * steps) if warmup < 1 else int(warmup)
    if not 0 <= warm < steps:
        raise ValueError(
            f"`warm_restart` warms up for a part of its steps: got warmup={warmup} of {steps}; type `warmup=0.02`"
        )
    for group in optimizer.param_groups:
        peak = group.pop("initial_lr", group["lr"])
        group["lr"] = peak if lr is None else lr

    def factor(t: int) -> float:
        if t < warm:
            return t / warm
        cosine = (1 + math.cos(math.pi * min(1.0, (t - warm) / (steps - warm)))) / 2
        return lowest + (1 - lowest) * cosine

    return LambdaLR(optimizer, factor)
