"""Documents from files, packages and data sets, and their split."""

import hashlib
import json
import sys

import pytest
from texts import folder

from cem import lm
from cem.lm import corpus as corpora


def both(corpus):
    return {**corpus.train, **corpus.held_out}


def test_the_split_is_by_file_and_repeatable(tmp_path):
    root = folder(tmp_path)
    one, two = (lm.read_corpus(str(root), held_out=0.2) for _ in range(2))
    assert one == two and one.digest == two.digest
    assert set(one.train).isdisjoint(one.held_out)
    assert both(one) == {path.name: path.read_bytes() for path in root.iterdir()}
    for side in (one.train, one.held_out):
        hashes = [hashlib.sha256(content).digest() for content in side.values()]
        assert hashes == sorted(hashes)
    held = {n for n in both(one) if int(hashlib.sha256(n.encode()).hexdigest(), 16) < 0.2 * 2**256}
    assert set(one.held_out) == held


def test_a_file_keeps_its_side_when_others_come_and_go(tmp_path):
    root = folder(tmp_path)
    before = lm.read_corpus(str(root), held_out=0.2)
    (root / "new.py").write_text("new = 1\n")
    (root / next(iter(before.train))).unlink()
    after = lm.read_corpus(str(root), held_out=0.2)
    assert set(after.held_out) - {"new.py"} == set(before.held_out)
    assert after.digest != before.digest


def test_a_text_counts_once_and_only_if_it_is_text(tmp_path):
    root = folder(tmp_path)
    (root / "a_copy.py").write_bytes((root / "m7.py").read_bytes())
    (root / "empty.py").write_text(" \n")
    (root / "latin.py").write_bytes("é".encode("latin-1"))
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.py").write_text("hidden = True\n")
    names = set(both(lm.read_corpus(str(root))))
    assert names == {f"m{i}.py" for i in range(60)} - {"m7.py"} | {"a_copy.py"}


def test_a_folder_and_its_glob_are_the_same_source(tmp_path, monkeypatch):
    root = folder(tmp_path)
    (root / "deep[1]").mkdir()
    (root / "deep[1]" / "n.txt").write_text("not Python\n")
    whole = lm.read_corpus(str(root))
    assert lm.read_corpus(f"{root}/**/*") == whole
    assert "deep[1]/n.txt" in both(whole)
    assert both(lm.read_corpus(f"{root}/**/*.py")).keys() == both(whole).keys() - {"deep[1]/n.txt"}
    monkeypatch.chdir(tmp_path)
    assert lm.read_corpus("text") == whole


@pytest.mark.parametrize("kilobytes", [0.05, 1, 2.5, 1000])
def test_the_text_is_cut_at_its_size(tmp_path, kilobytes):
    root = folder(tmp_path)
    documents = sorted(
        (path.read_bytes() for path in root.iterdir()), key=lambda c: hashlib.sha256(c).digest()
    )
    cut = lm.read_corpus(str(root), megabytes=kilobytes / 1000)
    contents = sorted(
        both(cut).values(), key=lambda c: documents.index(c) if c in documents else 99
    )
    text = b"".join(documents)[: int(kilobytes * 1000)]
    assert b"".join(contents) == text[: text.rfind(b"\n") + 1]


def test_a_cut_is_never_inside_a_character(tmp_path):
    (tmp_path / "one.txt").write_text("é" * 100)
    cut = lm.read_corpus(str(tmp_path), megabytes=101e-6, held_out=0.11)
    [train], [held_out] = cut.train.values(), cut.held_out.values()
    assert (len(train), len(held_out)) == (88, 12)
    assert train.decode() + held_out.decode() == "é" * 50


def test_one_file_is_cut_at_the_end_of_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    corpus = lm.read_corpus(str(tmp_path / "input.txt"), held_out=0.1)
    [train], [held_out] = corpus.train.values(), corpus.held_out.values()
    assert (train + held_out).decode() == text and train.endswith(b"\n")
    assert len(held_out) == pytest.approx(0.1 * len(text), abs=9)


@pytest.mark.parametrize("held_out", [1e-9, 1 - 1e-9])
def test_few_files_stand_on_both_sides(tmp_path, held_out):
    corpus = lm.read_corpus(str(folder(tmp_path, count=2)), held_out=held_out)
    assert len(corpus.train) == len(corpus.held_out) == 1


def test_a_text_that_cannot_be_read_says_so(tmp_path):
    with pytest.raises(
        ValueError, match="no readable document from `source='.*txt'`; name a folder"
    ):
        lm.read_corpus(str(tmp_path / "*.txt"))
    with pytest.raises(ValueError, match="share between 0 and 1: got 2; try `held_out=0.05`"):
        lm.read_corpus(held_out=2)
    with pytest.raises(ValueError, match="`megabytes` must be positive: got 0; try"):
        lm.read_corpus(megabytes=0)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="too short to split: got 1 bytes in one document"):
        lm.read_corpus(str(tmp_path))


def test_python_is_the_library_and_the_packages_that_are_there(tmp_path, monkeypatch):
    root = folder(tmp_path)
    for name in ("test", "site-packages", "idlelib/idle_test", "encodings"):
        (root / name).mkdir(parents=True)
        (root / name / "a.py").write_text("left = 'out'\n")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(root))
    monkeypatch.setattr(corpora, "PACKAGES", ("latex2mathml", "no_such_package"))
    corpus = lm.read_corpus("python")
    names = {name for name in both(corpus) if not name.startswith("latex2mathml/")}
    assert names == {f"m{i}.py" for i in range(60)}
    assert "latex2mathml/converter.py" in both(corpus)
    assert list(corpus.versions) == ["python", "latex2mathml"]
    assert corpus.missing == ("no_such_package",)
    assert set(both(lm.read_corpus("stdlib"))) == names


def write_rows(tmp_path, count=40, column="text"):
    rows = [json.dumps({"id": i, column: f"row {i}\n" * 3}) for i in range(count)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return f"hf:{tmp_path}"


@pytest.mark.filterwarnings("default")
def test_rows_of_a_data_set_are_documents(tmp_path):
    pytest.importorskip("datasets")
    source = write_rows(tmp_path)
    whole = lm.read_corpus(source)
    assert both(whole) == {f"{i:012}": f"row {i}\n".encode() * 3 for i in range(40)}
    beginning = lm.read_corpus(source, megabytes=1e-4)  # what follows is never read
    assert sorted(both(beginning)) == [f"{i:012}" for i in range(6)]
    source = write_rows(tmp_path, column="words")
    with pytest.raises(ValueError, match="a column `text` or `content` of strings: got id, words;"):
        lm.read_corpus(source)


def test_a_data_set_that_cannot_be_reached_says_so(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="got ConnectionError: no route to host; check its name"):
        lm.read_corpus("hf:some/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="type `pip install datasets`"):
        lm.read_corpus("hf:some/name")
