"""Documents of text from files, folders, the standard library or the hub, and their split into training and validation.

Everything is streamed: only a few rows or a piece of a file are in memory at a time.
"""

from __future__ import annotations

import itertools
import json
import lzma
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from nanochat.dataset import ShardError, read_shard
from protocol import CONTEXT, DatasetRef

PIECE = 1 << 20  # characters of a file read at a time
FEW = 100  # with fewer documents each is cut, rather than assigned whole
SUFFIXES = (".txt", ".jsonl", ".jsonl.xz", ".parquet")
OMITTED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
WORD_END = re.compile(r".*\S(?=[ \n])", re.DOTALL)  # up to the last end of a word


class TextError(ValueError):
    """Say in one line why a text is not available. The caller adds the flag that named it."""


class Document(NamedTuple):
    """A text, in pieces that end where words end, so that no token of GPT-2 crosses from one to the next."""

    size: int  # in bytes
    pieces: Iterable[str]


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
            yield _file(root / name)


def local_files(path: Path) -> list[Path]:
    """Return the file, or the folder's text files, sorted. Raises TextError if there are none."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise TextError(f"not one of {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise TextError("no such file or folder")
    files = sorted((f for f in path.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file()), key=Path.as_posix)
    if not files:
        raise TextError(f"no {', '.join(SUFFIXES)} file in this folder")
    return files


def local_documents(
    files: Iterable[Path], column: str, skip: Callable[[str], object] | None = None
) -> Iterator[Document]:
    """Yield one document per .txt file, and one per row of the other files.

    With `skip`, the rest of an unreadable file is left out, and `skip` is called with a line that says so.
    """
    for path in files:
        try:
            if path.suffix == ".txt":
                yield _file(path)
            elif path.suffix == ".parquet":
                yield from map(_document, _parquet_texts(path, column))
            else:
                for number, row in enumerate(_readable(path, _jsonl_rows(path)), 1):
                    yield from _row(row, column, f"{path.name}: row {number}")
        except TextError as error:
            if skip is None:
                raise
            skip(f"skipped the rest of {path}: {error}")


def hub_documents(source: DatasetRef, column: str, rows: int) -> Iterator[Document]:
    """Stream the first `rows` rows of a data set on the hub.

    Nothing local is read: `hf://` rules out a folder of this name, and a data set's own card cannot name other files.
    """
    import datasets

    address = f"hf://datasets/{source.name}"
    try:
        builder = datasets.load_dataset_builder(address, source.subset, revision=source.revision)
        named = itertools.chain.from_iterable((builder.config.data_files or {}).values())
        if not all(str(file).startswith(f"{address}@") for file in named):
            raise TextError("it names files outside itself")
        stream = builder.as_streaming_dataset(split=source.split)
        for number, row in enumerate(stream.take(rows), 1):
            yield from _row(row, column, f"row {number}")
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


def _readable(path: Path, items: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from items
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise TextError(f"cannot read {path.name} ({_first_line(error)})") from None


def _file(path: Path) -> Document:
    return Document(path.stat().st_size, _readable(path, _pieces(path)))


def _pieces(path: Path) -> Iterator[str]:
    rest = ""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while chunk := file.read(PIECE):
            text = rest + chunk
            match = WORD_END.match(text)
            end = match.end() if match else 0
            if end:
                yield text[:end]
            rest = text[end:]
    if rest:
        yield rest


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TextError(f"{path.name}: line {number} is not JSON ({_first_line(error)})") from None
            if not isinstance(row, dict):
                raise TextError(f"{path.name}: line {number} is not a JSON object")
            yield row


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    try:
        yield from read_shard(path, column)
    except ShardError as error:
        hint = "; give --column" if "column" in str(error) else ""
        raise TextError(f"{path.name}{str(error).removeprefix(str(path))}{hint}") from None


def _row(row: dict[str, Any], column: str, where: str) -> Iterator[Document]:
    """Yield a row's document, or nothing if it is null."""
    if column not in row:
        raise TextError(f"{where} has no column {column}, only {', '.join(row)}; give --column")
    text = row[column]
    if text is None:
        return
    if not isinstance(text, str):
        raise TextError(f"{where}: column {column} holds {type(text).__name__}, not text; give --column")
    yield _document(text)


def _document(text: str) -> Document:
    data = text.encode(errors="replace")  # JSON can spell half a surrogate pair
    return Document(len(data), (data.decode(),))


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
