"""Data for a language model: prepared once, whole, and the same everywhere."""

import shutil
import threading

import pytest
import torch
from texts import folder

pytest.importorskip("transformers")

from cem import lm
from cem.lm import data as data_module
from cem.lm import tokenizer as tok
from cem.lm.packing import write_documents


def data(tmp_path, **changes):
    fields = {"source": str(tmp_path / "text"), "tokenizer": "bpe-300", "context": 16}
    return lm.Data(**{**fields, "cache": str(tmp_path / "cache"), **changes})


def test_data_are_prepared_once(tmp_path, monkeypatch):
    folder(tmp_path)
    first = data(tmp_path).prepare()
    other = data(tmp_path, cache=str(tmp_path / "elsewhere")).prepare()
    assert other.digest == first.digest and other.folder != first.folder
    monkeypatch.setattr(lm.Data, "_write", None)
    again = data(tmp_path, context=32).prepare()
    assert again.folder == first.folder and again.digest == first.digest
    assert again.train[0]["input_ids"].shape == (32,)
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_other_text_or_tokenizer_has_another_digest(tmp_path):
    root = folder(tmp_path)
    digests = {data(tmp_path, tokenizer=t).prepare().digest for t in ("bpe-300", "bytes")}
    (root / "m0.py").write_text("changed = True\n")
    digests.add(data(tmp_path).prepare().digest)
    assert len(digests) == 3


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
@pytest.mark.parametrize("context", [5, 64])
def test_bytes_per_token_counts_every_held_out_byte_once(tmp_path, tokenizer, context):
    root = folder(tmp_path)
    prepared = data(tmp_path, tokenizer=tokenizer, context=context).prepare()
    held_out = lm.read_corpus(str(root)).held_out
    labels = torch.stack([item["labels"] for item in prepared.held_out])
    predicted = labels[labels != -100]
    text = prepared.tokenizer.decode(predicted, skip_special_tokens=True)
    assert text.encode() == b"".join(held_out.values())
    assert (predicted == prepared.tokenizer.eos_token_id).sum() == len(held_out)
    assert prepared.bytes_per_token == len(text.encode()) / len(predicted)


def test_a_copy_of_prepared_data_is_a_source(tmp_path):
    root = folder(tmp_path)
    first = data(tmp_path).prepare()
    shutil.copytree(first.folder, tmp_path / "copy")
    shutil.rmtree(first.folder)
    shutil.rmtree(root)
    again = data(tmp_path, source=str(tmp_path / "copy")).prepare()
    assert (again.digest, again.bytes_per_token) == (first.digest, first.bytes_per_token)
    with pytest.raises(ValueError, match="prepared with `tokenizer='bpe-300'`: got 'bytes'; type"):
        data(tmp_path, source=str(tmp_path / "copy"), tokenizer="bytes").prepare()


def test_one_of_those_who_ask_at_once_does_the_work(tmp_path, monkeypatch):
    folder(tmp_path)
    write, written, digests = lm.Data._write, [], []

    def counted(self, *arguments):
        written.append(self)
        write(self, *arguments)

    monkeypatch.setattr(lm.Data, "_write", counted)
    ask = [
        threading.Thread(target=lambda: digests.append(data(tmp_path).prepare().digest))
        for _ in range(4)
    ]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert len(digests) == 4 and len(set(digests)) == 1 and len(written) == 1


def test_what_was_cut_short_is_never_read(tmp_path, monkeypatch):
    folder(tmp_path)

    def fails(folder, documents):
        write_documents(folder, documents)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data_module, "write_documents", fails)
        data(tmp_path).prepare()
    assert not [path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()]
    assert len(data(tmp_path).prepare().train) > 0


def test_a_tokenizer_of_the_user(tmp_path):
    folder(tmp_path)
    mine = tok.bpe_tokenizer(["one two three"] * 5, 260)
    mine.save_pretrained(tmp_path / "mine")
    whole = data(tmp_path, tokenizer=str(tmp_path / "mine")).prepare()
    assert whole.tokenizer.get_vocab() == mine.get_vocab()
    backend = tok.tokenizers.Tokenizer(tok.models.BPE(vocab={"a": 0}, merges=[]))
    backend.save(str(tmp_path / "tokenizer.json"))
    bare = data(tmp_path, tokenizer=str(tmp_path / "tokenizer.json")).prepare()
    assert bare.tokenizer.eos_token == tok.END and len(bare.tokenizer) == 2
    assert bare.train.tokens[-1] == bare.tokenizer.eos_token_id == 1


def test_prepared_data_say_what_they_are(tmp_path, monkeypatch):
    folder(tmp_path)
    prepared = data(tmp_path, tokenizer="bytes").prepare()
    told = str(prepared)
    assert prepared.digest in told and "tokenizer bytes, 257 tokens, 0.9" in told
    assert "left out" not in told
    prepared.about["missing"].append("sympy")
    assert "not installed and left out: sympy" in str(prepared)
    assert list(prepared.versions) == ["tokenizers"]


def test_a_mistake_is_answered_before_the_work(tmp_path):
    folder(tmp_path)
    with pytest.raises(ValueError, match="one to predict: got `context=1`; type `context=256`"):
        data(tmp_path, context=1).prepare()
    with pytest.raises(ValueError, match="no tokenizer 'gpt2': got no such name or file; type"):
        data(tmp_path, tokenizer="gpt2").prepare()
    assert not (tmp_path / "cache").exists()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package `filelock`: .*\[lm\]'`"):
        lm.Data().prepare()


@pytest.mark.slow
def test_the_python_corpus(tmp_path):
    prepared = lm.Data(megabytes=3, tokenizer="bpe-1024", cache=str(tmp_path)).prepare()
    assert {"python", "torch", "sympy", "numpy", "matplotlib"} <= set(prepared.versions)
    assert sum(prepared.about[side]["bytes"] for side in ("train", "held_out")) <= 3e6
    assert len(prepared.tokenizer) == 1024 and 2 < prepared.bytes_per_token < 4
    text = prepared.tokenizer.decode(prepared.train[3]["input_ids"])
    assert prepared.tokenizer(text, add_special_tokens=False).input_ids
