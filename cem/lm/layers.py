"""From the description of a layer, plain data as in a JSON file, to the layer.

Nothing in a description is evaluated: it names energies, update rules, preconditioners and norms in tables.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from sympy.core.function import FunctionClass
from torch import Tensor, nn

import cem
from cem.compression import of_groups
from cem.compression.groups import with_values_apart

from .routed import routed

RULES = {
    rule.__name__: rule for rule in (cem.GradientDescent, cem.Momentum, cem.Nesterov, cem.Newton)
}
PRECONDITIONERS = {
    part.__name__: part
    for part in (cem.ScaledIdentity, cem.Diagonal, cem.DiagonalPlusLowRank, cem.BlockDiagonal)
}
NORMS = {norm.__name__: norm for norm in (nn.RMSNorm, nn.LayerNorm)}
OPTIONS = (
    "energy",
    "name",
    "norm",
    "update",
    "preconditioner",
    "init",
    "learn",
    "steps",
    "refresh",
    "routed",
    "head_groups",
)


def energy_of(description: Mapping[str, Any], where: str) -> cem.Energy:
    """The energy that a description names, from the gallery or from its own JSON; of a list, their sum.

    Raises:
        ValueError: no energy of the gallery has that name, or no family, or a family refuses its options.

    >>> energy_of({"energy": {"rotary_interaction_by": {"fraction": 0.5}}}, "layer").name
    'rotary_interaction'
    """
    named = description["energy"]
    if isinstance(named, list) and named:
        energies = [energy_of({"energy": one}, where) for one in named]
        return sum(energies[1:], energies[0])
    if isinstance(named, Mapping) and len(named) == 1 and str(next(iter(named))).endswith("_by"):
        return _of_family(*next(iter(named.items())), where)
    if isinstance(named, Mapping):
        return cem.Energy.from_json(json.dumps(named))
    found = getattr(cem.energies, named, None) if isinstance(named, str) else None
    if not isinstance(found, cem.Energy):
        known = [n for n in dir(cem.energies) if isinstance(getattr(cem.energies, n), cem.Energy)]
        raise _unknown(f"{where}: an energy", named, known)
    return found


def _of_family(name: str, options: Mapping[str, Any], where: str) -> cem.Energy:
    """The member of a family of the gallery, such as ``rotary_interaction_by``, with these options, plain data.

    An activation is named as in the language: ``{"gated_by": {"g": "softplus"}}``.
    """
    known = [n for n in cem.energies.__all__ if n.endswith("_by")]
    if name not in known:
        raise _unknown(f"{where}: a family of energies", name, known)
    if not isinstance(options, Mapping):
        raise ValueError(
            f"{where}: `{name}` takes its options by name: got {options!r}; type `{{{name}: {{}}}}`"
        )
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    if "g" in options:
        words = [n for n in cem.__all__ if isinstance(getattr(cem, n), FunctionClass)]
        if options["g"] not in words:
            raise _unknown(f"{where}: an activation", options["g"], words)
        options["g"] = getattr(cem, options["g"])
    try:
        return getattr(cem.energies, name)(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def derived(description: Mapping[str, Any], dim: int, eps: float, where: str = "layer"):
    """The :class:`~cem.EnergyLayer` of a description.

    A description is a mapping with the keys

    - ``energy``: a name of the gallery, or a family of it with its options, ``{"rotary_interaction_by":
      {"fraction": 0.5}}``, or the mapping that ``json.loads(energy.to_json())`` gives; or a list of such, whose sum
      is descended at once: ``["rotary_interaction", "gated_silu"]`` is a parallel block;
    - ``head_groups``: where heads have several ranks, a list of the sizes and scalars of each group of heads,
      ``[{"heads": 2, "rank": 32}, {"heads": 2, "rank": 8}]``; the energy is then the sum over the groups;
    - ``value_rank``: where values and outputs have matrices of their own, their rank, so that ``rank`` is that of
      queries and keys alone;
    - every named size but ``dim``, and every scalar that differs from its default, under its own name; ``heads``,
      ``rank`` and ``hidden`` that are missing are those of Llama, see :func:`usual_sizes`;
    - ``norm``: ``"RMSNorm"`` (the default, without a gain), ``"LayerNorm"`` or None, or a mapping from such a name
      to its arguments, ``{"RMSNorm": {"elementwise_affine": true}}``;
    - ``update``: a rule by name, or a mapping from its name to its arguments; gradient descent with a learned step
      size that starts at 1 if it is missing;
    - ``preconditioner``: likewise; the identity if it is missing;
    - ``init``: a factor on the standard deviations at which parameters start, or a mapping from their names to
      factors, or to what they start at in all entries: ``{"Q": 0.5, "w": {"value": 1.0}}``;
    - ``learn``, ``steps``, ``refresh``: as in :func:`cem.derive`;
    - ``routed``: a mapping such as ``{"capacity": 0.33}``, see :func:`cem.lm.routed.routed`: the layer takes a share of
      the tokens, and is inside a :class:`~cem.Routed`.

    With ``parts`` in place of ``energy``, a list of such descriptions, one router stands before all of them: the tokens
    that it chooses go through one after the other, ``{"parts": [...], "routed": {"capacity": 0.33}}``.

    Args:
        description: the mapping.
        dim: the width of the state.
        eps: of the norm, where the description does not say.
        where: begins the message of an error.

    Raises:
        ValueError: an unknown name or key, a missing size.

    >>> derived({"energy": "interaction", "heads": 2, "rank": 4}, 8, 1e-6).lowering.kernels
    ('matmul', 'sdpa')
    >>> parallel = derived({"energy": ["rotary_interaction", "gated_silu"], "heads": 2, "rank": 4}, 8, 1e-6)
    >>> sorted(str(parameter.name) for parameter in parallel.energy_function.parameters)
    ['G', 'K', 'Q', 'U']
    >>> derived({"energy": "interactoin"}, 8, 1e-6)
    Traceback (most recent call last):
        ...
    ValueError: layer: an energy is one of the gallery or its own JSON: got 'interactoin'; type 'interaction'
    """
    if "parts" in description:
        return _routed_together(description, dim, eps, where)
    energy, description = energy_in_groups(description, where)
    options = {key: description[key] for key in ("learn", "steps", "refresh") if key in description}
    names = {str(name) for name in (*energy.dims, *energy.scalars)} - {"dim"}
    sizes = {key: value for key, value in description.items() if key not in OPTIONS}
    for key in sizes:
        if key not in names:
            raise _unknown(f"{where}: a key", key, [*OPTIONS, *names])
    usual = usual_sizes(dim, sizes.get("heads"))
    sizes = {key: value for key, value in usual.items() if key in names} | sizes
    norm = _made(description.get("norm", "RMSNorm"), NORMS, where, dim, eps=eps)
    update = description.get("update", {"GradientDescent": {"step_size": 1.0, "learn": True}})
    update = _made(update, RULES, where)
    preconditioner = _made(description.get("preconditioner"), PRECONDITIONERS, where, dim)
    try:
        layer = cem.derive(
            energy,
            dim=dim,
            norm=norm,
            update=update,
            preconditioner=preconditioner,
            **sizes,
            **options,
        )
        made = routed(layer, description["routed"], dim, eps) if "routed" in description else layer
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    scale_start(layer, description.get("init", 1.0), where)
    return made


def _routed_together(description: Mapping[str, Any], dim: int, eps: float, where: str):
    """The parts of a description behind one router."""
    parts = description["parts"]
    listed = isinstance(parts, list) and all(isinstance(one, Mapping) for one in parts)
    if not listed or not all("energy" in one and "routed" not in one for one in parts) or not parts:
        raise ValueError(
            f"{where}: `parts` is a list of energies without routers of their own: got {parts!r}; type"
            ' `[{"energy": "rotary_interaction"}, {"energy": "gated_silu"}]`'
        )
    if set(description) - {"name"} != {"parts", "routed"}:
        raise ValueError(
            f"{where}: `parts` stand behind one router: got the keys {list(description)}; type"
            ' `{"parts": [...], "routed": {"capacity": 0.33}}`'
        )
    layers = [derived(one, dim, eps, f"{where}, part {n} of it") for n, one in enumerate(parts)]
    try:
        return routed(nn.Sequential(*layers), description["routed"], dim, eps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def redescribed(
    description: Mapping[str, Any], layer: cem.EnergyLayer, name: str
) -> dict[str, Any]:
    """The description of a layer that has grown out of another one: its sizes, and scalars that kept their value.

    Args:
        description: of the layer before.
        layer: as it is now.
        name: under which a block holds it.

    >>> small = {"energy": "interaction", "heads": 2, "rank": 4}
    >>> redescribed(small, derived(small, 8, 1e-6).grow(rank=6), "interaction")
    {'energy': 'interaction', 'heads': 2, 'rank': 6, 'beta': 0.5}
    """
    found, energy = dict(description), layer.energy_function
    grouped = found.pop("head_groups", None)
    if grouped or energy_of(description, name).expression != energy.expression:
        found |= {"energy": json.loads(energy.to_json()), "name": name}
    found |= {size: value for size, value in layer.sizes.items() if size != "dim"}
    for scalar, value in layer._fixed.items():
        default = scalar.default
        if default is None or float(default.xreplace(dict(layer._sizes))) != value:
            found[scalar.name] = value
    return found


def energy_in_groups(
    description: Mapping[str, Any], where: str
) -> tuple[cem.Energy, Mapping[str, Any]]:
    """The energy of a description, summed over its groups of heads if it has some, and the description of the sum.

    Raises:
        ValueError: as :func:`energy_of`, or groups that are no list of sizes, or of an energy without heads.
    """
    energy, groups = energy_of(description, where), description.get("head_groups", [{}])
    listed = isinstance(groups, list) and all(isinstance(one, Mapping) for one in groups)
    if not listed or not groups:
        raise ValueError(
            f"{where}: `head_groups` is a list of the sizes of groups of heads: got {groups!r}; type"
            ' `[{"heads": 2, "rank": 32}, {"heads": 2, "rank": 8}]`'
        )
    said = {key: value for key, value in description.items() if key != "head_groups"}
    apart = any("value_rank" in one for one in (said, *groups))
    try:
        if apart and "value_rank" not in map(str, energy.dims):
            energy = with_values_apart(energy)
        if len(groups) == 1:
            return energy, said | groups[0]
        made = of_groups(energy, len(groups), name=energy.name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    names = {str(part.name) for part in (*made.parameters, *made.scalars)}

    def suffixed(name: str) -> list[str]:
        return [name] if name in names else [f"{name}_{n}" for n in range(len(groups))]

    if isinstance(said.get("init"), Mapping):
        said["init"] = {new: f for name, f in said["init"].items() for new in suffixed(name)}
    if "learn" in said:
        learn = [said["learn"]] if isinstance(said["learn"], str) else said["learn"]
        said["learn"] = [new for name in learn for new in suffixed(name)]
    return made, said | {f"{k}_{n}": v for n, one in enumerate(groups) for k, v in one.items()}


def usual_sizes(dim: int, heads: int | None = None) -> dict[str, int]:
    """Heads of 64 and 8/3 ``dim`` hidden units, in multiples of 8: the sizes of a Llama block.

    >>> usual_sizes(512)
    {'heads': 8, 'rank': 64, 'hidden': 1368}
    """
    heads = heads or max(1, dim // 64)
    return {"heads": heads, "rank": max(2, dim // heads), "hidden": -(-8 * dim // 24) * 8}


class Residual(nn.Module):
    """h + module(norm(h)): half of a Llama block, taken from transformers as it is.

    Attributes:
        context: whether other tokens are looked at.
        config: that of Llama with the sizes of the module.
    """

    def __init__(self, module: nn.Module, norm: nn.Module, context: bool, config) -> None:
        super().__init__()
        self.norm, self.module, self.context, self.config = norm, module, context, config

    def forward(self, h: Tensor, **inputs) -> Tensor:
        if not self.context:
            return h + self.module(self.norm(h))
        return h + self.module(self.norm(h), **inputs)[0]


def llama_part(description: Mapping[str, Any], config, where: str, slot: int) -> Residual:
    """Attention or MLP of :class:`transformers.LlamaForCausalLM`, with the norm and the sum around it.

    The keys of a description are ``module`` (``"attention"`` or ``"mlp"``), and ``heads``, ``kv_heads``,
    ``rank`` (of a head), ``rope_theta``, or ``hidden``; sizes that are missing are those of :func:`usual_sizes`.

    Args:
        description: the mapping.
        config: the :class:`~cem.lm.config.CEMConfig`.
        where: begins the message of an error.
        slot: the layer of a cache where attention keeps its keys and values.

    Raises:
        ValueError: an unknown module or key.
    """
    from transformers.models.llama import modeling_llama as llama

    kind = description["module"]
    known = {"attention": ["heads", "kv_heads", "rank", "rope_theta"], "mlp": ["hidden"]}
    if kind not in known:
        raise _unknown(f"{where}: a module", kind, list(known))
    for key in set(description) - {"module", "name"}:
        if key not in known[kind]:
            raise _unknown(f"{where}: a key", key, known[kind])
    sizes = usual_sizes(config.hidden_size, description.get("heads")) | dict(description)
    its = llama.LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=sizes["hidden"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes.get("kv_heads"),
        head_dim=sizes["rank"],
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.get("rope_theta", 10000.0)},
    )
    norm = llama.LlamaRMSNorm(config.hidden_size, eps=config.norm_eps)
    if kind == "mlp":
        return Residual(llama.LlamaMLP(its), norm, False, its)
    part = Residual(llama.LlamaAttention(its, slot), norm, True, its)
    part.module.config = config  # where `set_attn_implementation` writes
    part.rotary = llama.LlamaRotaryEmbedding(its)
    return part


def why_no_cache(layer: cem.EnergyLayer) -> str | None:
    """Why a layer cannot go on from a cache of transformers, or None where it can.

    >>> print(why_no_cache(derived({"energy": "interaction", "update": "Newton"}, 8, 1e-6)))
    layer `interaction` asks for energies or Hessians in its steps, which a cache does not keep: ...
    """
    try:
        kinds = layer.init_cache(1, 1).kinds
    except ValueError as error:
        return str(error)
    if {"append", "state"} <= set(kinds):
        name = layer.energy_function.name
        return f"layer `{name}` keeps keys and a state, which no layer of a cache holds together"
    return None


def scale_start(layer: cem.EnergyLayer, init: float | Mapping[str, float], where: str) -> None:
    """Multiply the parameters of the energy by the factors of ``init``, or fill them with its values, in place."""
    parameters = {
        str(p.name): getattr(layer, str(p.name)) for p in layer.energy_function.parameters
    }
    factors = init if isinstance(init, Mapping) else dict.fromkeys(parameters, init)
    for name, factor in factors.items():
        if name not in parameters:
            raise _unknown(f"{where}: a parameter in `init`", name, list(parameters))
        said = factor.get("value") if isinstance(factor, Mapping) and len(factor) == 1 else factor
        if isinstance(said, bool) or not isinstance(said, int | float):
            raise ValueError(
                f"{where}: `init` of `{name}` is a factor or a value: got {factor!r}; type `{name}: 0.5` or"
                f" `{name}: {{value: 1.0}}`"
            )
        parameters[name].data.mul_(factor) if said is factor else parameters[name].data.fill_(said)


def _made(description, table: Mapping[str, type], where: str, *arguments, eps: float | None = None):
    """A module from its name, or from a mapping of its name to its arguments; None stays None."""
    if description is None:
        return None
    if isinstance(description, str):
        description = {description: {}}
    if not isinstance(description, Mapping) or len(description) != 1:
        raise ValueError(
            f"{where}: a part is a name or one name with its arguments: got {description!r}; type"
            f" `{next(iter(table))}`"
        )
    [(name, options)] = description.items()
    if name not in table:
        raise _unknown(f"{where}: a part", name, list(table))
    if eps is not None:
        options = {"eps": eps, "elementwise_affine": False, **options}
    try:
        return table[name](*arguments, **options)
    except TypeError as error:
        raise ValueError(f"{where}: `{name}` does not take {options}: {error}") from error


def _unknown(what: str, got, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(str(got), known, 1, 0.3)
    listed = "one of the gallery or its own JSON" if "energy" in what else f"one of {sorted(known)}"
    return ValueError(f"{what} is {listed}: got {got!r}; type {(near or sorted(known))[0]!r}")
