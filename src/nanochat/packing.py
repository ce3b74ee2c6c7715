"""Rows of exactly T + 1 tokens, packed from whole documents where they fit.

Every row begins with <|bos|>, and so does every piece of a document in it. The next document is the largest in a buffer
that still fits; if none fits, the shortest is cropped to fill the row. The index is a pure function of the tokens and
the parameters, so a row's number means the same tokens on every machine.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from protocol import Digest, digest

Crop = Literal["discard", "keep"]
Array = NDArray[Any]

BUFFER = 1000  # documents to choose from
MAGIC = b"pilotpk1"
HEADER = struct.Struct("<8sQQ")  # magic, bytes of the JSON that follows, number of pieces
VERSION = 1  # of the packing; raise it if the same tokens make other rows
CHUNK = 1 << 24  # tokens searched for documents at a time
SERIALS = 1 << 40  # above any number of documents


# --- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """Everything besides the tokens that determines the rows."""

    data: str  # names the tokens, by their digest
    tokenizer: str  # the digest of the tokenizer that made them; "" if unknown
    tokens: int
    bos: int
    row_len: int
    buffer: int
    crop: Crop
    pad: bool
    version: int = VERSION

    @property
    def digest(self) -> Digest:
        return digest("packing", json.dumps(asdict(self), sort_keys=True).encode())


class PackingIndex:
    """The pieces of the tokens that make each row. `len()` is the number of rows."""

    def __init__(self, tokens: Array, packing: Packing, starts: Array, lengths: Array, total: int) -> None:
        """`starts` and `lengths`, (pieces,), are the pieces', row after row; `total` counts tokens without the bos."""
        self.packing = packing
        self.total = total  # tokens of text
        self.kept = int(lengths.sum()) - len(lengths)  # those of them in a row
        self._tokens, self._starts, self._lengths = np.asarray(tokens), starts, lengths
        ends = np.cumsum(lengths, dtype=np.int64)
        rows = int(ends[-1]) // packing.row_len if len(ends) else 0
        # the first piece of each row, and one more
        self._first = np.searchsorted(ends, packing.row_len * np.arange(rows + 1, dtype=np.int64), side="right")

    def __len__(self) -> int:
        return len(self._first) - 1

    @property
    def digest(self) -> Digest:
        return self.packing.digest

    @classmethod
    def build(
        cls,
        tokens: Array,
        bos: int,
        row_len: int,
        *,
        buffer: int = BUFFER,
        crop: Crop = "discard",
        pad: bool = False,
        data: str = "",
        tokenizer: str = "",
    ) -> PackingIndex:
        """Pack `tokens`, (n,) unsigned, in which each document begins with `bos`.

        The rest of a cropped document is dropped (crop="discard"), or returns to the buffer behind a bos of its own
        (crop="keep", where a document longer than a row first makes whole rows). A last row that is not full is
        dropped; `pad` fills it with bos instead, for evaluation: then crop="keep" has every token of text exactly once.
        """
        packing = Packing(data, tokenizer, len(tokens), bos, row_len, buffer, crop, pad)
        return cls._built(tokens, packing)

    @classmethod
    def _built(cls, tokens: Array, packing: Packing) -> PackingIndex:
        if not 2 <= packing.row_len < 1 << 32 or packing.buffer < 1:
            raise ValueError(
                f"rows of {packing.row_len} tokens from {packing.buffer} documents: must be at least 2 and 1"
            )
        packer = _Packer(packing)
        documents = 0
        for starts, lengths in _documents(tokens, packing.bos):
            documents += len(starts)
            packer.add(starts, lengths)
        packer.finish()
        placed = np.frombuffer(packer.starts, np.int64), np.frombuffer(packer.lengths, np.uint32)
        return cls(tokens, packing, *placed, total=len(tokens) - documents)

    @classmethod
    def cached(
        cls,
        folder: Path,
        tokens: Array,
        *,
        name: str,  # names the tokens: their file's digest and the part of it
        bos: int,
        row_len: int,
        buffer: int = BUFFER,
        crop: Crop = "discard",
        pad: bool = False,
        tokenizer: str = "",
    ) -> PackingIndex:
        """Load the index from its file in `folder`, which is named by all parameters, or build it and write the file.

        A file that is damaged, or of something else, is built again.
        """
        packing = Packing(name, tokenizer, len(tokens), bos, row_len, buffer, crop, pad)
        path = folder / f"packing-{packing.digest}.bin"
        if path.exists():
            try:
                return cls.load(path, tokens, packing)
            except ValueError:
                pass  # built again
        index = cls._built(tokens, packing)
        folder.mkdir(parents=True, exist_ok=True)
        index.save(path)
        return index

    def save(self, path: Path) -> None:
        """Write the index atomically."""
        said = json.dumps({**asdict(self.packing), "total": self.total}).encode()
        said += b" " * (-len(said) % 8)
        header = HEADER.pack(MAGIC, len(said), len(self._starts))
        parts = (header, said, self._starts.tobytes(), self._lengths.tobytes())
        hasher = blake3()
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with partial.open("wb") as file:
                for part in parts:
                    hasher.update(part)
                    file.write(part)
                file.write(hasher.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, tokens: Array, expected: Packing | None = None) -> PackingIndex:
        """Read a file of `save`. Raises ValueError, with its name, if it is damaged or of other tokens."""
        data = path.read_bytes()
        body = memoryview(data)[:-32]
        if len(body) < HEADER.size or blake3(body).digest() != data[-32:]:
            raise ValueError(f"{path}: damaged, or no packing index; delete it")
        magic, size, pieces = HEADER.unpack_from(body)
        if magic != MAGIC or len(body) != HEADER.size + size + 12 * pieces:
            raise ValueError(f"{path}: no packing index, or of another version; delete it")
        said = json.loads(bytes(body[HEADER.size : HEADER.size + size]))
        total = said.pop("total", 0)
        packing = Packing(**said) if said.keys() == Packing.__dataclass_fields__.keys() else None
        if packing is None or packing.version != VERSION:
            raise ValueError(f"{path}: a packing index of another version; delete it")
        if expected is not None and packing != expected:
            names = [n for n, value in asdict(expected).items() if getattr(packing, n) != value]
            wrong = ", ".join(f"{n} {getattr(packing, n)}, not {getattr(expected, n)}" for n in names)
            raise ValueError(f"{path}: the packing index of something else: {wrong}")
        if packing.tokens != len(tokens):
            raise ValueError(f"{path}: the packing index of {packing.tokens} tokens, not of these {len(tokens)}")
        starts = np.frombuffer(data, "<i8", pieces, HEADER.size + size)
        lengths = np.frombuffer(data, "<u4", pieces, HEADER.size + size + 8 * pieces)
        return cls(tokens, packing, starts, lengths, total)

    def check_tokenizer(self, found: str) -> None:
        """Raise ValueError unless the tokenizer of this digest made the tokens."""
        if self.packing.tokenizer != found:
            made = self.packing.tokenizer[:12] or "an unknown one"
            raise ValueError(
                f"tokenizer {found[:12]}: the data were tokenised with {made}; take that one, or pack again"
            )

    def pieces(self, row: int) -> tuple[Array, Array]:
        """Return where the pieces of a row begin, and their lengths. Each begins with a bos in the row."""
        piece = slice(self._first[row], self._first[row + 1])
        return self._starts[piece], self._lengths[piece]

    def row(self, index: int) -> NDArray[np.int64]:
        """Return a row, (row_len,)."""
        found: NDArray[np.int64] = self.rows(np.array([index]))[0]
        return found

    def rows(self, indices: Array) -> NDArray[np.int64]:
        """Return the rows of these numbers, (n, row_len). Raises IndexError for a number out of range."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {len(self)}")
        first = self._first[indices]
        piece = _ranges(first, self._first[indices + 1] - first)
        starts, lengths = self._starts[piece], self._lengths[piece].astype(np.int64)
        flat = self._tokens[_ranges(starts, lengths)].astype(np.int64)
        flat[np.cumsum(lengths) - lengths] = self.packing.bos
        return flat.reshape(len(indices), self.packing.row_len)


def _ranges(starts: Array, lengths: Array) -> NDArray[np.int64]:
    """Concatenate the ranges start, …, start + length - 1."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    ranges: NDArray[np.int64] = np.repeat(starts - (ends - lengths), lengths) + np.arange(total, dtype=np.int64)
    return ranges


