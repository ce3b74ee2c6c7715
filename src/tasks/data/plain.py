"""Read plain text: compressions, encodings, damage, and pieces that no token of a tokenizer crosses."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from tasks.data.folders import TextError, TextFile

Encoding = Literal[
    "auto", "utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "latin-1", "cp1252", "iso-8859-2",
    "iso-8859-15", "cp1250", "cp1251", "koi8-r", "mac-roman", "gb18030", "big5", "shift_jis", "euc-jp", "euc-kr",
]  # fmt: skip

PIECE = 1 << 20  # characters of a file read at a time
FEW = 10  # damaged characters that are always allowed
BOMS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
OTHER_FILES = (  # what a file is in truth, by its first bytes
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"\x1f\x8b", "gzip: its name must end in .gz"),
    (b"BZh", "bzip2: its name must end in .bz2"),
    (b"\xfd7zXZ\0", "xz: its name must end in .xz"),
    (b"\x28\xb5\x2f\xfd", "zstd: its name must end in .zst"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"PAR1", "parquet: its name must end in .parquet"),
    (b"%PDF-", "a PDF: extract its text"),
)
CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1a\x1b\x1c\x1d\x1e\x1f"))  # no text has them
FIRST_DAMAGE = re.compile("[\ufffd" + re.escape(CONTROLS.decode()) + "]")
HALVES = re.compile("[\ud800-\udfff]")  # JSON can spell them
WORD_END = re.compile(r".*\S(?=[ \n])", re.DOTALL)  # up to the last end of a word
RUN_END = re.compile(r".*[^\W_](?=\W)", re.DOTALL)  # up to the last end of letters or digits
WIDE = ("utf-16", "utf-32")


# --- bytes ------------------------------------------------------------------------------------------------------------


@contextmanager
def opened(file: TextFile) -> Iterator[IO[bytes]]:
    """Open a file, decompressed by its name's suffix. Raises TextError, with its name, for any error in the block."""
    try:
        with _open(file.path) as stream:
            yield stream
    except TextError:
        raise
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TextError(f"cannot read {file.name} ({reason})") from None


