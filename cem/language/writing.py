"""An expression as the tree that JSON holds."""

from __future__ import annotations

from collections.abc import Iterable

from sympy import Expr, Float, Idx, Indexed, Integer, Rational, Sum, Symbol

from .grammar import (
    ARITHMETIC,
    CONSTANTS,
    FUNCTIONS,
    KINDS,
    REDUCTIONS,
    WORD_NAMES,
    Walk,
    refuse,
)
from .positions import ContextPosition, TokenPosition
from .symbols import Dim, NamedArray, Scalar, size_of


class Writer(Walk):
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
            case TokenPosition():
                return word("position")
            case Indexed() if isinstance(node.base, ContextPosition):
                return word("position", parts=node.indices)
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
        refuse(path, "be of the language", got, f"whole numbers, sizes, {', '.join(WORD_NAMES)}")

    def add(self, symbol: Expr, name: str, row: dict, path: str) -> str:
        if self.symbols.setdefault(name, (symbol, row))[0] != symbol:
            refuse(path, "have a name of its own", name, "one meaning for every name")
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
