"""Each example runs and prints what its docstring promises."""

import ast
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_prints_what_it_promises(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.strip() and last.strip() == docstring.strip().splitlines()[-1].strip()


def test_examples_are_short():
    assert EXAMPLES
    for path in EXAMPLES:
        source = path.read_text("utf-8")
        assert len(source.splitlines()) < 60 and "\ndef main():" in source
