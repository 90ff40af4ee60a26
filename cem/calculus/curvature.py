"""Curvature of an energy in its state, by composition rules over the table of words.

Every rule is sufficient and none is necessary: ``convex``, ``concave`` and ``affine`` are proved on
all of R^dim, for every context, frozen value and parameter; ``unknown`` says nothing. The rules are
those of disciplined convex programming (Grant, Boyd and Ye, Disciplined Convex Programming, 2006,
section 5; Boyd and Vandenberghe, Convex Optimization, 2004, sections 3.2 and 3.5) with two classes
beside convex and concave:

* log-convex: f >= 0 with log(f) convex. Closed under sums, products and positive powers.
* root-convex: f >= 0 with sqrt(f) convex, such as a sum of squares. Closed under sums (Minkowski).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import sympy
from sympy import Add, Expr, Indexed, Mul, Number, NumberSymbol, Pow, Rational, Sum, Symbol

from ..language import words
from ..language.positions import Rope
from ..language.reductions import LogSumExp, SmoothMaximum, Weights
from ..language.symbols import Ravel, is_word
from ..language.tokens import Decay
from ..language.words import word_of
from .gradient import depends_on_state

EVEN = frozenset((sympy.Abs, words.log_cosh))
"""Even convex words: nondecreasing for arguments >= 0, nonincreasing for arguments <= 0."""

SIGN_KEEPING = frozenset((sympy.tanh, sympy.sign, words.gelu, words.gelu_tanh, words.silu))
"""Words whose value has the sign of the argument."""

LOG_CONCAVE = frozenset((words.sigmoid, words.softplus))
"""Positive nondecreasing words whose logarithm is concave."""


@dataclass(frozen=True)
class Reason:
    """One step of a proof of curvature.

    ``result`` is the curvature that ``rule`` gives the sub-expression ``expression``, element by
    element where it has free indices. ``sign`` is +1 where the value is never negative, -1 where it
    is never positive, else 0.

    >>> import cem
    >>> dim = cem.dims("dim")
    >>> h, i = cem.state(dim), dim.index("i")
    >>> explain(h[i] ** 2)[-1].rule
    'even power of affine'
    """

    expression: Expr
    rule: str
    result: str
    sign: int = 0

    def __str__(self) -> str:
        return f"{self.expression} is {self.result}: {self.rule}"


def curvature(expression: Expr) -> str:
    """``"convex"``, ``"concave"``, ``"affine"`` (constants too) or ``"unknown"`` in the state.

    ``expression`` is canonical. Frozen values, the context and parameters are constants of unknown
    sign; sizes and positive scalars are positive. A function that is defined on a part of R^dim
    only, such as log(h[i]), is ``"unknown"``.

    >>> from sympy import Sum
    >>> import cem
    >>> dim, hidden = cem.dims("dim hidden")
    >>> h, i, m = cem.state(dim), dim.index("i"), hidden.index("m")
    >>> G, U = cem.parameter("G", hidden, dim), cem.parameter("U", hidden, dim)
    >>> up, gate = Sum(U[m, i] * h[i], i), Sum(G[m, i] * cem.frozen(h)[i], i)
    >>> curvature(-Sum(cem.sigmoid(gate) * up**2, m) / 2)
    'concave'
    >>> curvature(-Sum(cem.silu(gate) * up**2, m) / 2)
    'unknown'
    """
    return explain(expression)[-1].result


def explain(expression: Expr) -> list[Reason]:
    """The steps that prove the curvature of an expression, parts before wholes, itself last.

    Sub-expressions without the state are listed where their sign decides.

    >>> from sympy import Sum
    >>> import cem
    >>> dim = cem.dims("dim")
    >>> h, i = cem.state(dim), dim.index("i")
    >>> for reason in explain(-Sum(h[i] ** 2, i) / 2):
    ...     print(reason)
    h[i] is affine: entry of the state
    h[i]**2 is convex: even power of affine
    Sum(h[i]**2, (i, 0, dim - 1)) is convex: sum over i of convex
    -Sum(h[i]**2, (i, 0, dim - 1))/2 is concave: nonpositive constant times convex
    """
    proof = _Proof()
    facts = proof.facts(expression)
    if not depends_on_state(expression):
        proof.add_constant(expression, facts)
    return list(proof.reasons.values())


@dataclass(frozen=True)
class _Facts:
    """What is proved of a sub-expression; a flag that is False says nothing."""

    convex: bool = False
    concave: bool = False
    sign: int = 0
    log_convex: bool = False
    root_convex: bool = False

    @property
    def affine(self) -> bool:
        return self.convex and self.concave

    @property
    def result(self) -> str:
        return ("unknown", "concave", "convex", "affine")[2 * self.convex + self.concave]


_LOG_CONVEX = _Facts(convex=True, sign=1, log_convex=True, root_convex=True)
_SIGNS = {1: "nonnegative constant", -1: "nonpositive constant", 0: "constant of unknown sign"}


class _Proof:
    """Walks an expression once, each sub-expression after its parts."""

    def __init__(self) -> None:
        self.memo: dict[Expr, _Facts] = {}
        self.reasons: dict[Expr, Reason] = {}

    def facts(self, node: Expr) -> _Facts:
        found = self.memo.get(node)
        if found is None:
            found, rule = self.step(node)
            if depends_on_state(node):
                self.reasons[node] = Reason(node, rule, found.result, found.sign)
            else:
                known = found.sign > 0
                found = _Facts(True, True, found.sign, log_convex=known, root_convex=known)
            self.memo[node] = found
        return found

    def add_constant(self, node: Expr, facts: _Facts) -> None:
        self.reasons[node] = Reason(node, _SIGNS[facts.sign], "affine", facts.sign)

    def step(self, node: Expr) -> tuple[_Facts, str]:
        """What is proved and by which rule; of a constant only the sign counts."""
        match node:
            case Indexed():
                return _Facts(True, True), "entry of the state"
            case Number() | NumberSymbol() | Symbol():
                return _Facts(True, True, _own_sign(node)), "number"
            case Add():
                parts = [self.facts(term) for term in node.args]
                return _added(parts), f"sum of {_results(parts)}"
            case Sum():
                body = self.facts(node.function)
                names = ", ".join(str(limit[0]) for limit in node.limits)
                return body, f"sum over {names} of {body.result}"
            case Ravel():
                body = self.facts(node.args[0])
                return body, f"entries of {body.result}"
            case Rope():
                body = self.facts(node.body)
                return _Facts(body.affine, body.affine), f"rotation of {body.result}"
            case SmoothMaximum():
                # At least max(body), and 0 over an empty visible set: a sign of +1 is kept.
                body = self.facts(node.body)
                what = "log-sum-exp" if isinstance(node, LogSumExp) else "sparse maximum"
                return _Facts(body.convex, sign=max(body.sign, 0)), f"{what} of {body.result}"
            case Decay():
                return _Facts(sign=1), "decay"
            case Weights():
                self.facts(node.body)
                return _Facts(sign=1), "weights by a score that moves"
            case Mul():
                return self.product(node)
            case Pow():
                return self.power(*node.args)
            case sympy.log():
                return self.logarithm(node)
        if is_word(node):
            return self.word(node)
        return _Facts(), f"no rule for `{type(node).__name__}`"

    def product(self, node: Mul) -> tuple[_Facts, str]:
        moving = {f: self.facts(f) for f in node.args if depends_on_state(f)}
        fixed = {f: self.facts(f) for f in node.args if f not in moving}
        parts = list(moving.values())
        factor = prod(f.sign for f in fixed.values())
        sign = factor * prod(part.sign for part in parts)
        if len(parts) == 1:
            part, name = parts[0], parts[0].result
        elif parts and all(p.log_convex for p in parts):
            part, name = _LOG_CONVEX, "log-convex factors"
        else:
            return _Facts(sign=sign), f"product of {_results(parts)}"
        if part.affine:
            return _Facts(True, True, sign), "constant times affine"
        if part.convex or part.concave:
            for f, facts in fixed.items():
                if not isinstance(f, Number):
                    self.add_constant(f, facts)
        facts = _Facts(sign=sign)
        if factor < 0:
            facts = _Facts(part.concave, part.convex, sign)
        elif factor > 0:
            facts = replace(part, sign=sign)
        return facts, f"{_SIGNS[factor]} times {name}"

    def power(self, base: Expr, exponent: Expr) -> tuple[_Facts, str]:
        part = self.facts(base)
        if depends_on_state(exponent):
            return self.exponential(base, exponent)
        parity = _parity(exponent)
        nonnegative = part.sign > 0 or parity == 0
        sign = 1 if nonnegative else -1 if part.sign < 0 and parity == 1 else 0
        if not (isinstance(exponent, Number) and exponent.is_positive):
            return _Facts(sign=sign), "power that is not a positive number"
        if part.log_convex:
            return _LOG_CONVEX, "positive power of log-convex"
        if part.root_convex and exponent >= Rational(1, 2):
            facts = _Facts(True, sign=1, root_convex=bool(exponent >= 1))
            return facts, f"power {exponent} of a root-convex function, like a sum of squares"
        if parity == 0 and part.affine:
            return _Facts(True, sign=1, root_convex=True), "even power of affine"
        # t^p is convex and nondecreasing for t >= 0 and p >= 1; a base <= 0 is -1 times such a t.
        if exponent >= 1 and (part.convex and part.sign > 0):
            facts = _Facts(True, sign=1, root_convex=bool(exponent >= 2))
            return facts, f"power {exponent} of nonnegative {part.result}"
        if parity is not None and (part.concave and part.sign < 0):
            facts = _Facts(parity == 0, parity == 1, sign, root_convex=parity == 0)
            return facts, f"power {exponent} of nonpositive {part.result}"
        return _Facts(sign=sign), f"power {exponent} of {part.result}"

    def exponential(self, base: Expr, exponent: Expr) -> tuple[_Facts, str]:
        """base ** exponent = exp(exponent * log(base)) for a positive base that is fixed."""
        part = self.facts(exponent)
        fixed = isinstance(base, Number | NumberSymbol | Symbol) and base.is_positive
        if fixed and (part.affine or (part.convex and (base - 1).is_nonnegative)):
            return _LOG_CONVEX, f"positive constant to a power that is {part.result}"
        return _Facts(sign=max(self.facts(base).sign, 0)), "power with an exponent that moves"

    def logarithm(self, node: Expr) -> tuple[_Facts, str]:
        """The logarithm of an argument that is positive on all of R^dim."""
        inner = node.args[0]
        if isinstance(inner, Number):
            return _Facts(True, True, _own_sign(node)), "number"
        if self.facts(inner).log_convex:
            return _Facts(convex=True), "logarithm of log-convex"
        if inner.func in LOG_CONCAVE and self.facts(inner.args[0]).concave:
            return _Facts(concave=True), f"logarithm of {inner.func.__name__}, which is log-concave"
        return _Facts(), "logarithm of an argument not known to be log-convex or log-concave"

    def word(self, node: Expr) -> tuple[_Facts, str]:
        """The rule of composition; monotonicity is asked for on the range of the argument."""
        part, function = self.facts(node.args[0]), node.func
        try:
            word = word_of(function)
        except ValueError:
            return _Facts(), f"`{function.__name__}` is not a word of the language"
        sign = part.sign if function in SIGN_KEEPING else word.sign
        monotone = part.sign if function in EVEN else word.monotone
        up, down = monotone > 0, monotone < 0
        trend = ", nondecreasing" * up + ", nonincreasing" * down
        shape = (word.curvature or "not convex, not concave") + trend
        rule = f"{word.name} ({shape}) of {part.result}"
        if word.curvature == "convex":
            convex = part.affine or (up and part.convex) or (down and part.concave)
            if convex and function is sympy.exp:
                return _LOG_CONVEX, rule
            return _Facts(convex=convex, sign=sign), rule
        if word.curvature == "concave":
            concave = part.affine or (up and part.concave) or (down and part.convex)
            return _Facts(concave=concave, sign=sign), rule
        return _Facts(sign=sign), rule


def _own_sign(number: Expr) -> int:
    return 1 if number.is_nonnegative else -1 if number.is_nonpositive else 0


def _results(parts: list[_Facts]) -> str:
    return " and ".join(dict.fromkeys(part.result for part in parts))


def _added(parts: list[_Facts]) -> _Facts:
    signs = {part.sign for part in parts}
    return _Facts(
        all(part.convex for part in parts),
        all(part.concave for part in parts),
        signs.pop() if len(signs) == 1 else 0,
        all(part.log_convex for part in parts),
        all(part.root_convex for part in parts),
    )


def _parity(exponent: Expr) -> int | None:
    """0 for an even number, 1 for an odd one, None for any other exponent; 2.0 is even too."""
    if exponent.is_Integer or (exponent.is_Float and float(exponent).is_integer()):
        return int(exponent) % 2
    return None
