"""The token file that a task trains on, memory-mapped and named by its digest; and the order of an epoch.

    offset  bytes
         0      8  magic, "pilotok1"
         8      4  bytes of a token: 1, 2 or 4 (little-endian, unsigned)
        12      4  zero
        16      8  number of training tokens, n
        24      8  number of validation tokens, m
        32         n training tokens, then m validation tokens; nothing after them

The same tokens and split always make the same file, so every source of them gives the same digest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from pilot.common.files import replacing
from protocol import CONTEXT, BlobRef, Digest, Hasher, ProtocolError

Array = NDArray[Any]  # unsigned integers

MAGIC = b"pilotok1"
HEADER = struct.Struct("<8sIIQQ")
CHUNK = 16 << 20  # bytes hashed at a time


class Tokens:
    """An open token file. The arrays are views of the mapped file, so reading a batch reads only its pages."""

    def __init__(self, path: Path, raw: np.memmap[Any, Any], train: Array, validation: Array) -> None:
        self.path = path
        self.train = train  # (n,)
        self.validation = validation  # (m,)
        self._raw = raw

    @classmethod
    def open(cls, path: Path) -> Tokens:
        """Map the file. Raises ProtocolError (a ValueError) unless it is exactly a token file."""
        size = path.stat().st_size
        if size <= HEADER.size:
            raise ProtocolError(f"{path}: {size} bytes are no token file")
        raw: np.memmap[Any, Any] = np.memmap(path, dtype=np.uint8, mode="r")
        magic, width, zero, n, m = HEADER.unpack(raw[: HEADER.size].tobytes())
        if magic != MAGIC or width not in (1, 2, 4) or zero:
            raise ProtocolError(f"{path}: not a token file, or of another version")
        if size != HEADER.size + (n + m) * width:
            raise ProtocolError(f"{path}: damaged: {size} bytes for {n} + {m} tokens of {width} bytes")
        tokens = raw[HEADER.size :].view(f"<u{width}")
        return cls(path, raw, tokens[:n], tokens[n:])

    @property
    def buffer(self) -> memoryview:
        """Return the whole file with its header, as it is sent."""
        return self._raw.data

    @property
    def bytes(self) -> int:
        return int(self._raw.size)

    @cached_property
    def digest(self) -> Digest:
        hasher = Hasher("data")
        for start in range(0, self.bytes, CHUNK):
            hasher.update(self.buffer[start : start + CHUNK])
        return hasher.hexdigest()

    @cached_property
    def largest(self) -> int:
        """Return the largest token. Reads the whole file, once."""
        return max(int(part.max()) for part in (self.train, self.validation) if part.size)

    def ref(self) -> BlobRef:
        return BlobRef(kind="data", digest=self.digest, bytes=self.bytes)


def write(path: Path, train: Iterable[Array], validation: Iterable[Array], dtype: Any) -> None:
    """Write a token file atomically from chunks: those of training first, then, once they end, those of validation."""
    stored = np.dtype(dtype).newbyteorder("<")
    counts = [0, 0]
    with replacing(path) as file:
        file.seek(HEADER.size)
        for which, chunks in enumerate((train, validation)):
            for chunk in chunks:
                file.write(np.ascontiguousarray(chunk, dtype=stored).data)
                counts[which] += len(chunk)
        file.seek(0)
        file.write(HEADER.pack(MAGIC, stored.itemsize, 0, *counts))


def window_order(seed: int, epoch: int, windows: int) -> NDArray[np.int64]:
    """Return the order in which an epoch visits the windows, (windows,), a permutation of 0 … windows - 1.

    It is the stable argsort of 64-bit keys from blake3's output stream. No library's random number generator is
    involved, so it never differs between machines or releases.
    """
    stream = blake3(struct.pack("<QQ", seed, epoch), derive_key_context=f"{CONTEXT} window order")
    keys = np.frombuffer(stream.digest(length=8 * windows), dtype="<u8")
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
