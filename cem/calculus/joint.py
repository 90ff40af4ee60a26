"""The gradient of the energies of all tokens together, for the state of one of them.

    d/dh_u sum_t E(h_t | x = h) = dE_u/dh_u + sum_{t : u in V(t)} dE_t/dx_u

The first term is the conditional gradient. The second is what a token receives as the context of
others; factors that depend on the receiving token alone are taken out of its sum.
"""

from __future__ import annotations

from sympy import Add, Expr, Idx, Indexed, Mul, Sum

from ..language.canonical import canonical
from ..language.indices import free_indices, rename
from ..language.positions import TOKEN_POSITION, ContextPosition, Rope, TokenPosition
from ..language.symbols import SEQ, Context, Frozen, Ravel, State, index, size_of, split, total
from ..language.tokens import Decay, TokenSum
from .gradient import gradient, output_index, sweep


def joint_gradient(energy: Expr, state: State) -> Expr:
    """d/dh_d of the sum of all energies, with the free index ``output_index(width)``; it points uphill.

    ``energy`` is canonical, of one token, and its context is the states themselves.

    >>> import cem
    >>> from sympy import Sum
    >>> dim = cem.dims("dim")
    >>> h, x, i = cem.state(dim), cem.context(dim), dim.index("i")
    >>> joint_gradient(canonical(-cem.logsumexp(Sum(h[i] * x[x.index("s"), i], i), x.index("s"))), h).atoms(TokenSum)
    {TokenSum(h[d]*Softmax(Sum(h[i]*x[s, i], (i, 0, dim - 1)), s), s)}
    """
    width = state.shape[0]
    free, token = output_index(width), index("s", SEQ)
    received = []
    for leaf, adjoint in sweep(energy, kind=Context):
        seen, slot = leaf.indices
        own = Idx(token.label, size_of(token))
        adjoint = rename(adjoint, {seen: own})
        group = split(slot)
        if len(group) == 1:
            adjoint = rename(adjoint, {group[0]: free})
        else:
            adjoint = Ravel(adjoint, slot, free)
        received.append(adjoint)
    found = _receive(canonical(Add(*received)), token, state, frozenset((free,)))
    return canonical(gradient(energy, width) + found)


def _receive(body: Expr, s: Idx, state: State, outer: frozenset[Idx]) -> Expr:
    """The sum over tokens of an expression, with everything outside that the sum does not concern.

    ``outer`` are the indices of the result.
    """
    match body:
        case Add():
            return Add(*(_receive(term, s, state, outer) for term in body.args))
        case Sum():
            inner = _receive(body.function, s, state, outer)
            return total(inner, [limit[0] for limit in body.limits])
    factors = Mul.make_args(body)
    for place, factor in enumerate(factors):
        others = Mul(*factors[:place], *factors[place + 1 :])
        if isinstance(factor, Add) and _is_mixed(factor.args):
            return Add(*(_receive(term * others, s, state, outer) for term in factor.args))
        if isinstance(factor, Sum) and _writes(factor, outer):
            opened, bound = _opened(factor, free_indices(others))
            return total(_receive(opened * others, s, state, outer), bound)
        if isinstance(factor, Ravel) and not free_indices(others) & set(split(factor.args[1])):
            cells = frozenset(split(factor.args[1]))
            inner = _receive(factor.args[0] * others, s, state, cells)
            return Ravel(inner, *factor.args[1:])
        if isinstance(factor, Rope) and not _moves(factor.position):
            # The receiver's own rotation; what does not share its index goes along below it.
            if factor.index not in free_indices(others):
                turned = _receive(factor.body * others, s, state, outer)
                where = _as_receiver(factor.position, s, state)
                return Rope(turned, factor.index, where, *factor.args[3:])
            fixed = Mul(*(f for f in Mul.make_args(others) if not _moves(f)))
            rest = Mul(*(f for f in Mul.make_args(others) if _moves(f)))
            if fixed != 1 and factor.index not in free_indices(rest):
                outside = _as_receiver(fixed, s, state)
                return outside * _receive(factor * rest, s, state, outer)
    inside = [factor for factor in factors if _moves(factor)]
    outside = [factor for factor in factors if not _moves(factor)]
    return _as_receiver(Mul(*outside), s, state) * TokenSum(Mul(*inside), s)


def _opened(factor: Sum, taken: frozenset[Idx]) -> tuple[Expr, list[Idx]]:
    """The body of a sum and its indices, with fresh names for those that stand outside it too."""
    bound = [limit[0] for limit in factor.limits]
    fresh = {idx: index(f"{idx.label.name}_", size_of(idx)) for idx in bound if idx in taken}
    return rename(factor.function, fresh), [fresh.get(idx, idx) for idx in bound]


def _moves(factor: Expr) -> bool:
    """Whether a factor differs between the tokens that look, for one and the same token that is seen."""
    if isinstance(factor, Indexed):
        return isinstance(factor.base, State | Frozen)
    if isinstance(factor, TokenPosition | Decay) or factor == SEQ:
        return True
    return any(_moves(arg) for arg in factor.args if isinstance(arg, Expr))


def _writes(factor: Expr, outer: frozenset[Idx]) -> bool:
    """Whether a sum of moving parts holds fixed ones that carry an index of the result."""
    if not isinstance(factor, Sum) or any(size_of(limit[0]) == SEQ for limit in factor.limits):
        return False
    parts = Mul.make_args(factor.function)
    fixed = any(not _moves(part) and free_indices(part) & outer for part in parts)
    return _moves(factor) and (fixed or any(_writes(part, outer) for part in parts))


def _is_mixed(parts: tuple[Expr, ...]) -> bool:
    """Whether some parts belong to the sum over tokens and others do not."""
    return len({_moves(part) for part in parts if not part.is_number}) > 1


def _as_receiver(expression: Expr, s: Idx, state: State) -> Expr:
    """An expression of the context token s as one of the state, which it is."""
    names = {}
    for leaf in expression.atoms(Indexed):
        if s in free_indices(leaf):
            if isinstance(leaf.base, Context):
                names[leaf] = Indexed(state, *leaf.indices[1:])
            elif isinstance(leaf.base, ContextPosition):
                names[leaf] = TOKEN_POSITION
    return expression.xreplace(names)
