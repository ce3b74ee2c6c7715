"""Read the documents of a file as its flags say, and count what was skipped, replaced or out of place."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from nanochat.shards import ShardError, read_rows
from tasks.data.folders import TextError, TextFile
from tasks.data.plain import (
    Encoding,
    advice,
    bounded,
    check_magic,
    codec_of,
    damage,
    inspect,
    lines_of,
    opened,
    pieces_of,
    repaired,
    split_at,
    too_damaged,
)

SPECIAL = re.compile(r"<\|\w{1,32}\|>|</s>|<[be]os>", re.ASCII)  # tokens such as <|endoftext|>, written out
SIGNS = ("<|", "</s>", "os>")  # one of which is in each
SEPARATORS = {"<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<|bos|>", "<|eos|>", "</s>", "<bos>", "<eos>"}
NAMED = 4  # special tokens, or keys of a row, that a line names


class Document(NamedTuple):
    """A text, in pieces that end where words end, so that no token of GPT-2 crosses from one to the next."""

    size: int  # in bytes
    pieces: Iterable[str]
    plain: bool = False  # a .txt file, which may hold many documents


@dataclass(frozen=True)
class Reading:
    """The flags that say how text is read, the same in all programs."""

    flag: ClassVar[str] = ""  # the flags' prefix

    column: str = "text"
    """Column (key) of the text in .jsonl, .parquet and hub data sets; content in tiiuae/falcon-refinedweb."""

    encoding: Encoding = "auto"
    """Encoding of .txt and .jsonl files, and of a .parquet column of bytes. A byte order mark comes first; auto is
    UTF-8 where there is none."""

    max_replaced: float = 0.001
    """Refuse text of which a greater share is damaged: bytes outside the encoding, which are replaced, and NULs. Up to
    ten such characters are always allowed."""

    separator: str = ""
    """End a document wherever this stands in the text, as in --separator "<|endoftext|>". The separator itself is left
    out."""

    bad_shards: Literal["stop", "skip"] = "stop"
    """What to do about a row or file that cannot be read: stop, or count it and go on without it."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_replaced <= 1:
            raise ValueError(f"{self.option('max-replaced')} {self.max_replaced}: must lie between 0 and 1")

    def option(self, name: str) -> str:
        return f"--{self.flag}.{name}" if self.flag else f"--{name}"

    def named(self, reason: object) -> str:
        """Return a message in which each flag has this program's prefix."""
        return FLAGS.sub(lambda match: self.option(match[1]), str(reason))


FLAGS = re.compile(r"(?<![\w-])--(column|encoding|max-replaced|separator|bad-shards|rows|validation)\b")


@dataclass
class Findings:
    """What was odd in a text, in the order in which it was found."""

    skipped: list[str] = field(default_factory=list)  # the reasons, of which only a few are kept
    rows_skipped: int = 0
    empty_rows: int = 0
    damaged: Counter[str] = field(default_factory=Counter)  # characters, by file
    special: Counter[str] = field(default_factory=Counter)
    separated: int = 0  # texts in which a separator stands
    capped: int = 0  # documents of which only the first characters were taken

    def skip(self, reason: object, rows: int = 1) -> None:
        self.rows_skipped += rows
        if len(self.skipped) < NAMED:
            self.skipped.append(str(reason))

    def facts(self, separator: str = "") -> list[str]:
        """Say in a line each what a user should know of the text that was read."""
        said = []
        if self.skipped:
            said.append(f"skipped {self.rows_skipped:,} bad rows or files: {'; '.join(self.skipped)}")
        if self.empty_rows:
            said.append(f"left out {self.empty_rows:,} rows without text")
        if self.damaged:
            files = ", ".join(f"{count:,} in {name}" for name, count in self.damaged.most_common(NAMED))
            said.append(f"damaged characters, of which the undecodable and NULs are replaced: {files}")
        for token, count in self.special.most_common(NAMED):
            hint = f'; --separator "{token}" ends a document at each' if token in SEPARATORS and not separator else ""
            said.append(f"{token} stands {count:,} times in it as ordinary characters{hint}")
        if separator and not self.separated:
            said.append(f"--separator {separator!r} stands nowhere in it")
        return said

    def look(self, text: str) -> str:
        """Count the special tokens in a text, and return it."""
        if any(sign in text for sign in SIGNS):
            self.special.update(SPECIAL.findall(text))
        return text


def documents_of(file: TextFile, reading: Reading, findings: Findings, max_bytes: int) -> Iterator[Document]:
    """Yield one document per .txt file, and one per row of the other files; more with a separator.

    Raises TextError, with file and row, for anything that cannot be read; with --bad-shards skip, as little as possible
    is left out instead.
    """
    try:
        if file.suffix == ".txt":
            yield from _plain_documents(file, reading, findings, max_bytes)
            return
        rows = _parquet_texts if file.suffix == ".parquet" else _jsonl_texts
        yield from row_documents(file.name, rows(file, reading, findings), reading, findings)
    except TextError as error:
        if reading.bad_shards != "skip":
            raise
        findings.skip(error)