def _documents(tokens: Array, bos: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the starts and lengths of the documents, many at a time."""
    if len(tokens) and int(tokens[0]) != bos:
        raise ValueError(f"the tokens begin with {int(tokens[0])}, not with bos {bos}: of another tokenizer?")
    begun = 0  # start of the document that has not ended yet
    for at in range(0, len(tokens), CHUNK):
        found = np.flatnonzero(tokens[at : at + CHUNK] == bos) + at
        edges = np.concatenate(([begun], found[found > begun]))
        yield edges[:-1].tolist(), np.diff(edges).tolist()
        begun = int(edges[-1])
    if len(tokens):
        yield [begun], [len(tokens) - begun]


class _Packer:
    """The buffer, sorted by length and then newest first, and the pieces placed so far."""

    def __init__(self, packing: Packing) -> None:
        self.starts, self.lengths = array("q"), array("I")  # int64, uint32
        self._row_len, self._room, self._keep = packing.row_len, packing.buffer, packing.crop == "keep"
        self._pad = packing.pad
        self._left = packing.row_len  # free tokens in the row
        self._serial = 0
        self._keys: list[int] = []  # the length, then a number that decreases with each document
        self._held: list[int] = []  # their starts

    def add(self, starts: list[int], lengths: list[int]) -> None:
        """Add documents, and fill rows while the buffer is full."""
        for start, length in zip(starts, lengths, strict=True):
            self._insert(start, length)
            while len(self._keys) >= self._room:
                self._take()

    def finish(self) -> None:
        """Place the rest of the buffer; pad or drop the last row."""
        while self._keys:
            self._take()
        missing = self._left % self._row_len
        if missing and self._pad:
            for _ in range(missing):
                self._place(0, 1)
        elif missing:
            short = self._row_len - missing
            while short:
                short -= self.lengths.pop()
                self.starts.pop()

    def _insert(self, start: int, length: int) -> None:
        self._serial += 1
        key = length * SERIALS + SERIALS - self._serial
        at = bisect_left(self._keys, key)
        self._keys.insert(at, key)
        self._held.insert(at, start)

    def _take(self) -> None:
        """Place the largest document that fits, or the head of the shortest; the oldest of equals."""
        if self._keep and self._left == self._row_len and self._keys[-1] // SERIALS > self._row_len:
            self._crop(len(self._keys) - 1)
            return
        at = bisect_left(self._keys, (self._left + 1) * SERIALS) - 1
        if at >= 0:
            length = self._keys.pop(at) // SERIALS
            self._place(self._held.pop(at), length)
        elif self._left == 1:  # only a bos, which costs no document
            self._place(0, 1)
        else:
            shortest = self._keys[0] // SERIALS
            self._crop(bisect_left(self._keys, (shortest + 1) * SERIALS) - 1)

    def _crop(self, at: int) -> None:
        """Fill the row with the head of a document; with crop="keep" the rest becomes a new one."""
        length, start, taken = self._keys.pop(at) // SERIALS, self._held.pop(at), self._left
        self._place(start, taken)
        if self._keep:
            self._insert(start + taken - 1, length - taken + 1)

    def _place(self, start: int, length: int) -> None:
        self.starts.append(start)
        self.lengths.append(length)
        self._left = self._left - length or self._row_len
