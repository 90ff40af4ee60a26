"""What an allocation speaks of: the heads of a layer, what they cost, and the plan that says what they keep."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

COSTS = ("rank", "parameters", "flops", "cache")
USES = ("scores", "tied", "values", "outputs", "all")


def unit_cost(kind: str, context: int, dim: int, queries: int, uses: str) -> int:
    """The cost of one rank of one head.

    A rank is a row of K and one of each query: dim (queries + 1) parameters; where ``uses`` is ``"values"`` or
    ``"all"`` also one of the values, where it is ``"outputs"`` or ``"all"`` also one of each output. Forward operations
    a token are 2 a parameter, and 2 ``context`` a query for its score and, unless ``uses`` is ``"scores"``, 2
    ``context`` for the average of the values. A decoder keeps the row of K and that of V.

    >>> unit_cost("parameters", 0, 64, 1, "tied"), unit_cost("flops", 128, 64, 1, "tied")
    (128, 768)
    >>> [unit_cost("parameters", 0, 64, 1, uses) for uses in ("values", "outputs", "all")]
    [192, 192, 256]
    """
    kept = 2 if uses in ("values", "all") else 1
    written = 2 if uses in ("outputs", "all") else 1
    parameters = dim * (written * queries + kept)
    products = queries * (1 if uses == "scores" else 2)
    flops = 2 * parameters + 2 * context * products
    return {"rank": 1, "parameters": parameters, "flops": flops, "cache": kept}[kind]


def groups_of(ranks: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(number of heads, their rank) for every rank above 0, largest first.

    >>> groups_of((8, 16, 0, 8))
    ((1, 16), (2, 8))
    """
    found = Counter(rank for rank in ranks if rank)
    return tuple((found[rank], rank) for rank in sorted(found, reverse=True))