def _plain_documents(file: TextFile, reading: Reading, findings: Findings, max_bytes: int) -> Iterator[Document]:
    found = inspect(file, reading.encoding, max_bytes)
    if too_damaged(found.damaged, found.characters, reading.max_replaced):
        share = (
            f"{found.damaged:,} of its {found.characters:,} characters are no text, the first in line {found.line:,}"
        )
        limit = f"more than --max-replaced {reading.max_replaced:g} allows"
        raise TextError(f"{file.name}: {share}; {limit}; {advice(file, reading.encoding)}")
    if found.damaged:
        findings.damaged[file.name] += found.damaged
    pieces = map(findings.look, pieces_of(file, found.codec))
    if not reading.separator:
        yield Document(found.size, pieces, plain=True)
        return
    for count, text in enumerate(split_at(pieces_of(file, found.codec), reading.separator)):
        findings.separated += count == 1
        yield _document(findings.look(text))


def _document(text: str) -> Document:
    return Document(len(text.encode()), bounded(text))


def row_documents(
    name: str, texts: Iterable[tuple[int, str | None]], reading: Reading, findings: Findings
) -> Iterator[Document]:
    """Yield the documents of numbered texts, without those that are null. Repairs and counts damaged characters."""
    damaged = characters = 0
    for number, text in texts:
        if text is None:
            findings.empty_rows += 1
            continue
        if bad := damage(text):
            reason = f"{name}: row {number}: {bad:,} of {len(text):,} characters are no text"
            if too_damaged(bad, len(text), reading.max_replaced):
                _refuse(f"{reason}, more than --max-replaced {reading.max_replaced:g} allows", reading, findings)
                continue
            text = repaired(text)
            damaged += bad
            findings.damaged[name] += bad
        characters += len(text)
        parts: Iterable[str] = [text]
        if reading.separator and reading.separator in text:
            findings.separated += 1
            parts = split_at(parts, reading.separator)
        for part in parts:
            yield _document(findings.look(part))
    if too_damaged(damaged, characters, reading.max_replaced):
        share = f"{damaged:,} of its {characters:,} characters are no text"
        raise TextError(f"{name}: {share}, more than --max-replaced {reading.max_replaced:g} allows")


def _refuse(reason: str, reading: Reading, findings: Findings) -> None:
    """Skip a row with --bad-shards skip. Raises TextError otherwise."""
    if reading.bad_shards != "skip":
        raise TextError(f"{reason}; --bad-shards skip goes on without such rows")
    findings.skip(reason)


# --- rows -------------------------------------------------------------------------------------------------------------


def _parquet_texts(file: TextFile, reading: Reading, findings: Findings) -> Iterator[tuple[int, str | None]]:
    def shown(error: object) -> str:
        return f"{file.name}{str(error).removeprefix(str(file.path))}"

    def skip(reason: str, rows: int) -> None:
        findings.skip(shown(reason), rows)

    encoding = None if reading.encoding == "auto" else reading.encoding
    may_skip: Callable[[str, int], object] | None = skip if reading.bad_shards == "skip" else None
    try:
        yield from enumerate(read_rows(file.path, reading.column, encoding=encoding, skip=may_skip), 1)
    except ShardError as error:
        with opened(file) as stream:
            check_magic(stream, file.name, expected=b"PAR1")
        raise TextError(shown(error)) from None


def _jsonl_texts(file: TextFile, reading: Reading, findings: Findings) -> Iterator[tuple[int, str | None]]:
    with opened(file) as stream:
        codec = codec_of(stream, reading.encoding, file.name)
        yield from row_texts(f"{file.name}: line", lines_of(stream, codec), reading, findings)


def row_texts(
    where: str, rows: Iterable[tuple[int, Any]], reading: Reading, findings: Findings
) -> Iterator[tuple[int, str | None]]:
    """Yield the text of each numbered row, or line of JSON."""
    for number, row in rows:
        try:
            parsed = _parsed(row) if isinstance(row, str | bytes) else row
            yield number, _text_of(parsed, reading.column)
        except TextError as error:
            _refuse(f"{where} {number} {error}", reading, findings)


def _parsed(line: str | bytes) -> Any:
    if isinstance(line, bytes):
        raise TextError("is not in the file's encoding; name that with --encoding")
    try:
        return json.loads(line.lstrip("\ufeff"))  # files that were joined have marks within
    except RecursionError:
        raise TextError("is nested too deeply to be read") from None
    except ValueError as error:
        raise TextError(f"is not JSON ({str(error).splitlines()[0]})") from None


def _text_of(row: Any, column: str) -> str | None:
    """Return a row's text, which may be null. Raises TextError whose message goes on from the row's number."""
    if not isinstance(row, dict):
        raise TextError("is not a JSON object")
    text = row.get(column)
    if (text is None and column in row) or isinstance(text, str):
        return text
    others = [key for key, value in row.items() if isinstance(value, str) and key != column]
    hint = f"; give --column {' or '.join(_short(others))}" if others else ""
    if column not in row:
        raise TextError(f"has no column {column}, only {', '.join(_short(list(row)))}{hint}")
    raise TextError(f"holds {type(text).__name__}, not text, in column {column}{hint}")


def _short(names: list[str]) -> list[str]:
    return [name[:40] for name in names[:NAMED]]
