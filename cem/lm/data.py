"""Data to train a language model on, prepared once and kept: text, tokenizer, packed tokens."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cem.lm.corpus import Corpus, read_corpus
from cem.lm.packing import Packed, check_context, write_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TRAINED_ON = 10_000_000  # bytes of text that a tokenizer is trained on
_FORMAT = 1  # of the files; a new one does not read the old


@dataclass(frozen=True)
class Data:
    """What a language model reads, as plain values that a YAML file can hold.

    Args:
        source: ``"python"``, ``"stdlib"``, a folder, a file, a glob or ``"hf:NAME[:CONFIG]"``, as
            in `read_corpus`; or a folder that `prepare` made, which is opened as it is.
        tokenizer: ``"bpe-4096"`` (or another number of tokens) for byte-level BPE, trained on the
            first 10 MB of the training side; ``"bytes"``; or the path of a ``tokenizer.json`` or
            of a folder that ``save_pretrained`` wrote.
        context: the length of a window in tokens.
        megabytes: how much text to take, 1 MB being 10^6 bytes.
        held_out: expected share of the documents that are held out.
        cache: the folder to keep prepared data in; None takes the environment variable
            ``CEM_CACHE``, or ``cem`` in the user's cache folder.

    Example:
        >>> for i in range(40):
        ...     _ = Path(f"note{i}.txt").write_text(f"this is note number {i}\\n" * 9)
        >>> prepared = Data("*.txt", tokenizer="bytes", context=64, cache="cache").prepare()
        >>> prepared.train[0]["input_ids"].shape, len(prepared.tokenizer)
        (torch.Size([64]), 257)
    """

    source: str = "python"
    tokenizer: str = "bpe-4096"
    context: int = 256
    megabytes: float | None = 32
    held_out: float = 0.05
    cache: str | None = None

    def prepare(self) -> "Prepared":
        """Read, split and encode the text, or open what an earlier call has kept.

        The same text and the same settings give the same files. They are written whole or not at
        all, and of several processes that ask at once one does the work. What ``"hf:..."`` names
        is read once and then found by its name, without a network too.

        Raises:
            ValueError: a setting is out of its range or names nothing, or the source holds no
                text, see `read_corpus`.
            ModuleNotFoundError: a package of the extra ``lm`` is not installed.
        """
        for package in ("filelock", "tokenizers", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(
                    f"`Data.prepare` needs the package `{package}`: got no such module; "
                    "type `pip install 'causal-energy-minimization[lm]'`"
                )
        check_context(self.context)
        spec = _tokenizer_spec(self.tokenizer)
        given = Path(self.source).expanduser()
        if (given / "data.json").is_file():
            return self._opened(given, spec)
        # What a hub streams is read once: its name stands for it.
        corpus = None if self.source.startswith("hf:") else self._read()
        text = [self.source, self.held_out, self.megabytes] if corpus is None else corpus.digest
        key = json.dumps([_FORMAT, text, spec, importlib.metadata.version("tokenizers")])
        root = _cache_folder(self.cache)
        folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
        if not folder.exists():
            from filelock import FileLock

            root.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not folder.exists():
                    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as partial:
                        self._write(corpus or self._read(), spec, Path(partial) / "data")
                        os.rename(Path(partial) / "data", folder)
        return self._opened(folder, spec)

    def _read(self) -> Corpus:
        return read_corpus(self.source, held_out=self.held_out, megabytes=self.megabytes)

    def _write(self, corpus: Corpus, spec: str, folder: Path) -> None:
        from cem.lm.tokenizer import bpe_tokenizer, byte_tokenizer, encode, load_tokenizer

        if spec == "bytes":
            tokenizer = byte_tokenizer()
        elif spec.startswith("bpe-"):
            tokenizer = bpe_tokenizer(_sample(corpus), int(spec.removeprefix("bpe-")))
        else:
            tokenizer = load_tokenizer(Path(self.tokenizer).expanduser())
        tokenizer.save_pretrained(folder / "tokenizer")
        digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
        sizes = {}
        for side in ("train", "held_out"):
            contents = getattr(corpus, side).values()
            size = sum(map(len, contents))
            write_documents(folder / side, encode(tokenizer, contents, total=size))
            sizes[side] = {"documents": len(contents), "bytes": size}
            for file in ("tokens.npy", "starts.npy"):
                digest.update((folder / side / file).read_bytes())
        versions = {"tokenizers": importlib.metadata.version("tokenizers")}
        about = {
            "source": self.source,
            "tokenizer": spec,
            "digest": digest.hexdigest()[:12],
            "versions": {**corpus.versions, **versions},
            "missing": list(corpus.missing),
            **sizes,
        }
        (folder / "data.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")

    def _opened(self, folder: Path, spec: str) -> "Prepared":
        from transformers import AutoTokenizer

        about = json.loads((folder / "data.json").read_text("utf-8"))
        if about["tokenizer"] != spec:
            raise ValueError(
                f"the data in {folder} were prepared with `tokenizer={about['tokenizer']!r}`: got "
                f"{self.tokenizer!r}; type the same, or name another source"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        train, held_out = (
            Packed(folder / side, context=self.context, fill=tokenizer.eos_token_id)
            for side in ("train", "held_out")
        )
        return Prepared(
            train=train,
            held_out=held_out,
            tokenizer=tokenizer,
            digest=about["digest"],
            versions=about["versions"],
            bytes_per_token=about["held_out"]["bytes"] / held_out.predicted,
            folder=folder,
            about=about,
        )


@dataclass(frozen=True)
class Prepared:
    """Packed windows to train on and held out, with the tokenizer; `print` it for its sizes.

    A document is read as ``<|endoftext|> text <|endoftext|>``, and all its tokens but the first
    are predicted once by the windows: its whole text and its end. So, for the mean loss in nats
    over the labels that are not -100,

        bits per byte = loss / ln 2 / bytes_per_token

    is what the model needs for all of the held-out text, the ends of the documents included,
    divided by the bytes of that text: it compares models whose tokenizers differ.

    Attributes:
        train, held_out: see `Packed`; in the order of the documents, so a sampler shuffles.
        tokenizer: a fast tokenizer of transformers; it puts the beginning of a document before
            what it encodes.
        digest: the first 12 hexadecimal digits of the SHA-256 of the vocabulary and all tokens. A
            loss belongs to a digest.
        versions: of the packages that the text comes from, and of `tokenizers`.
        bytes_per_token: bytes of the held-out text over the tokens that are predicted there.
        folder: where the files are; a copy of it is a `source` on another machine.
        about: what ``data.json`` in that folder says.
    """

    train: Packed
    held_out: Packed
    tokenizer: "PreTrainedTokenizerFast"
    digest: str
    versions: dict[str, str]
    bytes_per_token: float
    folder: Path
    about: dict

    def __str__(self) -> str:
        def size(side, tokens):
            documents, count = self.about[side]["documents"], self.about[side]["bytes"]
            return f"{documents:,} documents, {count:,} bytes, {len(tokens):,} tokens"

        text = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        missing = ", ".join(self.about["missing"])
        return (
            f"{self.about['source']} ({text}), digest {self.digest}\n"
            + (f"not installed and left out: {missing}\n" if missing else "")
            + f"{size('train', self.train.tokens)} to train on\n"
            f"{size('held_out', self.held_out.tokens)} held out\n"
            f"tokenizer {self.about['tokenizer']}, {len(self.tokenizer):,} tokens, "
            f"{self.bytes_per_token:.3f} bytes a token held out"
        )


def _tokenizer_spec(tokenizer: str) -> str:
    """What decides the tokens: a name, or the digest of the user's files."""
    if tokenizer == "bytes" or re.fullmatch(r"bpe-\d+", tokenizer):
        return tokenizer
    path = Path(tokenizer).expanduser()
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"there is no tokenizer {tokenizer!r}: got no such name or file; type 'bpe-4096', "
            "'bytes', or the path of a tokenizer.json or of a folder with one"
        )
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in files))
    return f"files-{digest.hexdigest()[:16]}"


def _sample(corpus: Corpus) -> Iterator[str]:
    """The first documents of the training side, about `_TRAINED_ON` bytes of them."""
    size = 0
    for content in corpus.train.values():
        yield content[: _TRAINED_ON - size].decode("utf-8", "ignore")
        size += len(content)
        if size >= _TRAINED_ON:
            return


def _cache_folder(cache: str | None) -> Path:
    if cache is None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache = os.environ.get("CEM_CACHE") or f"{home}/cem"
    return Path(cache).expanduser() / "data"
