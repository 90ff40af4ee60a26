"""Energies as JSON: a tree of whitelisted words, read back exactly and without evaluating anything.

The text has four keys: ``cem`` (the version of the format), ``name``, ``symbols`` (every tensor and
scalar, with its kind, sizes, sign and default) and ``energy``, a tree. In the tree a whole number
is itself, a string is a named size, and everything else is ``{"word": ..., "args": [...]}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from keyword import iskeyword
from typing import NoReturn

from mpmath.libmp import from_man_exp
from sympy import (
    Add,
    Expr,
    Float,
    Idx,
    Indexed,
    Integer,
    Mul,
    Pow,
    Rational,
    Sum,
    Symbol,
    pi,
)
from sympy import E as euler

from . import symbols
from .conversion import as_expression
from .symbols import Dim, LogSumExp, NamedArray, Ravel, Scalar, Softmax, index, size_of, split
from .words import WORDS

VERSION = 1
MAX_DEPTH = 100
MAX_NODES = 100_000
MAX_CHARACTERS = 4_000_000

KINDS: dict[str, type[NamedArray]] = {
    "state": symbols.State,
    "frozen": symbols.Frozen,
    "context": symbols.Context,
    "parameter": symbols.Parameter,
}
FUNCTIONS = {row.name: row.function for row in WORDS}
ARITHMETIC = {"Add": Add, "Mul": Mul, "Pow": Pow}
REDUCTIONS = {"LogSumExp": LogSumExp, "Softmax": Softmax, "Ravel": Ravel}
CONSTANTS = {"pi": pi, "E": euler}
LEAVES = ("entry", "float", "index", "rational", "scalar")
WORD_NAMES = sorted([*LEAVES, *FUNCTIONS, *ARITHMETIC, *REDUCTIONS, *CONSTANTS, "Sum"])


def to_json(expression: Expr, name: str = "energy") -> str:
    """An expression of the language as JSON text, the same text for equal expressions.

    ``ValueError`` for what is not of the language: a plain symbol, a function without a row in the
    table of words, two different tensors of one name; ``TypeError`` for text.

    >>> import cem
    >>> dim = cem.dims("dim")
    >>> h, i = cem.state(dim), dim.index("i")
    >>> text = to_json(cem.silu(h[i]), name="example")
    >>> text[:26]
    '{"cem": 1, "name": "exampl'
    >>> from_json(text)
    (silu(h[i]), 'example')
    """
    writer = _Writer()
    tree = writer.tree(as_expression(expression), "$.energy", 0)
    document = {
        "cem": VERSION,
        "name": name,
        "symbols": {key: row for key, (_, row) in sorted(writer.symbols.items())},
        "energy": tree,
    }
    text = json.dumps(document, ensure_ascii=False)
    if from_json(text)[0] != expression:
        raise ValueError(f"the expression cannot be written as JSON: got {str(expression)[:200]}")
    return text


def from_json(text: str) -> tuple[Expr, str]:
    """The expression and the name that ``to_json`` wrote.

    Nothing in the text is evaluated, simplified or looked up beyond the words of the language.
    ``ValueError`` names the place in the tree, what was got and what is allowed.

    >>> from_json('{"cem": 2, "name": "future", "symbols": {}, "energy": 0}')
    Traceback (most recent call last):
        ...
    ValueError: $.cem must be a known version: got 2; allowed: 1
    """
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        got = len(text) if isinstance(text, str) else type(text).__name__
        _refuse("$", "be JSON text", got, f"strings of up to {MAX_CHARACTERS} characters")
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        _refuse("$", "be a flatter tree", "too many levels", f"{MAX_DEPTH} levels")
    except ValueError as error:
        _refuse("$", "be JSON", str(error), "unique keys and finite numbers")
    _check_keys(document, "$", ("cem", "name", "symbols", "energy"))
    version, name, rows = document["cem"], document["name"], document["symbols"]
    if type(version) is not int or version != VERSION:
        _refuse("$.cem", "be a known version", version, str(VERSION))
    if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
        _refuse("$.name", "be one line of text", name, "up to 200 printable characters")
    if not isinstance(rows, dict):
        _refuse("$.symbols", "be an object", rows, "names of tensors and scalars")
    reader = _Reader(rows)
    expression = reader.tree(document["energy"], "$.energy", 0)
    if unused := sorted(set(rows) - set(reader.found)):
        _refuse("$.symbols", "be used in $.energy", unused[0], ", ".join(reader.found) or "none")
    return expression, name


def _refuse(path: str, must: str, got: object, allowed: str) -> NoReturn:
    if isinstance(got, dict):
        shown = f"an object with the keys {json.dumps(sorted(got)[:8])[:200]}"
    elif isinstance(got, list):
        shown = f"a list of {len(got)}"
    else:
        shown = str(got)[:80] if type(got) in (int, float) else json.dumps(got)[:80]
    raise ValueError(f"{path} must {must}: got {shown}; allowed: {allowed}") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that is written twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"the number {text}")


def _check_keys(node: object, path: str, keys: tuple[str, ...]) -> None:
    if not isinstance(node, dict) or set(node) != set(keys):
        _refuse(path, "be an object", node, f"the keys {', '.join(keys)}")


def _check_name(name: object, path: str) -> str:
    # Names end up in the text of programs, so they are never anything but names.
    fine = isinstance(name, str) and name.isidentifier() and not iskeyword(name)
    if not fine or name.startswith("__") or len(name) > 64:
        _refuse(path, "be a name", name, "identifiers of up to 64 characters")
    return name


class _Walk:
    """What writing and reading share: how deep and how large a tree may be."""

    nodes = 0

    def enter(self, path: str, depth: int) -> None:
        self.nodes += 1
        if depth > MAX_DEPTH:
            _refuse(
                f"{path[:80]}...", "be a flatter tree", "too many levels", f"{MAX_DEPTH} levels"
            )
        if self.nodes > MAX_NODES:
            _refuse("$.energy", "be a smaller tree", "too many nodes", f"{MAX_NODES} nodes")


class _Writer(_Walk):
    def __init__(self) -> None:
        self.symbols: dict[str, tuple[Expr, dict]] = {}

    def tree(self, node: Expr, path: str, depth: int) -> object:
        self.enter(path, depth)

        def word(word: str, *args: object, parts: Iterable[Expr] = ()) -> dict[str, object]:
            start = len(args)
            below = (
                self.tree(part, f"{path}.args[{k}]", depth + 1)
                for k, part in enumerate(parts, start)
            )
            return {"word": word, "args": [*args, *below]}

        match node:
            case Integer():
                return int(node)
            case Dim():
                return node.name
            case Rational():
                return word("rational", int(node.p), int(node.q))
            case Float():
                sign, mantissa, exponent, _ = node._mpf_
                return word("float", int(-mantissa if sign else mantissa), exponent, node._prec)
            case Scalar():
                return word("scalar", self.scalar(node, path, depth))
            case Idx() if isinstance(node.label, Symbol) and len(node.args) == 2:
                return word("index", node.label.name, parts=[size_of(node)])
            case Indexed() if type(node.base) in KINDS.values():
                return word("entry", self.tensor(node.base, path, depth), parts=node.indices)
            case Sum():
                return word("Sum", parts=[node.function, *(limit[0] for limit in node.limits)])
        for table in (CONSTANTS, ARITHMETIC, REDUCTIONS, FUNCTIONS):
            for name, meaning in table.items():
                if node is meaning:
                    return word(name)
                if isinstance(node, Expr) and node.func is meaning:
                    return word(name, parts=node.args)
        got = f"{type(node).__name__} {str(node)[:60]}"
        _refuse(path, "be of the language", got, f"whole numbers, sizes, {', '.join(WORD_NAMES)}")

    def add(self, symbol: Expr, name: str, row: dict, path: str) -> str:
        if self.symbols.setdefault(name, (symbol, row))[0] != symbol:
            _refuse(path, "have a name of its own", name, "one meaning for every name")
        return name

    def scalar(self, node: Scalar, path: str, depth: int) -> str:
        default = node.default
        if default is not None:
            default = self.tree(default, f"$.symbols.{node.name}.default", depth + 1)
        row = {"kind": "scalar", "default": default, "positive": bool(node.is_positive)}
        return self.add(node, node.name, row, path)

    def tensor(self, base: NamedArray, path: str, depth: int) -> str:
        kind = next(kind for kind, meaning in KINDS.items() if type(base) is meaning)
        shape = [self.tree(size, f"{path}.shape", depth + 1) for size in base.shape]
        return self.add(base, str(base.label), {"kind": kind, "shape": shape}, path)


class _Reader(_Walk):
    def __init__(self, rows: dict) -> None:
        self.rows = rows
        self.found: dict[str, Expr | None] = {}

    def tree(self, node: object, path: str, depth: int) -> Expr:
        self.enter(path, depth)
        if type(node) is int:
            return Integer(node)
        if isinstance(node, str):
            return Dim(_check_name(node, path))
        _check_keys(node, path, ("word", "args"))
        word, args = node["word"], node["args"]
        if not isinstance(word, str) or word not in WORD_NAMES:
            _refuse(f"{path}.word", "be a word of the language", word, ", ".join(WORD_NAMES))
        path = f"{path}.args"
        if not isinstance(args, list):
            _refuse(path, "be a list", args, "lists of nodes")
        self.check_count(word, len(args), path)
        match word:
            case "rational" | "float":
                return _number(word, args, path)
            case "scalar":
                return self.symbol(args[0], f"{path}[0]", ("scalar",), depth)
            case "index":
                return index(
                    _check_name(args[0], f"{path}[0]"), self.size(args[1], f"{path}[1]", depth)
                )
            case "entry":
                base = self.symbol(args[0], f"{path}[0]", tuple(KINDS), depth)
                if len(args) != 1 + len(base.shape):
                    _refuse(path, "index every axis", args, f"a name and {len(base.shape)} slots")
                slots = (self.slot(args[k], f"{path}[{k}]", depth) for k in range(1, len(args)))
                return Indexed(base, *slots)
            case "Ravel":
                body = self.tree(args[0], f"{path}[0]", depth + 1)
                slot = self.slot(args[1], f"{path}[1]", depth)
                return Ravel(body, slot, self.index(args[2], f"{path}[2]", depth))
            case "Sum" | "LogSumExp" | "Softmax":
                body = self.tree(args[0], f"{path}[0]", depth + 1)
                bound = [self.index(args[k], f"{path}[{k}]", depth) for k in range(1, len(args))]
                if word == "Sum":
                    return Sum(body, *((idx, *idx.args[1]) for idx in bound))
                return REDUCTIONS[word](body, *bound)
        if word in CONSTANTS:
            return CONSTANTS[word]
        parts = [self.tree(arg, f"{path}[{k}]", depth + 1) for k, arg in enumerate(args)]
        if word == "Pow" and _is_number_to_work_out(*parts):
            _refuse(path, "not be a number to work out", "a power of numbers", "the number itself")
        return (FUNCTIONS.get(word) or ARITHMETIC[word])(*parts, evaluate=False)

    def check_count(self, word: str, count: int, path: str) -> None:
        counts = {"float": 3, "Ravel": 3, **dict.fromkeys(CONSTANTS, 0)}
        counts |= dict.fromkeys(("rational", "index", "entry", "Sum", "LogSumExp", "Softmax"), 2)
        counts |= dict.fromkeys(ARITHMETIC, 2)
        least = counts.get(word, 1)
        open_ended = word in ("Add", "Mul", "Sum", "entry")
        if count < least or count > least and not open_ended:
            _refuse(path, f"fit `{word}`", count, f"{least}{' or more' * open_ended}")

    def symbol(self, name: object, path: str, kinds: tuple[str, ...], depth: int) -> Expr:
        if not isinstance(name, str) or name not in self.rows:
            _refuse(path, "be declared in $.symbols", name, ", ".join(sorted(self.rows)) or "none")
        at = f"$.symbols.{_check_name(name, path)}"
        if name not in self.found:
            self.found[name] = None
            self.found[name] = self.declare(name, self.rows[name], at, depth)
        if self.found[name] is None:
            _refuse(f"{at}.default", "not lead back to itself", name, "sizes and other scalars")
        if (kind := self.rows[name]["kind"]) not in kinds:
            _refuse(path, "be a symbol of another kind", kind, ", ".join(kinds))
        return self.found[name]

    def declare(self, name: str, row: object, path: str, depth: int) -> Expr:
        kind = row.get("kind") if isinstance(row, dict) else None
        if kind == "scalar":
            _check_keys(row, path, ("kind", "default", "positive"))
            positive, default = row["positive"], row["default"]
            if not isinstance(positive, bool):
                _refuse(f"{path}.positive", "be a truth value", positive, "true, false")
            if default is not None:
                default = self.tree(default, f"{path}.default", depth + 1)
            return Scalar(name, default, positive)
        if not isinstance(kind, str) or kind not in KINDS:
            _refuse(f"{path}.kind", "be a kind of symbol", kind, ", ".join([*KINDS, "scalar"]))
        _check_keys(row, path, ("kind", "shape"))
        shape = row["shape"]
        if not isinstance(shape, list) or not shape:
            _refuse(f"{path}.shape", "be a list", shape, "one size or more")
        sizes = [self.size(size, f"{path}.shape[{k}]", depth) for k, size in enumerate(shape)]
        return KINDS[kind](Symbol(name, real=True), shape=tuple(sizes))

    def size(self, node: object, path: str, depth: int) -> Expr:
        size = self.tree(node, path, depth + 1)
        if not all(map(_is_size, Mul.make_args(size))):
            _refuse(path, "be a size", node, "named sizes, positive numbers and their products")
        return size

    def index(self, node: object, path: str, depth: int) -> Idx:
        idx = self.tree(node, path, depth + 1)
        if not isinstance(idx, Idx):
            _refuse(path, "be an index", node, "the word `index`")
        return idx

    def slot(self, node: object, path: str, depth: int) -> Expr:
        slot = self.tree(node, path, depth + 1)
        factors = (f for term in Add.make_args(slot) for f in Mul.make_args(term))
        try:
            if not all(isinstance(factor, Idx) or _is_size(factor) for factor in factors):
                raise ValueError
            split(slot)
        except ValueError:
            _refuse(path, "be a slot", node, "an index, or several in row-major order: block*a + b")
        return slot


def _number(word: str, args: list, path: str) -> Expr:
    """An exact number: numerator and denominator, or mantissa, binary exponent and precision."""
    if any(type(arg) is not int for arg in args):
        _refuse(path, f"be those of a {word}", args, "whole numbers")
    if word == "rational":
        if args[1] < 1:
            _refuse(f"{path}[1]", "be a denominator", args[1], "positive numbers")
        return Rational(*args)
    mantissa, exponent, precision = args
    if not (0 < precision <= 10_000 and mantissa.bit_length() <= precision):
        _refuse(path, "be those of a float", args, "mantissas within a precision of 10000 bits")
    if abs(exponent) > 2**31:
        _refuse(f"{path}[1]", "be an exponent", exponent, "those of up to 31 bits")
    return Float._new(from_man_exp(mantissa, exponent, precision), precision, zero=False)


def _is_size(factor: Expr) -> bool:
    if isinstance(factor, Pow):
        return isinstance(factor.base, Dim) and factor.exp in (2, 3, 4)
    return isinstance(factor, Dim) or isinstance(factor, Integer) and 0 < int(factor) < 2**63


def _is_number_to_work_out(base: Expr, exponent: Expr) -> bool:
    """Whether later arithmetic on this power would work out a number that may fill the memory."""
    if not (base.is_number and exponent.is_number) or base in CONSTANTS.values():
        return False
    if exponent.is_Rational:
        return abs(exponent) > 1
    return not exponent.is_Float or abs(exponent) > 1000
