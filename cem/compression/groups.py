"""One energy for each group of heads: the sum over heads as a sum of sums, each with sizes of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sympy import Add, Expr, Float, Sum, Symbol

from ..energy import Energy
from ..language.conversion import as_expression
from ..language.positions import Rope
from ..language.symbols import Dim, Parameter, Scalar, size_of


def head_sizes(energy: Energy) -> tuple[Dim, Dim]:
    """The sizes that count the heads and their rank: those of K (heads, rank, dim).

    Raises:
        ValueError: the energy has no forms h^T Q^T K x.

    >>> from cem.energies import grouped_interaction, interaction
    >>> head_sizes(interaction), head_sizes(grouped_interaction)
    ((heads, rank), (groups, rank))
    """
    known = {str(p.name): p for p in energy.parameters}
    if not {"Q", "K"} <= set(known) or len(known["K"].shape) != 3:
        raise ValueError(
            f"energy `{energy.name}` has no matrices Q (heads, rank, dim) and K (heads, rank, dim): got"
            f" {', '.join(f'{n} {tuple(p.shape)}' for n, p in known.items()) or 'no parameters'}; only the ranks of"
            " h^T Q^T K x can be allocated"
        )
    heads, rank, _ = known["K"].shape
    return heads, rank


def is_bound(energy: Energy) -> bool:
    """Whether the width of the state counts the heads, so that no head can go and all have one size."""
    heads, rank = head_sizes(energy)
    return bool({heads, rank} & energy.width.free_symbols)


def with_values_apart(energy: Energy) -> Energy:
    """The energy with a size ``value_rank`` for all that has the rank of Q and K and does not meet them: V, W, shares.

    Nothing else changes, so with ``value_rank`` = ``rank`` it is the same energy.

    Raises:
        ValueError: as :func:`head_sizes`, or all that has that rank meets Q or K.

    >>> from cem.energies import loosely_tied_interaction_by
    >>> apart = with_values_apart(loosely_tied_interaction_by(outputs="own", values="own"))
    >>> [f"{p.name}{p.shape}" for p in apart.parameters][1:3]
    ['Q(heads, rank, dim)', 'V(heads, value_rank, dim)']
    """
    _, rank = head_sizes(energy)
    apart, swap = Dim("value_rank"), {}
    for total in energy.expression.atoms(Sum):
        inside = total.atoms(Parameter)
        if rank in map(size_of, total.variables) and not {"Q", "K"} & {str(p.name) for p in inside}:
            sizes: dict = {rank: apart}
            for base in inside:
                shape = tuple(size.xreplace(sizes) for size in base.shape)
                sizes[base] = Parameter(base.label, shape=shape)
            swap[total] = total.xreplace(sizes)
    if not swap:
        raise ValueError(
            f"energy `{energy.name}` has no values and outputs of rank `{rank}` that do not meet Q or K: got"
            f" {', '.join(f'{p.name} {tuple(p.shape)}' for p in energy.parameters)}; leave `value_rank` out"
        )
    return Energy(energy.expression.xreplace(swap), name=energy.name)


def of_groups(
    energy: Energy,
    count: int,
    *,
    frequencies: Sequence[Sequence[float] | None] | None = None,
    scalars: Mapping[str, float] | None = None,
    name: str | None = None,
) -> Energy:
    """The energy with its heads in groups: sizes ``heads_0``, ``rank_0``, ``heads_1``, ... and parameters ``Q_0``, ...

    Every term with heads stands once for each group; the other terms stay as they are. With one group the names stay.

    Args:
        energy: with Q and K.
        count: of groups.
        frequencies: of the rotation of the rank of each group, one a pair of its coordinates.
        scalars: values that all groups share; without them each group has scalars of its own, such as ``beta_0``, whose
            defaults follow its own sizes.
        name: of the sum.

    >>> from cem.energies import interaction
    >>> two = of_groups(interaction, 2)
    >>> [f"{p.name}{p.shape}" for p in two.parameters]
    ['K_0(heads_0, rank_0, dim)', 'K_1(heads_1, rank_1, dim)', 'Q_0(heads_0, rank_0, dim)', 'Q_1(heads_1, rank_1, dim)']
    >>> two.curvature
    'concave'
    """
    heads, rank = head_sizes(energy)
    per_head = {p for p in energy.parameters if heads in p.shape or rank in p.shape}
    if scalars is not None:
        fixed = {
            s: Scalar(s.name, as_expression(float(scalars[s.name])), s.is_positive)
            for s in energy.scalars
            if s.name in scalars
        }
        energy = Energy(energy.expression.xreplace(fixed), name=energy.name)
    with_heads, other = [], []
    for term in Add.make_args(energy.expression):
        (with_heads if term.atoms(Parameter) & per_head else other).append(term)
    sizes = {
        size
        for parameter in per_head
        for size in parameter.shape
        if isinstance(size, Dim) and not energy.width.has(size)
    }
    found: list[Expr] = list(other)
    for n in range(count):
        term = Add(*with_heads)
        if frequencies is not None and frequencies[n] is not None:
            term = _turned_at(term, frequencies[n], rank)
        found.append(term if count == 1 else _suffixed(term, f"_{n}", per_head, sizes, scalars))
    return Energy(Add(*found), name=name or energy.name)


def _turned_at(term: Expr, frequencies: Sequence[float], rank: Dim) -> Expr:
    rates = tuple(Float(float(w)) for w in frequencies)
    turning = (rope for rope in term.atoms(Rope) if size_of(rope.index) == rank)
    swap = {rope: Rope(*rope.args[:6], *rates) for rope in turning}
    return term.xreplace(swap)


def _suffixed(term: Expr, suffix: str, per_head, sizes, scalars) -> Expr:
    dims = {size: Dim(f"{size}{suffix}") for size in sizes}
    swap: dict = dict(dims)
    if scalars is None:
        for s in term.atoms(Scalar):
            default = None if s.default is None else s.default.xreplace(dims)
            swap[s] = Scalar(f"{s.name}{suffix}", default, s.is_positive)
    for base in per_head:
        shape = tuple(size.xreplace(dims) for size in base.shape)
        swap[base] = Parameter(Symbol(f"{base.name}{suffix}", real=True), shape=shape)
    return term.xreplace(swap)
