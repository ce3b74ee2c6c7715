"""What the compressing codecs share: a payload is a header and a body, and the body may be deflated.

    0   8 bytes   magic
    8  23 bytes   the codec's name, padded with zeros
   31   1 byte    1: the body is a raw deflate stream; 0: it is there as it is
   32  …          the body, whose layout and size follow from the tensors' names and shapes alone (or nearly)

The stream is Huffman-coded only: it has no window to search, so it is fast, and within 1 or 2 % of the entropy. A body
that it would not shrink stays as it is, so a payload is never longer than header and body.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Buffer

from protocol import Fault, ProtocolError

if TYPE_CHECKING:
    from pilot.codec import Specs, Tensors

Bytes = npt.NDArray[np.uint8]

MAGIC = b"pilot/q1"
HEADER = 32
PIECE = 1 << 16  # bytes that go into zlib at a time


class Packed(ABC):
    """Header, deflation, and the tensors one after the other by name; what a body is, the heirs say."""

    def __init__(self, name: str, entropy: bool) -> None:
        self.name, self.entropy = name, entropy

    @abstractmethod
    def body(self, tensors: Mapping[str, torch.Tensor]) -> Bytes: ...

    @abstractmethod
    def sizes(self, specs: Specs) -> tuple[int, int]:
        """The least and the most bytes of a body of such tensors."""

    @abstractmethod
    def inspect(self, body: Bytes, specs: Specs) -> float:
        """Raises ProtocolError for a body that is not one of such tensors; else their Euclidean norm."""

    @abstractmethod
    def accumulate(self, body: Bytes, into: Tensors, weight: float) -> None:
        """into[name] += weight * decoded."""

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> memoryview:
        body = self.body({name: t.detach() for name, t in tensors.items()})
        deflated = _deflate(body) if self.entropy else None
        chosen = body if deflated is None or len(deflated) >= len(body) else np.frombuffer(deflated, np.uint8)
        payload = np.empty(HEADER + len(chosen), np.uint8)
        payload[:HEADER] = np.frombuffer(self._header(chosen is not body), np.uint8)
        payload[HEADER:] = chosen
        return payload.data

    def largest(self, specs: Specs) -> int:
        return HEADER + self.sizes(specs)[1]

    def decode(self, payload: Buffer, specs: Specs) -> Tensors:
        body = self._open(payload, specs)
        self.inspect(body, specs)
        into = {name: torch.zeros(shape) for name, shape in specs.items()}
        self.accumulate(body, into, 1.0)
        return into

    def check(self, payload: Buffer, specs: Specs) -> float:
        return self.inspect(self._open(payload, specs), specs)

    def add(self, payload: Buffer, into: Tensors, weight: float = 1.0) -> None:
        body = self._open(payload, {name: t.shape for name, t in into.items()})
        self.accumulate(body, {name: t.detach() for name, t in into.items()}, weight)

    def _header(self, deflated: bool) -> bytes:
        return MAGIC + self.name.encode().ljust(HEADER - len(MAGIC) - 1, b"\0") + bytes([deflated])

    def _open(self, payload: Buffer, specs: Specs) -> Bytes:
        """The body, inflated into no more memory than a body of such tensors can take."""
        data = memoryview(payload).cast("B")
        least, most = self.sizes(specs)
        deflated = self.entropy and data[:HEADER] == self._header(True)
        if not deflated and data[:HEADER] != self._header(False):
            raise ProtocolError(f"no {self.name} payload: it begins with {bytes(data[:HEADER])!r}")
        body = _inflate(data[HEADER:], most) if deflated else np.frombuffer(data[HEADER:], np.uint8)
        if not least <= len(body) <= most:
            expected = f"{most}" if least == most else f"{least} to {most}"
            raise ProtocolError(f"{self.name}: {len(body)} bytes where these tensors take {expected}")
        return body


def _deflate(body: Bytes) -> bytes:
    stream = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return stream.compress(body.data) + stream.flush()


def _inflate(data: memoryview, most: int) -> Bytes:
    """Raises ProtocolError for what is no whole stream, is followed by anything, or would be more than `most` bytes."""
    stream, out, end = zlib.decompressobj(-15), np.empty(most, np.uint8), 0
    try:
        for start in range(0, len(data), PIECE):
            left: Buffer = data[start : start + PIECE]
            while not stream.eof and (piece := stream.decompress(left, most - end + 1)):
                if end + len(piece) > most:
                    raise ProtocolError(f"a stream that inflates beyond the {most} bytes that these tensors take")
                out[end : end + len(piece)] = np.frombuffer(piece, np.uint8)
                end, left = end + len(piece), stream.unconsumed_tail
            if stream.eof and (stream.unused_data or start + PIECE < len(data)):
                raise ProtocolError("bytes after the end of the deflate stream")
    except zlib.error as error:
        raise ProtocolError(f"no deflate stream: {error}") from None
    if not stream.eof:
        raise ProtocolError("a deflate stream that does not end")
    return out[:end]


# --- tensors as one sequence of blocks --------------------------------------------------------------------------------


class Run(NamedTuple):
    """Whole blocks of one tensor: blocks `start`, …, `stop` - 1 of the sequence begin at `offset` of tensor `name`."""

    name: str
    start: int
    stop: int
    offset: int
    size: int  # values, fewer than the blocks hold where the tensor ends within the last one


class Blocks:
    """The tensors one after the other by name, each padded to whole blocks of `width` values."""

    def __init__(self, specs: Specs, width: int) -> None:
        self.width, self.names = width, sorted(specs)
        self.values = [math.prod(specs[name]) for name in self.names]
        self.ends = np.cumsum([0, *(-(-size // width) for size in self.values)], dtype=np.int64)
        self.number = int(self.ends[-1])

    def counts(self) -> npt.NDArray[np.int64]:
        """[number] values of each block."""
        counts = np.full(self.number, self.width, np.int64)
        for end, size in zip(self.ends[1:], self.values, strict=True):
            if size % self.width:
                counts[end - 1] = size % self.width
        return counts

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """Blocks `start`, …, `stop` - 1, a tensor at a time."""
        at = int(np.searchsorted(self.ends, start, side="right")) - 1
        while start < min(stop, self.number):
            end = min(stop, int(self.ends[at + 1]))
            offset = (start - int(self.ends[at])) * self.width
            if end > start:
                size = min((end - start) * self.width, self.values[at] - offset)
                yield Run(self.names[at], start, end, offset, size)
            start, at = end, at + 1


# --- scales -----------------------------------------------------------------------------------------------------------


def scale_bytes(scales: torch.Tensor) -> Bytes:
    """[number] bf16 -> all high bytes, then all low ones: the high ones are alike, which the entropy coder uses."""
    pairs = scales.cpu().view(torch.uint8).numpy().reshape(-1, 2)
    return np.ascontiguousarray(pairs.T[::-1]).reshape(-1)


def scale_bits(part: Bytes) -> npt.NDArray[np.uint16]:
    """The bits of the bf16 that `scale_bytes` made `part` of."""
    high, low = part.reshape(2, -1)
    return (high.astype(np.uint16) << np.uint16(8)) | low


def widened(bits: npt.NDArray[np.uint16]) -> torch.Tensor:
    """As fp32, on the CPU."""
    return torch.from_numpy((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def check_scales(bits: npt.NDArray[np.uint16], limit: float) -> None:
    """Raises ProtocolError unless each is 0 or positive, and at most `limit`, lest it decode to infinity."""
    if not len(bits) or int(bits.max()) <= int(np.float32(limit).view(np.uint32)) >> 16:
        return
    if (bits & 0x7FFF >= 0x7F80).any():
        raise ProtocolError("a scale of NaN or infinity", Fault.NONFINITE)
    if (bits >= 0x8000).any():
        raise ProtocolError("a negative scale")
    raise ProtocolError(f"a scale beyond {limit:.3g}, which would decode to infinity", Fault.NONFINITE)
