"""What the JSON of an energy is made of: words, kinds of symbols, limits, and how it is refused."""

from __future__ import annotations

import json
from keyword import iskeyword
from typing import NoReturn

from sympy import Add, Mul, Pow, pi
from sympy import E as euler

from . import symbols
from .entmax import EntmaxConjugate
from .positions import Lookup, Rope
from .reductions import LogSumExp, Softmax
from .symbols import NamedArray, Ravel
from .tokens import Decay
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
REDUCTIONS = {
    "LogSumExp": LogSumExp,
    "EntmaxConjugate": EntmaxConjugate,
    "Softmax": Softmax,
    "Ravel": Ravel,
    "Rope": Rope,
    "Lookup": Lookup,
    "Decay": Decay,
}
CONSTANTS = {"pi": pi, "E": euler}
LEAVES = ("entry", "float", "index", "position", "rational", "scalar")
WORD_NAMES = sorted([*LEAVES, *FUNCTIONS, *ARITHMETIC, *REDUCTIONS, *CONSTANTS, "Sum"])


def refuse(path: str, must: str, got: object, allowed: str) -> NoReturn:
    if isinstance(got, dict):
        shown = f"an object with the keys {json.dumps(sorted(got)[:8])[:200]}"
    elif isinstance(got, list):
        shown = f"a list of {len(got)}"
    else:
        shown = str(got)[:80] if type(got) in (int, float) else json.dumps(got)[:80]
    raise ValueError(f"{path} must {must}: got {shown}; allowed: {allowed}") from None


def check_keys(node: object, path: str, keys: tuple[str, ...]) -> None:
    if not isinstance(node, dict) or set(node) != set(keys):
        refuse(path, "be an object", node, f"the keys {', '.join(keys)}")


def check_name(name: object, path: str) -> str:
    # Names end up in the text of programs, so they are never anything but names.
    fine = isinstance(name, str) and name.isidentifier() and not iskeyword(name)
    if not fine or name.startswith("__") or len(name) > 64:
        refuse(path, "be a name", name, "identifiers of up to 64 characters")
    return name


class Walk:
    """What writing and reading share: how deep and how large a tree may be."""

    nodes = 0

    def enter(self, path: str, depth: int) -> None:
        self.nodes += 1
        if depth > MAX_DEPTH:
            refuse(f"{path[:80]}...", "be a flatter tree", "too many levels", f"{MAX_DEPTH} levels")
        if self.nodes > MAX_NODES:
            refuse("$.energy", "be a smaller tree", "too many nodes", f"{MAX_NODES} nodes")
