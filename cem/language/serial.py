"""Energies as JSON: a tree of whitelisted words, read back exactly and without evaluating anything.

The text has four keys: ``cem`` (the version of the format), ``name``, ``symbols`` (every tensor and
scalar, with its kind, sizes, sign and default) and ``energy``, a tree. In the tree a whole number
is itself, a string is a named size, and everything else is ``{"word": ..., "args": [...]}``.
"""

from __future__ import annotations

import json
from typing import NoReturn

from sympy import Expr

from .conversion import as_expression
from .grammar import MAX_CHARACTERS, MAX_DEPTH, VERSION, check_keys, refuse
from .reading import Reader
from .writing import Writer


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
    writer = Writer()
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
        refuse("$", "be JSON text", got, f"strings of up to {MAX_CHARACTERS} characters")
    try:
        document = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        refuse("$", "be a flatter tree", "too many levels", f"{MAX_DEPTH} levels")
    except ValueError as error:
        refuse("$", "be JSON", str(error), "unique keys and finite numbers")
    check_keys(document, "$", ("cem", "name", "symbols", "energy"))
    version, name, rows = document["cem"], document["name"], document["symbols"]
    if type(version) is not int or version != VERSION:
        refuse("$.cem", "be a known version", version, str(VERSION))
    if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
        refuse("$.name", "be one line of text", name, "up to 200 printable characters")
    if not isinstance(rows, dict):
        refuse("$.symbols", "be an object", rows, "names of tensors and scalars")
    reader = Reader(rows)
    expression = reader.tree(document["energy"], "$.energy", 0)
    if unused := sorted(set(rows) - set(reader.found)):
        refuse("$.symbols", "be used in $.energy", unused[0], ", ".join(reader.found) or "none")
    return expression, name


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that is written twice")
    return found


def no_constant(text: str) -> NoReturn:
    raise ValueError(f"the number {text}")
