"""Text to learn from: documents, read from files or from the Hub, with whole documents held out.

A document is the UTF-8 text of one file, or of one row of a data set.
"""

import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("torch", "sympy", "numpy", "matplotlib")

_LEFT_OUT = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages"),  # not on every machine
    *("encodings", "pydoc_data", "generated"),  # tables and texts that a program wrote
    *("testing", "benchmarks"),  # long lists of cases
}


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out; no text stands on both sides.

    Attributes:
        train, held_out: {name: content}, the content as UTF-8, ordered by its SHA-256.
        versions: of the packages that the documents come from, {} for a user's own files.
        missing: packages that were asked for and are not installed.
    """

    train: Mapping[str, bytes]
    held_out: Mapping[str, bytes]
    versions: Mapping[str, str]
    missing: tuple[str, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of all sides, names and contents."""
        digest = hashlib.sha256()
        for side in (self.train, self.held_out):
            digest.update(f"{len(side)}\0".encode())
            for name, content in side.items():
                digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()[:12]


def read_corpus(
    source: str = "python", *, held_out: float = 0.05, megabytes: float | None = None
) -> Corpus:
    """Read the documents of a source and split them.

    A document is held out when the SHA-256 of its name, read as a number in [0, 1), is below
    `held_out`. The split depends on names alone, so a file keeps its side when others come and go.
    At least one document stands on either side, and a source of one document is cut in two at the
    end of a line. Of documents with the same content the one with the first name stays; what is
    empty or not UTF-8 is left out.

    Args:
        source: one of

            - ``"python"``: the ``*.py`` files of the standard library and of the installed ones
              of `PACKAGES`, without tests and generated tables; a name is ``torch/nn/init.py``;
            - ``"stdlib"``: those of the standard library alone;
            - a folder, a file or a glob such as ``"notes/**/*.txt"``; a name is the path from the
              folder, or from the last folder before the first wildcard;
            - ``"hf:NAME"`` or ``"hf:NAME:CONFIG"``: the column ``text`` (or ``content``) of the
              split ``train`` of a data set of the Hub, or of a folder with files of a data set,
              read as a stream from its beginning; a name is the number of the row.
        held_out: expected share of the documents that are held out, between 0 and 1.
        megabytes: take this much text (1 MB is 10^6 bytes), in the order of the SHA-256 of the
            contents; the last document is cut at the end of a line. None takes all.

    Raises:
        ValueError: an argument is out of its range, the source holds no text or not enough of it
            to split, or the data set has no text or cannot be reached.
        ModuleNotFoundError: ``"hf:..."`` without the package ``datasets``.

    Example:
        >>> corpus = read_corpus("stdlib", megabytes=1)
        >>> set(corpus.train) & set(corpus.held_out), list(corpus.versions)
        (set(), ['python'])
    """
    if not 0 < held_out < 1:
        raise ValueError(
            f"`held_out` must be a share between 0 and 1: got {held_out}; try `held_out=0.05`"
        )
    if megabytes is not None and not megabytes > 0:
        raise ValueError(f"`megabytes` must be positive: got {megabytes}; try `megabytes=32`")
    limit = None if megabytes is None else int(megabytes * 1e6)
    versions, missing = {}, ()
    if source in ("python", "stdlib"):
        roots, missing = _packages(PACKAGES if source == "python" else ())
        documents = _python_files(roots)
        versions = {"python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in roots if name}
    elif source.startswith("hf:"):
        documents = _rows(source, limit)
    else:
        documents = _files(source)
    documents = _ordered(documents, limit)
    if not documents:
        raise ValueError(
            f"there is no text to learn from: got no readable document from `source={source!r}`; "
            "name a folder, a glob such as 'notes/**/*.txt', 'python' or 'hf:NAME'"
        )
    return Corpus(*_split(source, documents, held_out), versions, missing)


def _packages(names: Iterable[str]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The folders of the standard library, named "", and of the packages; the missing ones."""
    roots, missing = {"": Path(sysconfig.get_path("stdlib"))}, []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            missing.append(name)
        else:
            roots[name] = Path(spec.submodule_search_locations[0])
    return roots, tuple(missing)


def _python_files(roots: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
    for package, root in roots.items():
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            if _LEFT_OUT.isdisjoint(inside.parts):
                yield (package / inside).as_posix(), path.read_bytes()


def _files(source: str) -> Iterator[tuple[str, bytes]]:
    """The files of a folder, of a glob, or the one file; nothing that is hidden."""
    source = os.path.expanduser(source)
    path = Path(source)
    if path.exists():  # a name of an existing path is never a pattern
        root, source = (path, glob.escape(source)) if path.is_dir() else (path.parent, source)
        found = glob.glob(f"{source}/**", recursive=True) if path.is_dir() else [path]
    else:
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        root = Path(*fixed)
        found = glob.glob(source, recursive=True)
    for file in map(Path, found):
        if file.is_file():
            yield file.relative_to(root).as_posix(), file.read_bytes()


def _rows(source: str, limit: int | None) -> Iterator[tuple[str, bytes]]:
    """The rows of a data set, from the first on, until `limit` bytes have been read."""
    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"`source={source!r}` needs the package `datasets`: got no such module; "
            "type `pip install datasets`"
        ) from None
    size = 0
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for number, row in enumerate(rows):
            column = next((c for c in ("text", "content") if isinstance(row.get(c), str)), None)
            if column is None:
                break
            content = row[column].encode("utf-8", "replace")
            yield f"{number:012}", content
            size += len(content)
            if limit is not None and size >= limit:
                return
        else:
            return
    except Exception as error:  # a network, a Hub and many file formats stand behind this
        raise ValueError(
            f"the data set of `source={source!r}` cannot be read: got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}; check its name and the network, or name a folder"
        ) from error
    raise ValueError(
        f"the data set of `source={source!r}` needs a column `text` or `content` of strings: got "
        f"{', '.join(row)}; rename one, and name the folder of the file as the source"
    )


def _ordered(documents: Iterable[tuple[str, bytes]], limit: int | None) -> dict[str, bytes]:
    """Each text once, in the order of its hash, cut at `limit` bytes."""
    unique = {}  # hash -> name, content
    for name, content in sorted(documents, key=lambda document: document[0]):
        if content.strip() and _is_utf8(content):
            unique.setdefault(hashlib.sha256(content).digest(), (name, content))
    kept, room = {}, float("inf") if limit is None else limit
    for _, (name, content) in sorted(unique.items()):
        if len(content) >= room:
            kept[name] = content[: _line_end(content, room)]
            break
        kept[name] = content
        room -= len(content)
    return {name: content for name, content in kept.items() if content}


def _split(
    source: str, documents: Mapping[str, bytes], held_out: float
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    if len(documents) == 1:
        [(name, content)] = documents.items()
        at = _line_end(content, int(len(content) * (1 - held_out)))
        if not 0 < at < len(content):
            raise ValueError(
                f"the text of `source={source!r}` is too short to split: got {len(content)} bytes "
                "in one document; give more text"
            )
        return {name: content[:at]}, {name: content[at:]}
    place = {name: _unit_hash(name) for name in documents}
    first, *_, last = sorted(place, key=place.__getitem__)
    held = {n for n in documents if place[n] < held_out} - {last} | {first}
    return (
        {name: content for name, content in documents.items() if name not in held},
        {name: content for name, content in documents.items() if name in held},
    )


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _line_end(content: bytes, at: int) -> int:
    """The last end of a line up to `at`; without one the last end of a character."""
    if end := content.rfind(b"\n", 0, at) + 1:
        return end
    while (
        0 < at < len(content) and content[at] & 0xC0 == 0x80
    ):  # inside a character of several bytes
        at -= 1
    return at
