"""Expressions as a person writes them: LaTeX, one line of text, and names for what recurs.

Legend: a *factor* is a part of a product with its place in the line; *visible set* V is what the
index of the context ranges over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import sympy
from sympy import Add, Expr, Float, Idx, Indexed, Integer, Mul, Pow, Rational, Sum, Symbol

from . import symbols
from .entmax import Entmax, EntmaxConjugate
from .order import is_negative, negated, parts, place, terms
from .positions import ContextPosition, Lookup, Rope, TokenPosition
from .reductions import LogSumExp, SmoothMaximum, Softmax
from .symbols import SEQ, Ravel, size_of, split
from .tokens import Decay, TokenSum
from .words import log_cosh, word_of

GREEK = dict(
    alpha="α", beta="β", gamma="γ", delta="δ", epsilon="ε", zeta="ζ", eta="η", theta="θ", iota="ι",
    kappa="κ", lamda="λ", lam="λ", mu="μ", nu="ν", xi="ξ", pi="π", rho="ρ", sigma="σ",
    tau="τ", phi="φ", chi="χ", psi="ψ", omega="ω",
)  # fmt: skip

WORDS_IN_TEXT = dict(sigmoid="σ", normal_cdf="Φ", normal_pdf="φ", log_cosh="log cosh")
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def latex(expression: Expr, *, names: Mapping[str, str] | None = None) -> str:
    """LaTeX of an expression, without dollar signs.

    ``names`` gives the LaTeX of a tensor, a scalar or a size by its name, where the default (Greek
    letters, a bar for a frozen value, upright words) is not what is wanted.

    >>> import cem
    >>> from sympy import Sum
    >>> dim = cem.dims("dim")
    >>> h, x, i = cem.state(dim), cem.context(dim), dim.index("i")
    >>> beta, s = cem.scalar("beta"), x.index("s")
    >>> print(latex(-cem.logsumexp(beta * Sum(h[i] * x[s, i], i), s) / beta))
    -\\frac{1}{\\beta} \\log\\sum_{s \\in V} \\exp\\left(\\beta \\sum_{i} h_{i} x_{si}\\right)
    """
    return _Latex(expression, names or {}).show(expression)


def text(expression: Expr, *, names: Mapping[str, str] | None = None) -> str:
    """One line of plain text, for terminals.

    >>> import cem
    >>> from sympy import Sum
    >>> dim = cem.dims("dim")
    >>> h, x, i = cem.state(dim), cem.context(dim), dim.index("i")
    >>> beta, s = cem.scalar("beta"), x.index("s")
    >>> text(-cem.logsumexp(beta * Sum(h[i] * x[s, i], i), s) / beta)
    '-(1/β) log Σ_{s∈V} exp(β Σ_i h[i] x[s,i])'
    """
    return _Text(expression, names or {}).show(expression)


def _primes(expression: Expr) -> dict[Idx, int]:
    """How many primes tell an index from others of the same letter over other sizes."""
    found: dict[str, list[Expr]] = {}
    primes = {}
    for idx in (node for node in sympy.preorder_traversal(expression) if isinstance(node, Idx)):
        sizes = found.setdefault(str(idx.label), [])
        if size_of(idx) not in sizes:
            sizes.append(size_of(idx))
        primes[idx] = sizes.index(size_of(idx))
    return primes


class _Notation:
    """The order of things, common to LaTeX and text; the subclasses know the marks."""

    tall = True
    """Whether fractions and roots delimit themselves."""

    def __init__(self, expression: Expr, names: Mapping[str, str]) -> None:
        self.names = names
        self.primes = _primes(expression)

    def show(self, node: Expr) -> str:
        if isinstance(node, Add):
            return self.add(node)
        if isinstance(node, Mul | Ravel) and parts(node)[2] != [node] or node.is_Rational:
            return self.product(node)
        if isinstance(node, Pow):
            return self.product(node) if is_negative(node.exp) else self.power(node)
        return self.atom(node)

    def add(self, node: Expr) -> str:
        shown = ""
        for term in terms(node):
            minus = is_negative(term)
            part = self.show(negated(term) if minus else term)
            shown += f" {'-' if minus else '+'} {part}" if shown else f"{'-' * minus}{part}"
        return shown

    def product(self, node: Expr) -> str:
        sign, number, above, below = parts(node)
        minus = "-" if sign < 0 else ""
        if number.is_Rational:
            top, bottom = Integer(number.p), Integer(number.q)
        else:
            top, bottom = number, Integer(1)
        if bottom == 1 and not below:
            coefficient = [] if top == 1 and above else [self.atom(top)]
            return minus + " ".join([*coefficient, *self.factors(above)])
        plain = [f for f in above if place(f)[0] < 2]
        rest = [f for f in above if place(f)[0] >= 2]
        if any(place(f)[0] >= 2 for f in below):
            plain, rest = above, []
        fraction = self.fraction(self.side(top, plain), self.side(bottom, below))
        if rest and not self.tall:
            fraction = self.group(fraction)
        return minus + " ".join([fraction, *self.factors(rest)])

    def side(self, number: Expr, factors: list[Expr]) -> str:
        """What stands above or below the line of a fraction."""
        if number == 1 and len(factors) == 1:
            return self.show(factors[0])
        return " ".join([self.atom(number)] * (number != 1 or not factors) + self.factors(factors))

    def factors(self, factors: list[Expr]) -> list[str]:
        """The factors of a product; a sum is put in brackets where another one follows."""
        sums = sum(isinstance(factor, Sum) for factor in factors)
        shown = []
        for factor in factors:
            loose = (
                isinstance(factor, Add)
                or (isinstance(factor, Sum) and sums > 1)
                or (isinstance(factor, SmoothMaximum) and factor is not factors[-1])
            )
            shown.append(self.group(self.show(factor)) if loose else self.show(factor))
        return shown

    def power(self, node: Pow) -> str:
        base, exponent = node.args
        if exponent in (Rational(1, 2), Float(0.5)):
            return self.root(self.show(base))
        shown = self.show(base)
        if isinstance(base, Indexed | Symbol):
            shown = f"{{{shown}}}" if self.tall and ("'" in shown or "^" in shown) else shown
        elif not (base.is_Integer and base >= 0 or self.closes(base)):
            shown = self.group(shown)
        return self.raised(shown, self.show(exponent), exponent)

    def closes(self, node: Expr) -> bool:
        """Whether the notation of a node ends with its own closing bracket."""
        loose = Add | Mul | Pow | Sum | SmoothMaximum | Ravel | Float | Rational | log_cosh
        return not isinstance(node, loose)

    def atom(self, node: Expr) -> str:
        match node:
            case Idx():
                return self.index(node)
            case Indexed():
                name = "t" if isinstance(node.base, ContextPosition) else str(node.base.label)
                return self.entry(name, node.indices)
            case symbols.NamedArray():
                return self.entry(str(node.label), ())
            case TokenPosition():
                return self.entry("t", ())
            case Rope():
                return self.rotated(self.show(node.position), self.show(node.body))
            case Decay():
                return self.decayed(node.index, self.show(node.body))
            case TokenSum():
                return self.received(node.index, self.body(node.body))
            case Lookup():
                body, idx, number = node.args
                return self.looked_up(self.show(body), idx, self.show(number))
            case symbols.Dim() if node == SEQ:
                return "|V|"
            case Symbol():
                return self.entry(node.name, ())
            case Sum():
                operator = self.sum([limit[0] for limit in node.limits])
                return " ".join([operator, self.body(node.function)])
            case LogSumExp():
                body, bound = node, []
                while isinstance(body, LogSumExp):
                    bound.append(body.index)
                    body = body.body
                return " ".join([self.log_of(self.sum(bound)), self.call(sympy.exp, body)])
            case Softmax():
                return self.softmax(node.index, node.body)
            case EntmaxConjugate() | Entmax():
                return self.sparse(node)
            case Ravel():
                body, slot, idx = node.args
                return self.read_at(self.show(body), idx, slot)
            case sympy.log() if isinstance(node.args[0], Sum):
                return self.log_of(self.show(node.args[0]))
            case Float():
                return f"{float(node):.6g}"
            case _ if node.is_number and not node.is_Function:
                return self.constant(node)
        return self.call(node.func, node.args[0])

    def body(self, node: Expr) -> str:
        """What stands under a sum sign."""
        shown = self.show(node)
        return self.group(shown) if isinstance(node, Add) or shown.startswith("-") else shown

    def label(self, idx: Idx) -> tuple[str, str, int]:
        letter, digits = re.fullmatch(r"(.*?)(\d*)", str(idx.label)).groups()
        return letter, digits, self.primes.get(idx, 0)

    def parts_of_name(self, name: str) -> tuple[str, str, bool, int]:
        """A name as its stem, a trailing mark (W_q, U1), whether it has a bar, and its primes."""
        primes = len(name) - len(name.rstrip("'"))
        name = name.rstrip("'")
        bar = name.endswith("bar") and len(name) > 3
        stem, mark = re.fullmatch(r"(.+?)_?(\d*|(?<=_)\w+)", name[:-3] if bar else name).groups()
        return stem, mark, bar, primes


class _Latex(_Notation):
    def index(self, idx: Idx) -> str:
        letter, digits, primes = self.label(idx)
        return (
            (letter if len(letter) == 1 else rf"\mathrm{{{letter}}}")
            + (f"_{digits}" if digits else "")
            + "'" * primes
        )

    def slot(self, slot: Expr) -> str:
        shown = "".join(map(self.index, split(slot)))
        return shown if isinstance(slot, Idx) else f"({shown})"

    def entry(self, name: str, slots: Iterable[Expr]) -> str:
        slots = tuple(slots)
        stem, mark, bar, primes = self.parts_of_name(name)
        mark = mark if len(mark) <= 1 else rf"\mathrm{{{mark}}}"
        if name in self.names:
            shown, mark = self.names[name], ""
        elif stem in GREEK:
            shown = "\\" + {"lam": "lambda", "lamda": "lambda"}.get(stem, stem)
        else:
            shown = stem if len(stem) == 1 else rf"\mathrm{{{stem}}}".replace("_", r"\_")
        shown = (rf"\bar{{{shown}}}" if bar and name not in self.names else shown) + "'" * primes
        if mark and not slots:
            return f"{shown}_{{{mark}}}"
        if mark:
            shown = f"{shown}^{{({mark})}}"
        return f"{shown}_{{{''.join(map(self.slot, slots))}}}" if slots else shown

    def sum(self, bound: list[Idx]) -> str:
        marks = (rf"{self.index(i)} \in V" if size_of(i) == SEQ else self.index(i) for i in bound)
        return rf"\sum_{{{', '.join(marks)}}}"

    def log_of(self, shown: str) -> str:
        return rf"\log{shown}"

    def group(self, shown: str) -> str:
        return rf"\left({shown}\right)"

    def fraction(self, top: str, bottom: str) -> str:
        return rf"\frac{{{top}}}{{{bottom}}}"

    def root(self, shown: str) -> str:
        return rf"\sqrt{{{shown}}}"

    def raised(self, base: str, shown: str, exponent: Expr) -> str:
        return f"{base}^{{{shown}}}"

    def call(self, function: type[sympy.Function], argument: Expr) -> str:
        word = word_of(function).latex
        if "{}" in word:
            return word.replace("{}", self.show(argument))
        return rf"{word}\left({self.show(argument)}\right)"

    def sparse(self, node: EntmaxConjugate | Entmax) -> str:
        name = r"\operatorname{entmax}" if isinstance(node, Entmax) else r"\Psi"
        alpha, over = float(node.args[2]), self.sum([node.index]).split("_", 1)[1]
        return rf"{name}_{over}\left({self.show(node.body)};\ {alpha:g}\right)"

    def softmax(self, idx: Idx, body: Expr) -> str:
        return rf"\operatorname{{softmax}}_{{{self.index(idx)}}}\left({self.show(body)}\right)"

    def read_at(self, shown: str, idx: Idx, slot: Expr) -> str:
        return rf"\left[{shown}\right]_{{{self.slot(slot)} = {self.index(idx)}}}"

    def looked_up(self, shown: str, idx: Idx, number: str) -> str:
        return rf"\left[{shown}\right]_{{{self.index(idx)} = {number}}}"

    def decayed(self, idx: Idx, shown: str) -> str:
        return rf"\operatorname{{decay}}_{{{self.index(idx)}}}\left({shown}\right)"

    def received(self, idx: Idx, shown: str) -> str:
        return rf"\sum_{{t :\, {self.index(idx)} \in V(t)}} {shown}"

    def rotated(self, position: str, shown: str) -> str:
        return rf"\operatorname{{rope}}_{{{position}}}\left({shown}\right)"

    def constant(self, node: Expr) -> str:
        return {"pi": r"\pi", "E": "e"}.get(str(node), str(node))


class _Text(_Notation):
    tall = False

    def index(self, idx: Idx) -> str:
        letter, digits, primes = self.label(idx)
        return letter + digits + "'" * primes

    def slot(self, slot: Expr) -> str:
        shown = "".join(map(self.index, split(slot)))
        return shown if isinstance(slot, Idx) else f"({shown})"

    def entry(self, name: str, slots: Iterable[Expr]) -> str:
        stem, mark, bar, primes = self.parts_of_name(name)
        shown = GREEK.get(stem, stem) + "\N{COMBINING MACRON}" * bar
        shown += ("_" + mark if mark and not mark.isdigit() else mark) + "'" * primes
        shown = self.names.get(name, shown)
        inside = ",".join(map(self.slot, slots))
        return f"{shown}[{inside}]" if inside else shown

    def sum(self, bound: list[Idx]) -> str:
        marks = [f"{self.index(i)}∈V" if size_of(i) == SEQ else self.index(i) for i in bound]
        inside = ",".join(marks)
        return f"Σ_{inside}" if len(inside) == 1 else f"Σ_{{{inside}}}"

    def log_of(self, shown: str) -> str:
        return f"log {shown}"

    def group(self, shown: str) -> str:
        return f"({shown})"

    def fraction(self, top: str, bottom: str) -> str:
        return "/".join(f"({side})" if " " in side else side for side in (top, bottom))

    def root(self, shown: str) -> str:
        return f"√{shown}" if shown.isalnum() else f"√({shown})"

    def raised(self, base: str, shown: str, exponent: Expr) -> str:
        if exponent.is_Integer:
            return base + shown.translate(RAISED)
        return f"{base}^{shown if shown.isalnum() else f'({shown})'}"

    def call(self, function: type[sympy.Function], argument: Expr) -> str:
        name, shown = function.__name__, self.show(argument)
        if name == "Abs":
            return f"|{shown}|"
        if name.endswith("_antiderivative"):
            name = "∫" + name.removesuffix("_antiderivative")
        return f"{WORDS_IN_TEXT.get(name, name)}({shown})"

    def sparse(self, node: EntmaxConjugate | Entmax) -> str:
        name = "entmax" if isinstance(node, Entmax) else "Ψ"
        alpha, over = float(node.args[2]), self.sum([node.index]).split("_", 1)[1]
        return f"{name}_{over}({self.show(node.body)}; {alpha:g})"

    def softmax(self, idx: Idx, body: Expr) -> str:
        return f"softmax_{self.index(idx)}({self.show(body)})"

    def read_at(self, shown: str, idx: Idx, slot: Expr) -> str:
        return f"[{shown}]_{{{self.slot(slot)}={self.index(idx)}}}"

    def looked_up(self, shown: str, idx: Idx, number: str) -> str:
        return f"[{shown}]_{{{self.index(idx)}={number}}}"

    def decayed(self, idx: Idx, shown: str) -> str:
        return f"decay_{self.index(idx)}({shown})"

    def received(self, idx: Idx, shown: str) -> str:
        return f"Σ_{{t: {self.index(idx)}∈V(t)}} {shown}"

    def rotated(self, position: str, shown: str) -> str:
        return f"rope_{{{position}}}({shown})" if len(position) > 1 else f"rope_{position}({shown})"

    def constant(self, node: Expr) -> str:
        return {"pi": "π", "E": "e"}.get(str(node), str(node))
