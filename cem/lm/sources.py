"""The source of functions of this package, gathered with all that they call, and how a line is broken."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from types import ModuleType

from cem.lowering.listing import spelled

WIDTH = 100


class Sources:
    """Functions and classes of cem as text, each after those that it calls, and what they import.

    A module that is called through its name, ``flash.forward``, is dissolved: the function becomes ``flash_forward``.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}

    def spell(self, target: Callable) -> str:
        """How a program writes the name of a function that it calls."""
        return self.add(target) if is_own(target) else spelled(target)

    def add(self, thing, prefix: str = "") -> str:
        """Gather a function or a class; the name that it has in the text."""
        name, module = prefix + thing.__name__, sys.modules[thing.__module__]
        source = inspect.getsource(thing).rstrip()
        self._put(name, source.replace(f"def {thing.__name__}(", f"def {name}(", 1), module)
        return name

    def _put(self, name: str, source: str, module: ModuleType) -> None:
        """Note a source of a module behind all that it names."""
        if name in self.texts:
            return
        self.texts[name] = ""  # it may name itself
        source = self._reached(source, module)
        del self.texts[name]
        self.texts[name] = source

    def _reached(self, source: str, module: ModuleType) -> str:
        """Gather what a source in a module names; the source without names of modules of cem."""
        assigned = self.read_imports(inspect.getsource(module))
        for node in ast.walk(ast.parse(source)):
            name = node.id if isinstance(node, ast.Name) else ""
            found = vars(module).get(name)
            if isinstance(found, ModuleType) and found.__name__.startswith("cem."):
                for attribute in sorted(set(re.findall(rf"\b{name}\.(\w+)", source))):
                    self.add(getattr(found, attribute), f"{name}_")
                source = re.sub(rf"\b{name}\.(\w+)", rf"{name}_\1", source)
            elif name in assigned:
                numbers = found if isinstance(found, tuple) else (found,)
                if all(isinstance(number, int | float) for number in numbers):
                    assigned[name] = formatted(f"{name} = {found!r}", 0)
                self._put(name, assigned[name], module)
            elif is_own(found):
                self.add(found)
        return source

    def read_imports(self, source: str) -> dict[str, str]:
        """Note what a module imports from elsewhere; its assignments at the top, by name."""
        assigned = {}
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import):
                self.imports |= {a.asname or a.name: (a.name, None) for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                entries = {a.asname or a.name: (node.module, a.name) for a in node.names}
                self.imports |= entries
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                assigned[node.targets[0].id] = ast.get_source_segment(source, node)
        return assigned

    def import_lines(self, body: str) -> str:
        """The imports that a text needs, in the order of isort."""
        used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
        sections: tuple[dict, dict] = ({}, {})
        for name in used & set(self.imports):
            module, member = self.imports[name]
            section = sections[module.split(".")[0] not in sys.stdlib_module_names]
            names = section.setdefault((member is not None, module), set())
            names.add(member if member in (name, None) else f"{member} as {name}")
        blocks = []
        for section in sections:
            lines = []
            for (is_from, module), names in sorted(section.items()):
                # Constants, then classes, then functions.
                listed = sorted(names - {None}, key=lambda n: (not n[0].isupper(), n))
                line = (
                    f"from {module} import {', '.join(listed)}" if is_from else f"import {module}"
                )
                if len(line) > WIDTH:
                    inner = "".join(f"    {name},\n" for name in listed)
                    line = f"from {module} import (\n{inner})"
                lines.append(line)
            blocks += ["\n".join(lines)] if lines else []
        return "\n\n".join(blocks)


def is_own(thing) -> bool:
    """Whether a function or a class is one of this package."""
    return (getattr(thing, "__module__", None) or "").startswith("cem.")


def formatted(statement: str, indent: int) -> str:
    """A statement ``name = call``, ``return call`` or ``def`` at an indent, broken as ruff and black break it."""
    pad, inner = " " * indent, " " * (indent + 4)
    statement = statement.replace("'", '"')
    if indent + len(statement) <= WIDTH:
        return pad + statement
    brackets = _brackets(statement)
    links = [stop for start, stop in brackets if statement[stop + 1 : stop + 2] == "."]
    if len(links) > 1:
        head = re.match(r"return |\w+ = ", statement).group()
        cuts = [len(head), *(stop + 1 for stop in links), len(statement)]
        chain = [statement[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        return "\n".join([f"{pad}{head}(", *(formatted(c, indent + 4) for c in chain), f"{pad})"])
    start, stop = max(brackets, key=lambda pair: pair[1] - pair[0])
    pieces = _pieces(statement[start + 1 : stop])
    one = inner + ", ".join(pieces)
    lines = [one] if len(one) <= WIDTH else [f"{inner}{piece}," for piece in pieces]
    return "\n".join([f"{pad}{statement[: start + 1]}", *lines, f"{pad}{statement[stop:]}"])


def _brackets(text: str) -> list[tuple[int, int]]:
    """The outermost pairs of brackets."""
    found, opened = [], []
    for place, letter in enumerate(text):
        if letter in "([{":
            opened.append(place)
        elif letter in ")]}":
            start = opened.pop()
            found += [] if opened else [(start, place)]
    return found


def _pieces(text: str) -> list[str]:
    """The pieces between the commas outside brackets."""
    inside = [range(start, stop) for start, stop in _brackets(text)]
    commas = [n for n, c in enumerate(text) if c == "," and not any(n in span for span in inside)]
    cuts = [-1, *commas, len(text)]
    return [text[a + 1 : b].strip() for a, b in zip(cuts, cuts[1:], strict=False)]
