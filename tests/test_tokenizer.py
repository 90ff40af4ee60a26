"""Tokenizers give every text back, repeat, and know where a document ends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from cem.lm import tokenizer as tok

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(50)]
TOKENIZERS = {"bytes": tok.byte_tokenizer(), "bpe": tok.bpe_tokenizer(TEXTS, 300)}
kinds = pytest.mark.parametrize("kind", TOKENIZERS)


@kinds
@given(text=st.text())
def test_every_text_comes_back(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    if kind == "bytes":
        assert bytes(ids[1:]) == text.encode()


@kinds
def test_the_word_for_the_end_is_text_inside_a_text(kind):
    tokenizer, text = TOKENIZERS[kind], f"a{tok.END}b"
    [ids] = tok.encode(tokenizer, [text.encode()])
    end = tokenizer.eos_token_id
    assert ids[0] == ids[-1] == end and end not in ids[1:-1]
    assert ids[:-1].tolist() == tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@kinds
def test_a_tokenizer_is_saved_whole(kind, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, text = TOKENIZERS[kind], f"é\n\n  x{tok.END} don 't , \x00"
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), tok.load_tokenizer(tmp_path)):
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.decode(again(text).input_ids, skip_special_tokens=True) == text
        assert again.eos_token_id == again.bos_token_id == tokenizer.eos_token_id
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_training_a_tokenizer_repeats():
    one, two = (tok.bpe_tokenizer(iter(TEXTS), 300) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert len(one) == 300 and len(tok.bpe_tokenizer(TEXTS[:1], 4096)) < 300
    with pytest.raises(ValueError, match="256 bytes and the end of a document: got 256 tokens"):
        tok.bpe_tokenizer(TEXTS, 256)


@kinds
@given(
    words=st.lists(
        st.sampled_from(["\n", "\n    return x + 1", "def f1(x):", *"\r\t \x1c\u2028'é"])
    )
)
@settings(max_examples=300)
def test_a_long_text_has_the_tokens_of_its_pieces(kind, words):
    text = "".join(words)
    pieces = list(tok._pieces(text, length=3))
    assert "".join(pieces) == text
    whole, *parts = (TOKENIZERS[kind].encode(t, add_special_tokens=False) for t in (text, *pieces))
    assert sum(parts, []) == whole


def test_documents_keep_their_order_through_the_groups(monkeypatch):
    contents = [f"{i}\n".encode() * (i + 1) for i in range(30)]
    monkeypatch.setattr(tok._groups, "__defaults__", (100,))
    monkeypatch.setattr(tok._pieces, "__defaults__", (7,))
    encoded = tok.encode(TOKENIZERS["bytes"], contents)
    assert [ids[1:-1].astype(np.uint8).tobytes() for ids in encoded] == contents
