"""Named sizes and scalars: from what the user typed to what a layer needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sympy import Expr, Symbol

from .energy import Energy
from .language.symbols import Dim, Scalar


def width_of(size: Expr, sizes: Mapping[Symbol, int]) -> int:
    """The length of an axis: a named size or a product of them."""
    return int(size.xreplace(dict(sizes)))


def solve_sizes(energy: Energy, given: Mapping[str, float]) -> dict[Dim, int]:
    """Every named size of the energy from keyword arguments.

    Where the width of the state is a product of sizes, ``dim=`` names the product, and one factor may be left
    out.
    """
    name = energy.name
    wanted = {str(dim): dim for dim in energy.dims}
    scalars = {scalar.name for scalar in energy.scalars}
    composite = not isinstance(energy.width, Dim) and "dim" not in wanted
    known = list(wanted) + (["dim"] if composite else [])
    usage = f"`cem.derive({name}, {', '.join(f'{n}=...' for n in wanted)})`"
    for key in given:
        if key not in known and key not in scalars:
            extra = f" and its scalars are {', '.join(sorted(scalars))}" if scalars else ""
            raise ValueError(
                f"energy `{name}` has no size or scalar `{key}`: got {key}={given[key]}; its sizes are"
                f" {', '.join(known)}{extra}; type {usage}"
            )
    sizes: dict[Dim, int] = {}
    for key in known:
        if key in given:
            size = _positive_integer(given[key])
            if size is None:
                raise ValueError(
                    f"energy `{name}`: size `{key}` is a positive integer: got {key}={given[key]!r};"
                    f" type `{key}=64`"
                )
            if key in wanted:
                sizes[wanted[key]] = size
    if composite and "dim" in given:
        _solve_width(energy, int(given["dim"]), sizes)
    missing = [key for key, dim in wanted.items() if dim not in sizes]
    if missing:
        raise ValueError(
            f"energy `{name}` needs the size{'s' if len(missing) > 1 else ''} {', '.join(missing)}: got"
            f" {', '.join(f'{k}={v}' for k, v in given.items()) or 'none'}; type {usage}"
        )
    return sizes


def _positive_integer(value: object) -> int | None:
    """The integer that a value is, 64.0 too, or None."""
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(value, bool) or found != value or found < 1 else found


def _solve_width(energy: Energy, width: int, sizes: dict[Dim, int]) -> None:
    """Fill in the one missing factor of the width, or check the product."""
    factors = sorted(energy.width.atoms(Dim), key=str)
    missing = [factor for factor in factors if factor not in sizes]
    known = energy.width.xreplace(sizes)
    if len(missing) == 1:
        rest = int(known.xreplace({missing[0]: 1}))
        if width % rest:
            raise ValueError(
                f"energy `{energy.name}`: the width {energy.width} must be a multiple of {rest}: got dim={width}"
            )
        sizes[missing[0]] = width // rest
    elif not missing and int(known) != width:
        raise ValueError(
            f"energy `{energy.name}`: the width of the state is {energy.width} ="
            f" {' * '.join(str(sizes[f]) for f in factors)} = {int(known)}: got dim={width}; leave one of them out"
        )


def solve_scalars(
    energy: Energy, sizes: Mapping[Symbol, int], given: Mapping[str, float], learn: Iterable[str]
) -> dict[Scalar, float]:
    """The value of every scalar: what was given, else its default at these sizes."""
    names = [scalar.name for scalar in energy.scalars]
    for name in learn:
        if name not in names:
            raise ValueError(
                f"energy `{energy.name}` has no scalar `{name}` to learn: its scalars are"
                f" {', '.join(names) or 'none'}; parameters are always learned"
            )
    values: dict[Scalar, float] = {}
    for scalar in energy.scalars:
        value: Expr | float | None = given.get(scalar.name, scalar.default)
        if value is None:
            raise ValueError(
                f"energy `{energy.name}` needs the scalar `{scalar.name}`: it has no default; type"
                f" `cem.derive({energy.name}, ..., {scalar.name}=1.0)`"
            )
        if isinstance(value, Expr):
            value = value.xreplace(dict(sizes))
            if not value.is_number:
                raise ValueError(
                    f"energy `{energy.name}`: the default of the scalar `{scalar.name}` is {scalar.default}, but the"
                    f" energy has no size {', '.join(sorted(map(str, value.free_symbols)))}; type"
                    f" `cem.derive({energy.name}, ..., {scalar.name}=1.0)`"
                )
        values[scalar] = float(value)
        if scalar.is_positive and not values[scalar] > 0:
            raise ValueError(
                f"energy `{energy.name}`: scalar `{scalar.name}` is positive: got {values[scalar]:g}"
            )
    return values


def check_names(
    energy: Energy, learn: Iterable[str], taken: Iterable[str], arguments: Iterable[str]
) -> None:
    """Refuse names that would hide a part of the layer or an argument of ``derive``.

    ``taken`` are the attributes of a layer, ``arguments`` the other arguments of ``derive``.
    """
    parameters = [str(parameter.name) for parameter in energy.parameters]
    for name in (*parameters, *learn):
        if name in taken or (name in learn and f"log_{name}" in parameters):
            other = (
                "a name of the layer itself"
                if name in taken
                else f"stored as `log_{name}`, a parameter"
            )
            raise ValueError(
                f"energy `{energy.name}`: the parameter name `{name}` is {other}; type another name"
            )
    for name in (*map(str, energy.dims), *(scalar.name for scalar in energy.scalars)):
        if name in arguments:
            raise ValueError(
                f"energy `{energy.name}`: `{name}` is an argument of `derive` itself, so it cannot name a"
                " size or a scalar; type another name"
            )


def check_maskable(energy: Energy, causal: bool) -> None:
    """Refuse a causal layer of a callable that cannot be masked: it could see the future."""
    if (
        energy.expression is None
        and energy.context is not None
        and causal
        and not energy.masks_itself
    ):
        raise ValueError(
            f"energy `{energy.name}` cannot be masked, so a causal layer of it could see the future:"
            f" {energy.reason}; give the callable an argument `visible` (bool, (seq,)) and mask with it, or type"
            " `causal=False`"
        )
