"""A tree from JSON as an expression: nothing in it is evaluated, simplified or looked up beyond the words."""

from __future__ import annotations

from mpmath.libmp import from_man_exp
from sympy import Add, Expr, Float, Idx, Indexed, Integer, Mul, Pow, Rational, Sum, Symbol

from .entmax import ALPHAS, EntmaxConjugate
from .grammar import (
    ARITHMETIC,
    CONSTANTS,
    FUNCTIONS,
    KINDS,
    REDUCTIONS,
    WORD_NAMES,
    Walk,
    check_keys,
    check_name,
    refuse,
)
from .positions import CONTEXT_POSITION, TOKEN_POSITION, Lookup, Rope
from .symbols import SEQ, Dim, Ravel, Scalar, index, size_of, split


class Reader(Walk):
    def __init__(self, rows: dict) -> None:
        self.rows = rows
        self.found: dict[str, Expr | None] = {}

    def tree(self, node: object, path: str, depth: int) -> Expr:
        self.enter(path, depth)
        if type(node) is int:
            return Integer(node)
        if isinstance(node, str):
            return Dim(check_name(node, path))
        check_keys(node, path, ("word", "args"))
        word, args = node["word"], node["args"]
        if not isinstance(word, str) or word not in WORD_NAMES:
            refuse(f"{path}.word", "be a word of the language", word, ", ".join(WORD_NAMES))
        path = f"{path}.args"
        if not isinstance(args, list):
            refuse(path, "be a list", args, "lists of nodes")
        self.check_count(word, len(args), path)
        match word:
            case "rational" | "float":
                return _number(word, args, path)
            case "scalar":
                return self.symbol(args[0], f"{path}[0]", ("scalar",), depth)
            case "index":
                return index(
                    check_name(args[0], f"{path}[0]"), self.size(args[1], f"{path}[1]", depth)
                )
            case "entry":
                base = self.symbol(args[0], f"{path}[0]", tuple(KINDS), depth)
                if len(args) != 1 + len(base.shape):
                    refuse(path, "index every axis", args, f"a name and {len(base.shape)} slots")
                slots = (self.slot(args[k], f"{path}[{k}]", depth) for k in range(1, len(args)))
                return Indexed(base, *slots)
            case "position" if not args:
                return TOKEN_POSITION
            case "position":
                return Indexed(CONTEXT_POSITION, self.token(args[0], f"{path}[0]", depth))
            case "Rope":
                return self.rope(args, path, depth)
            case "Lookup":
                body, number = (self.tree(args[k], f"{path}[{k}]", depth + 1) for k in (0, 2))
                return Lookup(body, self.index(args[1], f"{path}[1]", depth), number)
            case "EntmaxConjugate":
                body, alpha = (self.tree(args[k], f"{path}[{k}]", depth + 1) for k in (0, 2))
                if alpha not in ALPHAS:
                    refuse(f"{path}[2]", "be an alpha", args[2], "3/2, 2")
                return EntmaxConjugate(body, self.index(args[1], f"{path}[1]", depth), alpha)
            case "Ravel":
                body = self.tree(args[0], f"{path}[0]", depth + 1)
                slot = self.slot(args[1], f"{path}[1]", depth)
                return Ravel(body, slot, self.index(args[2], f"{path}[2]", depth))
            case "Sum" | "LogSumExp" | "Softmax" | "Decay":
                body = self.tree(args[0], f"{path}[0]", depth + 1)
                bound = [self.index(args[k], f"{path}[{k}]", depth) for k in range(1, len(args))]
                if word == "Sum":
                    return Sum(body, *((idx, *idx.args[1]) for idx in bound))
                return REDUCTIONS[word](body, *bound)
        if word in CONSTANTS:
            return CONSTANTS[word]
        parts = [self.tree(arg, f"{path}[{k}]", depth + 1) for k, arg in enumerate(args)]
        if word == "Pow" and _is_number_to_work_out(*parts):
            refuse(path, "not be a number to work out", "a power of numbers", "the number itself")
        return (FUNCTIONS.get(word) or ARITHMETIC[word])(*parts, evaluate=False)

    def check_count(self, word: str, count: int, path: str) -> None:
        counts = {
            "float": 3,
            "Ravel": 3,
            "Lookup": 3,
            "EntmaxConjugate": 3,
            "Rope": 6,
            **dict.fromkeys(CONSTANTS, 0),
        }
        counts |= {"position": 0}
        counts |= dict.fromkeys(
            ("rational", "index", "entry", "Sum", "LogSumExp", "Softmax", "Decay"), 2
        )
        counts |= dict.fromkeys(ARITHMETIC, 2)
        least = counts.get(word, 1)
        open_ended = word in ("Add", "Mul", "Sum", "entry", "Rope")
        most = 1 if word == "position" else least
        if count < least or count > most and not open_ended:
            refuse(path, f"fit `{word}`", count, f"{least}{' or more' * open_ended}")

    def symbol(self, name: object, path: str, kinds: tuple[str, ...], depth: int) -> Expr:
        if not isinstance(name, str) or name not in self.rows:
            refuse(path, "be declared in $.symbols", name, ", ".join(sorted(self.rows)) or "none")
        at = f"$.symbols.{check_name(name, path)}"
        if name not in self.found:
            self.found[name] = None
            self.found[name] = self.declare(name, self.rows[name], at, depth)
        if self.found[name] is None:
            refuse(f"{at}.default", "not lead back to itself", name, "sizes and other scalars")
        if (kind := self.rows[name]["kind"]) not in kinds:
            refuse(path, "be a symbol of another kind", kind, ", ".join(kinds))
        return self.found[name]

    def declare(self, name: str, row: object, path: str, depth: int) -> Expr:
        kind = row.get("kind") if isinstance(row, dict) else None
        if kind == "scalar":
            check_keys(row, path, ("kind", "default", "positive"))
            positive, default = row["positive"], row["default"]
            if not isinstance(positive, bool):
                refuse(f"{path}.positive", "be a truth value", positive, "true, false")
            if default is not None:
                default = self.tree(default, f"{path}.default", depth + 1)
            return Scalar(name, default, positive)
        if not isinstance(kind, str) or kind not in KINDS:
            refuse(f"{path}.kind", "be a kind of symbol", kind, ", ".join([*KINDS, "scalar"]))
        check_keys(row, path, ("kind", "shape"))
        shape = row["shape"]
        if not isinstance(shape, list) or not shape:
            refuse(f"{path}.shape", "be a list", shape, "one size or more")
        sizes = [self.size(size, f"{path}.shape[{k}]", depth) for k, size in enumerate(shape)]
        return KINDS[kind](Symbol(name, real=True), shape=tuple(sizes))

    def size(self, node: object, path: str, depth: int) -> Expr:
        size = self.tree(node, path, depth + 1)
        if not all(map(_is_size, Mul.make_args(size))):
            refuse(path, "be a size", node, "named sizes, positive numbers and their products")
        return size

    def index(self, node: object, path: str, depth: int) -> Idx:
        idx = self.tree(node, path, depth + 1)
        if not isinstance(idx, Idx):
            refuse(path, "be an index", node, "the word `index`")
        return idx

    def token(self, node: object, path: str, depth: int) -> Idx:
        idx = self.index(node, path, depth)
        if size_of(idx) != SEQ:
            refuse(path, "be an index of the context", node, "indices over `seq`")
        return idx

    def rope(self, args: list, path: str, depth: int) -> Rope:
        trees = [self.tree(arg, f"{path}[{k}]", depth + 1) for k, arg in enumerate(args)]
        base, share, pairing, *turns = trees[3:]
        numbers = all(tree.is_Number for tree in trees[3:])
        if not (numbers and base > 0 and 0 < share <= 1 and pairing in (0, 1)):
            refuse(path, "end with numbers", args[3:], "a base > 0, a share in (0, 1], 0 or 1")
        return Rope(trees[0], self.index(args[1], f"{path}[1]", depth), *trees[2:])

    def slot(self, node: object, path: str, depth: int) -> Expr:
        slot = self.tree(node, path, depth + 1)
        factors = (f for term in Add.make_args(slot) for f in Mul.make_args(term))
        try:
            if not all(isinstance(factor, Idx) or _is_size(factor) for factor in factors):
                raise ValueError
            split(slot)
        except ValueError:
            refuse(path, "be a slot", node, "an index, or several in row-major order: block*a + b")
        return slot


def _number(word: str, args: list, path: str) -> Expr:
    """An exact number: numerator and denominator, or mantissa, binary exponent and precision."""
    if any(type(arg) is not int for arg in args):
        refuse(path, f"be those of a {word}", args, "whole numbers")
    if word == "rational":
        if args[1] < 1:
            refuse(f"{path}[1]", "be a denominator", args[1], "positive numbers")
        return Rational(*args)
    mantissa, exponent, precision = args
    if not (0 < precision <= 10_000 and mantissa.bit_length() <= precision):
        refuse(path, "be those of a float", args, "mantissas within a precision of 10000 bits")
    if abs(exponent) > 2**31:
        refuse(f"{path}[1]", "be an exponent", exponent, "those of up to 31 bits")
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
