"""From forms of lower rank back to a layer."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..energy import Energy
from ..layer import EnergyLayer, derive
from .attention import LowRankAttention
from .forms import FIELDS, Forms, values_apart
from .groups import head_sizes, is_bound, of_groups, with_values_apart
from .truncation import Cut, rows_of


def rebuilt(module: nn.Module, forms: Forms, found: Cut) -> nn.Module:
    """A layer like ``module`` with the forms of the cut, and whatever else it had."""
    if isinstance(module, EnergyLayer):
        return _energy_layer(module, forms, found)
    made = LowRankAttention.like(module, found.ranks, found.kept, biased=forms.biased)
    return made.fill(found.q, found.k)


def _energy_layer(layer: EnergyLayer, forms: Forms, found: Cut) -> EnergyLayer:
    """The energy once for every group of heads of one rank, or of one set of pairs, each with sizes of its own."""
    energy = layer.energy_function
    heads, rank = head_sizes(energy)
    found = _with_room(found, forms, is_bound(energy))
    if values_apart(layer):
        energy = with_values_apart(energy)
    acts = forms.uses == "scores" or forms.diagonal is not None
    groups: dict[tuple, list[int]] = {}
    for head, size in enumerate(found.ranks):
        kept = None if found.kept is None else found.kept[head]
        groups.setdefault((size, kept), []).append(head)
    members = sorted(groups.items(), key=lambda item: (-item[0][0], item[1]))
    members = [(key, row) for key, row in members if key[0]] or members[:1]
    if acts or not any(found.ranks):
        members = _with_empty(groups, forms, acts)
    rates = None
    if forms.frequencies is not None:
        rates = [[forms.frequencies[p] for p in kept] for (_, kept), _ in members]
    made = of_groups(
        energy, len(members), frequencies=rates, scalars=layer.scalars, name=energy.name
    )
    sizes = {name: value for name, value in layer.sizes.items() if name in map(str, made.dims)}
    values: dict[str, Tensor] = {
        str(p.name): getattr(layer, str(p.name)).detach() for p in energy.parameters
    }
    if forms.diagonal is not None:
        values["lam"] = _diagonal(layer, forms, found)
    placed: dict[str, Tensor] = {}
    for n, ((size, _), row) in enumerate(members):
        suffix = f"_{n}" if len(members) > 1 else ""
        sizes |= {f"{heads}{suffix}": len(row), f"{rank}{suffix}": size}
        stacked = _stacked(found, forms, row, size)
        for parameter in energy.parameters:
            name = str(parameter.name)
            own = parameter.shape[0].has(heads) or parameter.shape[0] == rank
            if rank in parameter.shape and FIELDS.get(name) in stacked:
                value = stacked[FIELDS[name]].reshape(len(row), *values[name].shape[1:-2], size, -1)
                value = value.flatten(-2) if parameter.shape[-1] == rank else value
            elif own:
                value = values[name][row]
            else:
                placed[name] = values[name]
                continue
            placed[f"{name}{suffix}"] = value
            for axis, named in enumerate(parameter.shape):
                if named not in (heads, rank) and named.is_Symbol and not energy.width.has(named):
                    sizes[f"{named}{suffix}"] = value.shape[axis]
    new = derive(made, **layer.options(), **sizes).to(layer.Q)
    with torch.no_grad():
        for name, value in placed.items():
            getattr(new, name).copy_(value)
    return new.train(layer.training)


def _with_room(found: Cut, forms: Forms, bound: bool) -> Cut:
    """The cut with one rank for all heads where the energy has no room for several: zeros fill the others up."""
    if not bound or len({*(found.kept or found.ranks)}) == 1:
        return found
    kept, rows = None, torch.arange(max(found.ranks))
    if found.kept is not None:
        union = tuple(sorted(set().union(*found.kept)))
        kept, rows = (union,) * len(found.k), rows_of(forms, union)
    full = {n: tuple(v[..., rows, :]) for n, v in found.padded(forms).rows.items()}
    return Cut(**full, kept=kept, diagonal=found.diagonal)


def _with_empty(groups, forms: Forms, acts: bool) -> list[tuple[tuple, list[int]]]:
    """The groups where heads without a rank still act, by values or a diagonal: they get one step of zeros.

    A layer that loses all its heads keeps the first one, of one step of zeros, so that it stays a layer.
    """
    found = {key: list(row) for key, row in groups.items() if key[0]}
    empty = sorted(head for key, row in groups.items() if not key[0] for head in row)
    if empty:
        kept = None if forms.pairs is None else (0,)
        row = found.setdefault((forms.step, kept), [])
        row += empty if acts else empty[:1]
    return sorted(found.items(), key=lambda item: (-item[0][0], item[1]))


def _stacked(found: Cut, forms: Forms, row: Sequence[int], size: int) -> dict[str, Tensor]:
    """Q (heads, queries, size, W), K (heads, size, W) and so on, of some heads; zeros where a head has less."""
    made = {
        name: value.new_zeros(len(row), *value.shape[1:-2], size, value.shape[-1])
        for name, value in forms.rows.items()
    }
    for n, head in enumerate(row):
        rank = len(found.k[head])
        order = torch.arange(rank)
        if forms.pairs is not None and rank:
            # From first and second coordinates to the order in which the rotation pairs them.
            local = torch.arange(size // 2)
            order = 2 * local if _interleaved(forms) else local
            order = torch.cat([order, order + (1 if _interleaved(forms) else size // 2)])
        for name, rows in found.rows.items():
            made[name][n][..., order, :] = rows[head]
    return made


def _interleaved(forms: Forms) -> bool:
    return forms.rank > 2 and int(forms.pairs[0, 1]) == 1


def _diagonal(layer: EnergyLayer, forms: Forms, found: Cut) -> Tensor:
    if not forms.blocked:
        return found.diagonal
    heads, block = layer.lam.shape
    return torch.stack([found.diagonal[a, a * block : (a + 1) * block] for a in range(heads)])


def described(layer: EnergyLayer) -> dict:
    """The energy and the sizes of a layer as keys of a part of a block, in the configuration of a language model."""
    energy: Energy = layer.energy_function
    sizes = {name: value for name, value in layer.sizes.items() if name != "dim"}
    return {"energy": json.loads(energy.to_json()), **sizes}
