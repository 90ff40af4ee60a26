"""The command line: what it prints, what it writes, what it says about mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

from cem import cli

ROOT = Path(__file__).resolve().parents[1]

ENERGIES = """
import torch
import cem

dim, hidden = cem.dims("dim hidden")
h, U = cem.state(dim), cem.parameter("U", hidden, dim)
i, m = dim.index("i"), hidden.index("m")

from sympy import Sum
plain = cem.Energy(-Sum(cem.relu(Sum(U[m, i] * h[i], i)) ** 2, m) / 2, name="plain")
number = 3


@cem.energy(h="dim", x="seq dim", W="dim dim")
def pull(h, x, *, W, beta=1.0):
    return -torch.logsumexp(beta * x @ W @ h, dim=-1) / beta


@cem.energy(h="dim")
def loop(h):
    total = 0.0
    while total < 1:
        total = total + h.square().sum() + 1
    return total
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "my_energies.py"
    path.write_text(ENERGIES)
    yield path.name
    sys.modules.pop("my_energies", None)


def run(monkeypatch, *arguments):
    """The exit code of ``cem ARGUMENTS``, run in this process."""
    monkeypatch.setattr(sys, "argv", ["cem", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command that must fail with one sentence, and returns the sentence."""

    def refused(*arguments):
        assert run(monkeypatch, *arguments) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and err.startswith("cem: ")
        return err

    return refused


def test_derive_prints_the_mathematics(file, monkeypatch, capsys):
    assert run(monkeypatch, "derive", f"{file}:plain") == 0
    out = capsys.readouterr().out
    assert "plain" in out and "gradient" in out.lower()


def test_derive_at_sizes_prints_the_code_and_writes_the_page(file, monkeypatch, capsys):
    page = Path("pages/plain.html")
    arguments = ("derive", f"{file}:plain", "dim=6", "hidden=10", "--out", page)
    assert run(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert "lowering is fused" in out and "def gradient" in out and f"wrote {page}" in out
    assert "</html>" in page.read_text("utf-8")
    assert list(page.parent.iterdir()) == [page]  # nothing half-written is left


def test_derive_takes_a_dotted_name(file, monkeypatch, capsys):
    monkeypatch.syspath_prepend(".")
    assert run(monkeypatch, "derive", "my_energies:pull", "dim=6", "beta=0.5") == 0
    assert "pull" in capsys.readouterr().out


def test_derive_takes_an_energy_of_the_gallery(monkeypatch, capsys):
    arguments = ("cem.energies.interaction:interaction", "dim=8", "heads=2", "rank=4")
    assert run(monkeypatch, "derive", *arguments) == 0
    assert "scaled_dot_product_attention" in capsys.readouterr().out


def test_plot_writes_a_picture(file, monkeypatch, capsys):
    assert run(monkeypatch, "plot", f"{file}:pull", "dim=6", "--steps", "3", "--tokens", "9") == 0
    assert Path("pull.png").read_bytes().startswith(b"\x89PNG")
    assert "median drop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("derive", "{file}"), "written FILE.py:NAME or MODULE:NAME: got `my_energies.py`; type"),
        (("derive", "gone.py:a"), "there is no file gone.py"),
        (("derive", "gone.away:a"), "there is no module `gone`"),
        (
            ("derive", "{file}:other"),
            "my_energies.py has no `other`: it holds plain, pull, loop; type",
        ),
        (
            ("derive", "{file}:number"),
            "`number` in my_energies.py must be an energy: got int 3; type",
        ),
        (
            ("derive", "{file}:plain", "dim=6"),
            "energy `plain` needs the size hidden: got dim=6",
        ),
        (("derive", "{file}:plain", "dim"), "a size is written NAME=VALUE: got `dim`; type `dim=6"),
        (("derive", "{file}:plain", "dim=x"), "`dim` must be a number: got `dim=x`; type `dim=64`"),
        (("derive", "{file}:plain", "width=6"), "energy `plain` has no size or scalar `width`"),
        (("derive", "{file}:plain", "dim=6", "dim=7"), "`dim` is given twice: got `dim=7`"),
        (
            ("plot", "{file}:plain"),
            "energy `plain` needs its sizes: got none; type dim=16",
        ),
        (("demo", "--source", "nowhere"), "there is no text to learn from: got no readable"),
        (("demo", "--energy", "{file}:loop"), "energy `loop` cannot be written as JSON: "),
    ],
)
def test_a_mistake_gets_one_sentence(file, refused, arguments, sentence):
    assert sentence in refused(*(argument.format(file=file) for argument in arguments))


def test_a_file_that_does_not_run_is_named_with_its_line(file, refused):
    Path("broken.py").write_text("x = 1\n\ny = x + undefined\n")
    message = refused("derive", "broken.py:a")
    assert "broken.py, line 3, cannot be run: got NameError: name 'undefined'" in message
    Path("broken.py").write_text("x = (\n")
    assert "broken.py, line 1, cannot be run: got SyntaxError" in refused("derive", "broken.py:a")
    Path("broken.py").write_text("import not_installed_anywhere\n")
    assert "got ModuleNotFoundError: No module" in refused("derive", "broken.py:a")


def test_an_unwritable_place_is_named(file, refused):
    Path("taken").write_text("a file")
    message = refused("plot", f"{file}:plain", "dim=6", "hidden=4", "--out", "taken/a.png")
    assert "cannot write taken/a.png" in message
    assert "cannot write into taken: got File exists" in refused("demo", "--out", "taken")


def test_help_and_version_load_nothing_for_pictures():
    """With None in sys.modules an import of that name fails."""
    code = """
import sys
sys.modules.update(dict.fromkeys(["matplotlib", "tqdm", "transformers"]))
from cem.cli import main
for argument in ("--help", "--version"):
    sys.argv = ["cem", argument]
    try:
        main()
    except SystemExit as end:
        assert not end.code, argument
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and done.stdout.splitlines()[-1].startswith("cem 0")


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A folder with a little text, of which a part is held out."""
    monkeypatch.setenv("CEM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(60):
        (folder / f"m{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\n" * 20)
    return folder


def test_the_demo_runs_from_end_to_end(text, monkeypatch, capsys):
    monkeypatch.chdir(text.parent)
    reports = []
    for _ in range(2):
        assert run(monkeypatch, "demo", "--steps", "20", "--seed", "5", "--source", text) == 0
        lines = capsys.readouterr().out.splitlines()
        reports.append([line for line in lines if " s on " not in line and "tokens/s" not in line])
    assert reports[0] == reports[1]  # but for the time
    out = "\n".join(reports[0])
    assert "uniform" in out and "tokens that fell" in out
    bits = [float(line.split()[-1]) for line in reports[0] if "of context  " in line]
    bits += [float(line.split()[-1]) for line in reports[0] if "this model" in line]
    assert len(bits) == 7 and max(bits) < 8
    made = sorted(path.name for path in Path("cem-demo").iterdir())
    assert made == ["derivation.html", "descent.png", "model", "tokens.png"]
    assert (Path("cem-demo") / "descent.png").read_bytes().startswith(b"\x89PNG")
    page = (Path("cem-demo") / "derivation.html").read_text("utf-8")
    assert page.count("<html") == 1 and "interaction: Energy" in page and "gated: Energy" in page


def test_the_demo_takes_other_energies(file, text, monkeypatch, capsys):
    energies = ("--energy", f"{file}:plain", "--energy", f"{file}:pull", "--energy", f"{file}:pull")
    assert run(monkeypatch, "demo", "--steps", "2", "--source", text, *energies) == 0
    out = capsys.readouterr().out
    assert "plain: fused, matmul" in out and "6 layers" in out
