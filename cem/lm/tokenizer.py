"""Tokenizers: byte-level BPE trained on the corpus, single bytes, or the user's own.

Every document is read as

    <|endoftext|> text <|endoftext|>

so that each token of the text is predicted from something, and the end of the document too.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END = "<|endoftext|>"

# A line break before a line that is not indented ends a word of every byte-level tokenizer, so
# that the pieces of a text have the tokens of the whole; a piece takes far less memory.
_BREAK = re.compile(r"\n(?=\S)")


def bpe_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding (the words of GPT-2) trained on texts; every text is encodable.

    Args:
        texts: what to count pairs in; the same texts in the same order give the same tokenizer.
        vocab: how many tokens to end with, the 256 bytes and the end of a document included; few
            texts give fewer.

    Raises:
        ValueError: `vocab` is below 257.

    Example:
        >>> tokenizer = bpe_tokenizer(["low lower lowest"] * 9, vocab=260)
        >>> tokenizer.tokenize("low lower")
        ['low', 'Ġlow', 'e', 'r']
    """
    if vocab < 257:
        raise ValueError(
            f"a byte-level vocabulary holds 256 bytes and the end of a document: got {vocab} "
            "tokens; type `tokenizer='bpe-4096'`, or `tokenizer='bytes'` for the bytes alone"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=_byte_letters(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrapped(backend)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: token n is byte n, token 256 the end of a document.

    Example:
        >>> byte_tokenizer()("hé").input_ids
        [256, 104, 195, 169]
    """
    vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _wrapped(backend)


def load_tokenizer(path) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder that ``save_pretrained`` wrote, or from a ``tokenizer.json``.

    One that has no end of a document gets it: ``<|endoftext|>``.
    """
    if path.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": END})
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerFast, contents: Iterable[bytes], *, total: int | None = None
) -> Iterator[np.ndarray]:
    """The tokens of each document, with its beginning and its end; uint16 where they fit.

    Words such as ``<|endoftext|>`` inside a text are text.

    Args:
        tokenizer: its token `bos` stands first, or `eos` where it has no other; `eos` stands last.
        contents: documents, UTF-8.
        total: the number of bytes, for the progress bar that a terminal shows.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    with tqdm(
        total=total, desc="encoding", unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        for group in _groups(contents):
            pieces = [list(_pieces(content.decode())) for content in group]
            encoded = iter(
                backend.encode_batch_fast(
                    [piece for parts in pieces for piece in parts], add_special_tokens=False
                )
            )
            for content, parts in zip(group, pieces, strict=True):
                ids = [np.array(next(encoded).ids, dtype) for _ in parts]
                yield np.concatenate([np.array([begin], dtype), *ids, np.array([end], dtype)])
                bar.update(len(content))


def _groups(contents: Iterable[bytes], size: int = 2**21) -> Iterator[list[bytes]]:
    """Documents in groups of about `size` bytes, each encoded by all cores at once."""
    group, held = [], 0
    for content in contents:
        group.append(content)
        held += len(content)
        if held >= size:
            yield group
            group, held = [], 0
    if group:
        yield group


def _pieces(text: str, length: int = 2**17) -> Iterator[str]:
    """The text cut at line breaks into pieces of at least `length` characters."""
    start = 0
    while found := _BREAK.search(text, start + length):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _wrapped(backend: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    end = backend.token_to_id(END)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _byte_letters() -> list[str]:
    """The letters by which `tokenizers` writes the bytes 0 to 255, in the order of the bytes."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]
