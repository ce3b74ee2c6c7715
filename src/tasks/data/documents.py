"""Documents of text from files, folders, the standard library or the hub, and their split into training and validation.

Everything is streamed: only a few rows or a piece of a file are in memory at a time.
"""

from __future__ import annotations

import itertools
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from protocol import CONTEXT, DatasetRef
from tasks.data.folders import TextError, TextFile, local_files, select
from tasks.data.plain import PIECE, pieces_of
from tasks.data.reading import Document, Findings, Reading, documents_of, row_documents, row_texts

__all__ = [
    "PIECE",
    "Document",
    "Piece",
    "TextError",
    "hub_documents",
    "hub_revision",
    "limited",
    "local_documents",
    "local_files",
    "select",
    "split",
    "standard_library",
    "whole",
]

FEW = 100  # with fewer documents each is cut, rather than assigned whole
OMITTED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Piece(NamedTuple):
    """Consecutive bytes of a document that belong to the same part, training or validation."""

    data: bytes  # UTF-8
    validation: bool
    starts: bool  # the first piece of its document in this part


# --- sources ----------------------------------------------------------------------------------------------------------


def standard_library() -> Iterator[Document]:
    """Yield the .py files of this Python's library, without its tests, by sorted relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in names:
        if OMITTED_FOLDERS.isdisjoint(Path(name).parts):
            path = root / name
            yield Document(path.stat().st_size, pieces_of(TextFile(path, name), "utf-8"))


def local_documents(
    files: Iterable[TextFile], reading: Reading, findings: Findings, max_bytes: int = 0
) -> Iterator[Document]:
    """Yield the documents of files. Of a .txt file no more than about `max_bytes` need be looked at; 0 is no limit."""
    for file in files:
        yield from documents_of(file, reading, findings, max_bytes or sys.maxsize)


def hub_documents(
    source: DatasetRef, reading: Reading, rows: int, findings: Findings | None = None
) -> Iterator[Document]:
    """Stream the first `rows` rows of a data set on the hub.

    Nothing local is read: `hf://` rules out a folder of this name, and a data set's own card cannot name other files.
    """
    import datasets

    findings = findings or Findings()
    address = f"hf://datasets/{source.name}"
    try:
        builder = datasets.load_dataset_builder(address, source.subset, revision=source.revision)
        named = itertools.chain.from_iterable((builder.config.data_files or {}).values())
        if not all(str(file).startswith(f"{address}@") for file in named):
            raise TextError("it names files outside itself")
        stream = builder.as_streaming_dataset(split=source.split)
        texts = row_texts("row", enumerate(stream.take(rows), 1), reading, findings)
        yield from row_documents(source.name, texts, reading, findings)
    except TextError:
        raise
    except (OSError, ValueError) as error:
        raise TextError(f"cannot read this data set from the hub ({_first_line(error)})") from error


def hub_revision(source: DatasetRef) -> str | None:
    """Return the commit that the source's revision (None: the newest) means now."""
    from huggingface_hub import HfApi

    sha: str | None = HfApi().dataset_info(source.name, revision=source.revision).sha
    return sha


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- limits and the split ---------------------------------------------------------------------------------------------


def limited(documents: Iterable[Document], rows: int, max_bytes: int) -> Iterator[Document]:
    """Yield the first `rows` documents and `max_bytes` bytes, to within a character; 0 is no limit."""
    left = max_bytes or sys.maxsize
    for document in itertools.islice(documents, rows or None):
        yield Document(min(document.size, left), _head(document.pieces, left))
        left -= document.size
        if left <= 0:
            return


def split(documents: Iterable[Document], validation: float) -> Iterator[Piece]:
    """Split off the fraction `validation` of the text, by the documents' sizes and order alone.

    Whole documents are drawn by a hash of their index. With fewer than `FEW`, the end of each is taken instead.
    """
    documents = iter(documents)
    first = list(itertools.islice(documents, FEW))
    few = len(first) < FEW
    for index, document in enumerate(itertools.chain(first, documents)):
        dealt = 0 if _drawn(index, validation) else sys.maxsize
        kept = document.size - int(document.size * validation)
        yield from _cut(document.pieces, kept if few else dealt)


def whole(documents: Iterable[Document], validation: bool) -> Iterator[Piece]:
    """Yield every document for one part."""
    for document in documents:
        for number, text in enumerate(document.pieces):
            if text:
                yield Piece(text.encode(), validation, starts=number == 0)


def _drawn(index: int, fraction: float) -> bool:
    key = blake3(index.to_bytes(8, "little"), derive_key_context=f"{CONTEXT} validation split")
    return int.from_bytes(key.digest(length=6), "little") < fraction * 2**48


def _cut(pieces: Iterable[str], at: int) -> Iterator[Piece]:
    """Yield the pieces, cut at the first character that begins at byte `at` or later."""
    position = 0
    begun = {False: False, True: False}
    for text in pieces:
        data = text.encode()
        middle = min(max(at - position, 0), len(data))
        while middle < len(data) and data[middle] & 0xC0 == 0x80:  # inside a character
            middle += 1
        position += len(data)
        for part, validation in ((data[:middle], False), (data[middle:], True)):
            if part:
                yield Piece(part, validation, starts=not begun[validation])
                begun[validation] = True


def _head(pieces: Iterable[str], size: int) -> Iterator[str]:
    return (p.data.decode() for p in itertools.takewhile(lambda p: not p.validation, _cut(pieces, size)))