@dataclass(frozen=True)
class Heads:
    """The heads of one layer at full rank.

    Args:
        name: of the layer.
        dim: D, the width of what they read.
        heads: how many have a K of their own.
        rank: R of each.
        queries: how many share one K.
        uses: what has a row for each rank: ``"scores"`` (Q and K, which only score), ``"tied"`` (Q and K, which are
            outputs and values too), ``"values"`` (Q, which writes, K and V), ``"outputs"`` (Q, K, which are the values,
            and O), or ``"all"`` (Q, K, V and O).
        step: ranks come in steps of this many: 2 where pairs of coordinates turn together.
        value_rank: of values and outputs that keep it while the ``rank`` of their energy falls, or None.
        gains: for every head what its first, second, ... step keeps, (heads, rank / step), or None.

    Raises:
        ValueError: a size below 1, a rank that is no multiple of the step, gains of another shape or below 0.
    """

    name: str
    dim: int
    heads: int
    rank: int
    queries: int = 1
    uses: str = "scores"
    step: int = 1
    gains: tuple[tuple[float, ...], ...] | None = None
    value_rank: int | None = None

    def __post_init__(self):
        sizes = (self.dim, self.heads, self.rank, self.queries, self.step)
        if min(sizes) < 1 or self.rank % self.step or self.uses not in USES:
            raise ValueError(
                f"`Heads` takes sizes from 1, a rank that is a multiple of `step`, and `uses` of {', '.join(USES)}:"
                f" got {self}"
            )
        if self.gains is None:
            return
        shape = {len(row) for row in self.gains}
        if len(self.gains) != self.heads or shape != {self.rank // self.step}:
            raise ValueError(
                f"layer `{self.name}` has {self.heads} heads of {self.rank // self.step} steps: got gains of"
                f" {len(self.gains)} heads and {sorted(shape)} steps; give one number a step"
            )
        if not all(gain >= 0 for row in self.gains for gain in row):
            raise ValueError(
                f"gains are at least 0: got one below 0 in layer `{self.name}`; give squared singular values, or"
                " falls of a loss"
            )

    def unit(self, kind: str, context: int) -> int:
        """The cost of one rank of one head; see :func:`unit_cost`."""
        return unit_cost(kind, context, self.dim, self.queries, self.uses)


@dataclass(frozen=True)
class LayerPlan:
    """The ranks that the heads of one layer keep.

    Attributes:
        name, dim, queries, uses, value_rank: as of :class:`Heads`.
        full_rank: of every head before.
        ranks: of every head; 0 is a head that goes.
        together: whether the heads were given one rank, so that they may share what they drop.
    """

    name: str
    dim: int
    full_rank: int
    ranks: tuple[int, ...]
    queries: int = 1
    uses: str = "scores"
    together: bool = False
    value_rank: int | None = None

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(number of heads, their rank), largest rank first."""
        return groups_of(self.ranks)

    def cost(self, kind: str, context: int = 0, *, full: bool = False) -> int:
        """What the ranks cost, or what full ones do."""
        rank = self.full_rank * len(self.ranks) if full else sum(self.ranks)
        return rank * unit_cost(kind, context, self.dim, self.queries, self.uses)

    def applied(self, parts: list[dict], dim: int, where: str) -> list[dict]:
        """The parts of a block with these heads and ranks; raises as :meth:`Plan.apply`."""
        at = [place for place, part in enumerate(parts) if "energy" in part and _has_heads(part)]
        if len(at) != 1 or dim != self.dim:
            raise ValueError(
                f"{where} needs one part that says its `heads` and has width {self.dim}: got {len(at)} such parts of"
                f" width {dim}; write `heads` and `rank` into one part of each block"
            )
        part = dict(parts[at[0]])
        counted = "groups" if "groups" in part else "heads"
        count, rank = part.pop(counted), part.pop("rank", self.full_rank)
        if (count, rank) != (len(self.ranks), self.full_rank):
            raise ValueError(
                f"{where} has {count} heads of rank {rank}: got a plan for {len(self.ranks)} of {self.full_rank};"
                " make the plan for this model with `cem allocate`"
            )
        own = {} if self.value_rank is None else {"value_rank": self.value_rank}
        own |= {key: part.pop(key) for key in ("per_group", "copies", "value_rank") if key in part}
        groups = []
        for heads, kept in self.groups:
            sizes = {counted: heads, "rank": kept} | own
            if self.uses == "all" and "copies" in own:
                sizes["copies"] = max(1, own["copies"] * kept // rank)
            groups.append(sizes)
        made = part | (groups[0] if len(groups) == 1 else {"head_groups": groups})
        return [*parts[: at[0]], *([made] if groups else []), *parts[at[0] + 1 :]]


def _has_heads(part: dict) -> bool:
    return "heads" in part or "groups" in part


@dataclass(frozen=True)
class Plan:
    """Heads and ranks of every layer, as :func:`cem.allocation.allocate` chose them.

    Attributes:
        layers: one :class:`LayerPlan` a layer, first layer first.
        kind: what is counted, ``"rank"``, ``"parameters"``, ``"flops"`` (forward, a token) or ``"cache"`` (numbers a
            token).
        budget, cost, full: what was allowed, what the plan takes, what all layers take at full rank.
        context: tokens that a token sees, for ``"flops"``.
        gain: the share of the weighted gain that is kept, or None where no gains were given.
        source: ``"gains"``, ``"importances"`` or ``"schedule"``.
        exact: whether no assignment within the budget has a larger gain.

    >>> from cem.allocation import allocate
    >>> plan = allocate(0.5, [Heads("a", dim=8, heads=2, rank=4), Heads("b", dim=8, heads=2, rank=4)])
    >>> plan.ranks
    ((3, 3), (2, 0))
    >>> Plan.from_yaml(plan.to_yaml()) == plan == Plan.from_json(plan.to_json())
    True
    """

    layers: tuple[LayerPlan, ...]
    kind: str
    budget: int
    cost: int
    full: int
    context: int = 0
    gain: float | None = None
    source: str = "gains"
    exact: bool = True

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """The rank of every head, layer by layer."""
        return tuple(layer.ranks for layer in self.layers)

    def total(self, kind: str, *, full: bool = False) -> int:
        """The cost of the plan, or of the full layers, counted in another way."""
        return sum(layer.cost(kind, self.context, full=full) for layer in self.layers)

    def apply(self, config):
        """The configuration of a language model whose energies have the heads and ranks of this plan.

        Heads of one rank are one interaction energy; heads of several ranks are the sum of one energy for each rank,
        in the key ``head_groups`` of their part. A layer without heads loses the part.

        Args:
            config: a :class:`cem.hf.CEMConfig`; it is left as it is.

        Raises:
            ValueError: another kind of configuration, another number of blocks, or a block without one part with heads.
        """
        if not hasattr(config, "blocks"):
            raise ValueError(
                f"a plan is applied to the configuration of energy layers: got {type(config).__name__}; type"
                " `cem.hf.CEMConfig(...)`, or a preset without `llama-`"
            )
        blocks = config.blocks
        if len(blocks) != len(self.layers):
            raise ValueError(
                f"a plan has one layer a block: got {len(self.layers)} layers and {len(blocks)} blocks; make the plan"
                " for this model with `cem allocate`"
            )
        rows = [
            layer.applied(parts, config.hidden_size, f"block {index}")
            for index, (layer, parts) in enumerate(zip(self.layers, blocks, strict=True))
        ]
        return type(config).from_dict(config.to_dict() | {"layers": rows})

    # -- text -------------------------------------------------------------------------------------------

    def table(self) -> str:
        """The plan as a table for a terminal.

        >>> from cem.allocation import allocate
        >>> print(allocate(0.75, [Heads("a", dim=8, heads=2, rank=4)]).table())
        layer  heads x rank  rank  of full  parameters
        a      2x3           6     75%      96
        all                  6     75%      96
        """
        rows = [("layer", "heads x rank", "rank", "of full", self.kind)]
        for layer in self.layers:
            rank, full = sum(layer.ranks), layer.full_rank * len(layer.ranks)
            shown = " + ".join(f"{count}x{rank}" for count, rank in layer.groups) or "none"
            cost = layer.cost(self.kind, self.context)
            rows.append((layer.name, shown, f"{rank}", f"{rank / full:.0%}", f"{cost:,}"))
        rank = sum(map(sum, self.ranks))
        full = sum(layer.full_rank * len(layer.ranks) for layer in self.layers)
        rows.append(("all", "", f"{rank}", f"{rank / full:.0%}", f"{self.cost:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def __str__(self) -> str:
        kept = "" if self.gain is None else f", {self.gain:.2%} of them kept"
        exact = "" if self.exact else ", not proved optimal"
        said = f"{self.cost:,} of {self.full:,} {self.kind}, by {self.source}{kept}{exact}"
        return f"{self.table()}\n{said}"

    def plot(self, *, ax=None):
        """Draw the ranks of the heads, one bar a layer; the outline is the full rank. Returns the axes."""
        from .rank_plots import heads

        full = [layer.full_rank for layer in self.layers]
        return heads(self.ranks, full, names=[layer.name for layer in self.layers], ax=ax)

    def to_dict(self) -> dict:
        """The plan as plain data."""
        found = asdict(self)
        found["layers"] = [row | {"ranks": list(row["ranks"])} for row in found["layers"]]
        return {"cem_plan": 1, **found}

    @classmethod
    def from_dict(cls, said: dict) -> Plan:
        """The plan of :meth:`to_dict`.

        Raises:
            ValueError: not a plan, or a field that is missing or unknown.
        """
        try:
            if said["cem_plan"] != 1:
                raise TypeError(f"version {said['cem_plan']!r}")
            rows = tuple(
                LayerPlan(**row | {"ranks": tuple(map(int, row["ranks"]))})
                for row in said["layers"]
            )
            return cls(**{k: v for k, v in said.items() if k != "cem_plan"} | {"layers": rows})
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"a plan has the fields that `Plan.to_dict` writes: got {error}; make one with `cem allocate`"
            ) from None

    def to_json(self) -> str:
        """The plan as JSON, as :meth:`from_json` reads it."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))

    def to_yaml(self) -> str:
        """The plan as YAML, as :meth:`from_yaml` reads it; needs the package ``pyyaml``."""
        import yaml

        return yaml.safe_dump(
            self.to_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True
        )

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        """The plan of :meth:`to_yaml`.

        Raises:
            ValueError: as :meth:`from_dict`.
        """
        import yaml

        try:
            return cls.from_dict(yaml.safe_load(text))
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise ValueError(
                f"a plan is YAML: got {problem}; make one with `cem allocate`"
            ) from None

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan in a YAML file, such as the ``plan.yaml`` of ``cem allocate``.

        Raises:
            ValueError: there is no such file, or as :meth:`from_dict`.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"there is no plan {path}: got that path; type `cem allocate MODEL_DIR --out DIR` to make one"
            )
        return cls.from_yaml(path.read_text("utf-8"))
