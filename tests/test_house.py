"""The rules of the house: which module may import which, what is packaged, what is documented."""

import ast
import configparser
import doctest
import importlib
import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cem.energy import INPUTS
from cem.inputs import Seen

ROOT = Path(__file__).resolve().parents[1]
GALLERIES = {"energies", "derivations"}

# Lowest first. A module imports from lower floors and from its own part, never sideways or up.
# A part is a module or a folder of cem; `__init__` is cem/__init__.py, the face.
FLOORS = (
    ("_version", "krylov", "plot", "prox", "visibility"),
    ("language", "rank_plots"),
    ("calculus",),
    ("derivation",),
    ("energy",),
    (
        "certificate",
        "initialisation",
        "lowering",
        "preconditioner",
        "sizes",
        "spectrum",
        "token_parameters",
        "update",
    ),
    ("inputs",),
    ("descent", "line_search", "newton"),
    ("cache", "growth"),
    ("layer",),
    ("fixed_point", "trace", "routing", "analysis", "testing"),
    ("allotment",),
    ("allocation",),
    ("compression",),
    ("__init__",),
    ("energies",),
    ("lm",),
    ("hf",),
    ("demo",),
    ("cli", "derivations"),
    ("__main__",),
)
FLOOR = {part: height for height, parts in enumerate(FLOORS) for part in parts}

# Needed by some commands and plots only, so `import cem` must do without them.
HEAVY = ("matplotlib", "tqdm", "transformers", "typer")

# Modules that need an extra: their doctests are skipped where it is not installed.
OPTIONAL = {
    "cem.demo": "transformers",
    "cem.hf": "transformers",
    "cem.lm.apart": "transformers",
    "cem.lm.callbacks": "transformers",
    "cem.lm.comparison": "transformers",
    "cem.lm.compressed": "transformers",
    "cem.lm.data": "transformers",
    "cem.lm.grow": "transformers",
    "cem.lm.pictures": "transformers",
    "cem.lm.planning": "transformers",
    "cem.lm.quiet": "transformers",
    "cem.lm.run": "transformers",
    "cem.lm.sizing": "transformers",
    "cem.lm.sweep": "transformers",
    "cem.lm.tokenizer": "transformers",
    "cem.lm.trainer": "transformers",
    "cem.lm.training": "transformers",
}


def python_files():
    """Every module of the package as {dotted name: file}; the galleries at their real place."""
    files = {}
    for top in ("cem", "energies", "derivations"):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if parts[0] == "cem" and parts[1] in GALLERIES:  # seen through the link
                continue
            if top in GALLERIES:
                parts = ("cem", *parts)
            if parts[-1] == "__init__":
                parts = parts[:-1]
            files[".".join(parts)] = file
    return files


FILES = python_files()


def part_of(module):
    """The part that a dotted name belongs to: "cem.language.words" -> "language"."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def imports(source, module, is_package):
    """The parts of cem that a module's source imports, inside functions too, as {(part, line)}."""
    found = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            if base == "cem":  # `from cem import plot`: a part; `from cem import derive`: the face
                targets = [f"cem.{a.name}" if a.name in FLOOR else "cem" for a in node.names]
            else:
                targets = [base]
        else:
            continue
        found |= {(part_of(t), node.lineno) for t in targets if t.split(".")[0] == "cem"}
    return found


@pytest.mark.parametrize(
    ("module", "is_package", "source", "expected"),
    [
        ("cem.layer", False, "import torch, cem.language.words", {"language"}),
        ("cem.layer", False, "import cem", {"__init__"}),
        ("cem.layer", False, "from cem import derive, trace", {"__init__", "trace"}),
        ("cem.layer", False, "from .lowering.emit import emit", {"lowering"}),
        ("cem.layer", False, "from . import update", {"update"}),
        ("cem.lowering.attention", False, "from ..calculus import gradient", {"calculus"}),
        ("cem.lowering.attention", False, "from .. import layer", {"layer"}),
        ("cem.lowering.attention", False, "from . import schedule", {"lowering"}),
        ("cem.lowering", True, "from .schedule import schedule", {"lowering"}),
        ("cem.lowering", True, "from ..energy import Energy", {"energy"}),
        ("cem.energies.hopfield", False, "from . import gated", {"energies"}),
        ("cem.layer", False, "def f():\n    from cem.plot import descent", {"plot"}),
        ("cem.layer", False, "import cement, torch.cem", set()),
    ],
)
def test_the_reader_of_imports(module, is_package, source, expected):
    assert {part for part, _ in imports(source, module, is_package)} == expected


def test_every_part_has_a_floor():
    missing = {part_of(module) for module in FILES} - set(FLOOR)
    assert not missing, f"give {sorted(missing)} a place in FLOORS"


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down_only(module):
    file, part = FILES[module], part_of(module)
    wrong = []
    for target, line in sorted(imports(file.read_text("utf-8"), module, file.stem == "__init__")):
        where = f"{file.relative_to(ROOT)}:{line} imports {target}"
        if target not in FLOOR:
            wrong.append(f"{where}, which has no floor")
        elif target != part and FLOOR[target] >= FLOOR[part]:
            wrong.append(f"{where}, which is not below {part}")
        elif target in GALLERIES and part not in GALLERIES:
            wrong.append(f"{where}, a gallery")
    assert not wrong, "\n".join(wrong)


def test_every_package_is_listed():
    """A package left out of setup.cfg imports in a clone and is missing from the wheel."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = {module for module, file in FILES.items() if file.stem == "__init__"}
    assert found == set(config["options"]["packages"].split())


def test_every_public_name_is_documented():
    cem = importlib.import_module("cem")
    missing = []
    for name in cem.__all__:
        thing = getattr(cem, name)
        # What is inherited, or said by the class of an instance, describes something else.
        if inspect.isclass(thing):
            own = thing.__dict__.get("__doc__")
        else:
            own = thing.__doc__ if thing.__doc__ != type(thing).__doc__ else None
        if not name.startswith("__") and not (own or "").strip():
            missing.append(name)
    assert not missing, f"no docstring: {missing}"


def test_import_needs_nothing_heavy():
    """With None in sys.modules an import of that name fails: a pass means that none was needed."""
    code = f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); import cem"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [m for m in FILES if part_of(m) != "__main__"])
def test_doctests(module, tmp_path, monkeypatch):
    if module in OPTIONAL:
        pytest.importorskip(OPTIONAL[module])
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testmod(importlib.import_module(module), optionflags=flags)
    assert results.failed == 0, "the report is in the captured output"


def test_the_readme_runs(tmp_path, monkeypatch):
    """The Python blocks of README.md, one after another, in one namespace."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert blocks
    program = tmp_path / "readme.py"  # a file, so that inspect finds the source of functions
    program.write_text("\n".join(blocks), "utf-8")
    runpy.run_path(str(program))


def test_files_are_short():
    tests = sorted((ROOT / "tests").glob("*.py"))
    long = {
        str(file.relative_to(ROOT)): lines
        for file in (*FILES.values(), *tests)
        if (lines := len(file.read_text("utf-8").splitlines())) > 400
    }
    assert tests and not long, f"more than 400 lines: {long}"


def test_no_module_is_called_utils():
    assert not [file for file in FILES.values() if file.stem in ("utils", "util", "helpers")]


def test_programs_take_what_the_tokens_see():
    assert INPUTS == ("h", "frozen", *Seen._fields)