def _open(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".bz2":
        return bz2.open(path)
    if suffix == ".xz":
        return lzma.open(path)
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def check_magic(stream: Any, name: str, expected: bytes = b"") -> bytes:
    """Return a stream's first bytes. Raises TextError if they are those of another kind of file."""
    head: bytes = stream.peek(64)
    for magic, truth in OTHER_FILES:
        if head.startswith(magic) and magic != expected:
            raise TextError(f"{name}: is {truth}")
    return head


def codec_of(stream: Any, encoding: Encoding, name: str) -> str:
    """Return Python's name of a stream's encoding, which a byte order mark decides.

    Raises TextError if the stream begins like a file that is no text.
    """
    head = check_magic(stream, name)
    by_mark = next((codec for mark, codec in BOMS if head.startswith(mark)), None)
    return by_mark or ("utf-8" if encoding == "auto" else encoding)


# --- characters -------------------------------------------------------------------------------------------------------


@dataclass
class Inspected:
    """A plain text file, after one reading."""

    codec: str
    size: int = 0  # bytes of its text as UTF-8
    characters: int = 0
    damaged: int = 0  # characters that are no text
    line: int = 0  # of the first of them


def inspect(file: TextFile, encoding: Encoding, max_bytes: int) -> Inspected:
    """Count a file's characters, up to about `max_bytes` of them. Raises TextError if the file is not readable text."""
    with opened(file) as stream:
        codec = codec_of(stream, encoding, file.name)
        found = Inspected(codec)
        lines = 1
        for text in _characters(stream, codec):
            damaged = damage(text)
            if damaged and not found.damaged:
                match = FIRST_DAMAGE.search(text)
                found.line = lines + (text.count("\n", 0, match.start()) if match else 0)
            lines += text.count("\n")
            found.damaged += damaged
            found.characters += len(text)
            found.size += len(repaired(text).encode())
            if found.size >= max_bytes:
                break
    return found


def _characters(stream: IO[bytes], codec: str) -> Iterator[str]:
    text = io.TextIOWrapper(stream, encoding=codec, errors="replace", newline="")
    while chunk := text.read(PIECE):
        yield chunk


def damage(text: str) -> int:
    """Count the characters that are no text: replacement and control characters, and halves of surrogate pairs."""
    halves = 0
    try:
        data = text.encode()
    except UnicodeEncodeError:
        halves, data = len(HALVES.findall(text)), text.encode(errors="replace")
    return halves + text.count("\ufffd") + len(data) - len(data.translate(None, CONTROLS))


def repaired(text: str) -> str:
    """Replace NULs, by which the byte tokenizer separates documents, and halves of surrogate pairs."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    return HALVES.sub("?", text) if not text.isascii() else text


def too_damaged(damaged: int, characters: int, share: float) -> bool:
    return damaged > max(FEW, share * characters)


def advice(file: TextFile, encoding: Encoding) -> str:
    """Return what may help with a file whose characters are damaged."""
    if encoding != "auto":
        return f"it may not be {encoding}: give another --encoding"
    with opened(file) as stream:
        head = stream.read(4096)
    zeros = [head[i::4].count(0) / (len(head) / 4) for i in range(4)]  # the share of NULs at each place of four
    if max(zeros[:2]) < 1 <= min(zeros[2:]) or max(zeros[2:]) < 1 <= min(zeros[:2]):
        return f"give --encoding utf-32-{'le' if zeros[2] >= 1 else 'be'}"
    if (max(zeros[::2]) < 0.1 and min(zeros[1::2]) > 0.6) or (max(zeros[1::2]) < 0.1 and min(zeros[::2]) > 0.6):
        return f"give --encoding utf-16-{'le' if zeros[1] > 0.6 else 'be'}"
    if 0 in head:
        return "it looks like a binary file"
    return "if it is in another encoding, name that, as in --encoding latin-1"


# --- pieces -----------------------------------------------------------------------------------------------------------


def pieces_of(file: TextFile, codec: str) -> Iterator[str]:
    """Yield a file's text in pieces."""
    with opened(file) as stream:
        yield from pieces(map(repaired, _characters(stream, codec)))


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a text where words end, so that no token of GPT-2 crosses from one piece to the next.

    Where a chunk has no whitespace, cut where letters or digits end, which all known patterns do as well. A run
    of one sort longer than a chunk is cut anywhere: a tokenizer would take quadratic time for the whole of it.
    """
    rest = ""
    for chunk in chunks:
        text = rest + chunk
        end = _last_end(WORD_END, text) if " " in text or "\n" in text else 0
        if not end and len(text) >= PIECE:
            end = (0 if text.isalnum() else _last_end(RUN_END, text)) or len(text)
        if end:
            yield text[:end]
        rest = text[end:]
    if rest:
        yield rest


def _last_end(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.match(text)
    return match.end() if match else 0


def bounded(text: str) -> Iterable[str]:
    """Return the text whole, or in pieces if a word of it is longer than one."""
    if len(text) <= PIECE or max(map(len, re.split("[ \n]", text))) <= PIECE:
        return (text,)
    return list(pieces(text[at : at + PIECE] for at in range(0, len(text), PIECE)))


def split_at(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """Yield what stands between the separators, without the line ends around it; nothing where nothing stands."""
    held: list[str] = []
    tail = ""  # may hold the first characters of a separator
    for chunk in chunks:
        *ended, last = (tail + chunk).split(separator)
        for text in ended:
            held.append(text)
            if whole := "".join(held).strip("\r\n"):
                yield whole
            held = []
        cut = max(0, len(last) - len(separator) + 1)
        held.append(last[:cut])
        tail = last[cut:]
    if whole := ("".join(held) + tail).strip("\r\n"):
        yield whole


def lines_of(stream: IO[bytes], codec: str) -> Iterator[tuple[int, str | bytes]]:
    """Yield the number and text of each line that is not blank. A line outside the encoding stays bytes."""
    wide = codec.startswith(WIDE)
    source: Any = io.TextIOWrapper(stream, encoding=codec, errors="replace", newline="\n") if wide else stream
    for number, line in enumerate(source, 1):
        if isinstance(line, bytes):
            with suppress(UnicodeDecodeError):
                line = line.decode(codec if number == 1 else codec.removesuffix("-sig"))
        if line.strip():
            yield number, line
