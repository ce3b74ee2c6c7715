"""Share what the compressing codecs have in common: the header, blocks of values, and bf16 scales.

0   8 bytes   magic
8  24 bytes   the codec's name, padded with zeros
32  …         the body, whose layout and size follow from the tensors' names and shapes alone
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
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
CPU = torch.device("cpu")
FP32_MAX = float(torch.finfo(torch.float32).max)


class Window(NamedTuple):
    """A part of a tensor that decoded values are added to."""

    first: int  # the place in the tensor of `values[0]`
    values: torch.Tensor  # [n] fp32, contiguous


Windows = Mapping[str, Window]


class Packed(ABC):
    """A codec whose payload is a header and a body. Subclasses say what the body is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._header = MAGIC + name.encode().ljust(HEADER - len(MAGIC), b"\0")

    @abstractmethod
    def body_size(self, specs: Specs) -> int:
        """Return the bytes of the body of such tensors."""

    @abstractmethod
    def encode_body(self, tensors: Mapping[str, torch.Tensor]) -> Bytes: ...

    @abstractmethod
    def check_body(self, body: Bytes, specs: Specs) -> float:
        """Return the Euclidean norm. Raises ProtocolError for a body that does not encode such tensors."""

    @abstractmethod
    def add_body(self, body: Bytes, specs: Specs, windows: Windows, weight: float) -> None:
        """Add weight * decoded values to the windows, which cover one range of coordinates without gaps."""

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> memoryview:
        body = self.encode_body({name: t.detach() for name, t in tensors.items()})
        payload = np.empty(HEADER + len(body), np.uint8)
        payload[:HEADER] = np.frombuffer(self._header, np.uint8)
        payload[HEADER:] = body
        return payload.data

    def largest(self, specs: Specs) -> int:
        return HEADER + self.body_size(specs)

    def decode(self, payload: Buffer, specs: Specs) -> Tensors:
        body = self._open(payload, specs)
        self.check_body(body, specs)
        into = {name: torch.zeros(shape) for name, shape in specs.items()}
        self.add_body(body, specs, {name: Window(0, t.view(-1)) for name, t in into.items()}, 1.0)
        return into

    def check(self, payload: Buffer, specs: Specs) -> float:
        return self.check_body(self._open(payload, specs), specs)

    def add(self, payload: Buffer, into: Tensors, weight: float = 1.0) -> None:
        specs = {name: t.shape for name, t in into.items()}
        windows = {name: Window(0, t.detach().view(-1)) for name, t in into.items()}
        self.add_body(self._open(payload, specs), specs, windows, weight)

    def read(self, payload: Buffer, specs: Specs, start: int, stop: int) -> torch.Tensor:
        pieces, body = pieces_of(specs, start, stop), self._open(payload, specs)
        out = torch.zeros(stop - start)
        windows = {p.name: Window(p.start, out[p.at : p.at + p.stop - p.start]) for p in pieces}
        self.add_body(body, specs, windows, 1.0)
        return out

    def _open(self, payload: Buffer, specs: Specs) -> Bytes:
        """Return the body, with its length checked."""
        data = memoryview(payload).cast("B")
        if data[:HEADER] != self._header:
            raise ProtocolError(f"not a {self.name} payload: it begins with {bytes(data[:HEADER])!r}")
        size = self.body_size(specs)
        if len(data) != HEADER + size:
            raise ProtocolError(f"{self.name}: {len(data) - HEADER} bytes where these tensors take {size}")
        return np.frombuffer(data[HEADER:], np.uint8)


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    return next((t.device for t in tensors), CPU)


# --- blocks of the flat gradient --------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """The part of a block of coordinates that lies in one tensor: values `start`, …, `stop` - 1 of tensor `name`."""

    name: str
    start: int
    stop: int
    at: int  # offset of the part in the block


def pieces_of(specs: Specs, start: int, stop: int) -> list[Piece]:
    """Return coordinates [start, stop) of all tensors, concatenated in the order of their names, tensor by tensor.

    Raises IndexError for a block that does not lie in them.
    """
    pieces, first = [], 0
    for name in sorted(specs):
        end = first + math.prod(specs[name])
        low, high = max(start, first), min(stop, end)
        if low < high:
            pieces.append(Piece(name, low - first, high - first, low - start))
        first = end
    if not 0 <= start <= stop <= first:
        raise IndexError(f"coordinates [{start}, {stop}) of {first}")
    return pieces


# --- tensors as one sequence of padded blocks -------------------------------------------------------------------------


class Run(NamedTuple):
    """Whole blocks of one tensor: blocks `start`, …, `stop` - 1 of the sequence begin at `offset` of tensor `name`."""

    name: str
    start: int
    stop: int
    offset: int
    size: int  # values; fewer than the blocks hold if the tensor ends within the last one


class Blocks:
    """The tensors one after the other by name, each padded to whole blocks of `width` values."""

    def __init__(self, specs: Specs, width: int) -> None:
        self.width, self.names = width, sorted(specs)
        self.values = [math.prod(specs[name]) for name in self.names]
        self.ends = np.cumsum([0, *(-(-size // width) for size in self.values)], dtype=np.int64)
        self.number = int(self.ends[-1])

    def counts(self) -> npt.NDArray[np.int64]:
        """Return the values of each block, [number]."""
        counts = np.full(self.number, self.width, np.int64)
        for end, size in zip(self.ends[1:], self.values, strict=True):
            if size % self.width:
                counts[end - 1] = size % self.width
        return counts

    def tensor_of(self, block: int) -> int:
        """Return the place in `names` of the tensor that a block belongs to."""
        return int(np.searchsorted(self.ends, block, side="right")) - 1

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """Yield blocks `start`, …, `stop` - 1, a tensor at a time."""
        at = self.tensor_of(start)
        while start < min(stop, self.number):
            end = min(stop, int(self.ends[at + 1]))
            offset = (start - int(self.ends[at])) * self.width
            if end > start:
                size = min((end - start) * self.width, self.values[at] - offset)
                yield Run(self.names[at], start, end, offset, size)
            start, at = end, at + 1

    def covering(self, windows: Windows) -> tuple[int, int]:
        """Return the blocks [first, stop) that hold the values of the windows."""
        if not windows:
            return 0, 0
        first, last = min(windows), max(windows)
        end = windows[last].first + len(windows[last].values)
        return (
            int(self.ends[self.names.index(first)]) + windows[first].first // self.width,
            int(self.ends[self.names.index(last)]) - (-end // self.width),
        )

    def add(self, start: int, values: torch.Tensor, windows: Windows) -> None:
        """Add the values of the blocks from `start` on, [blocks, width], to the windows."""
        flat = values.view(-1)
        for run in self.runs(start, start + len(values)):
            first, target = windows[run.name]
            low, high = max(run.offset, first), min(run.offset + run.size, first + len(target))
            at = (run.start - start) * self.width + low - run.offset
            target[low - first : high - first].add_(flat[at : at + high - low])


# --- scales -----------------------------------------------------------------------------------------------------------


def scale_bytes(scales: torch.Tensor) -> Bytes:
    """Return [number] bf16 as all high bytes, then all low bytes."""
    pairs = scales.cpu().view(torch.uint8).numpy().reshape(-1, 2)
    return np.ascontiguousarray(pairs.T[::-1]).reshape(-1)


def scale_bits(part: Bytes, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint16]:
    """Return the bits of scales [start, stop) of the bf16 values from which `scale_bytes` made `part`."""
    high, low = part.reshape(2, -1)[:, start:stop]
    bits: npt.NDArray[np.uint16] = (high.astype(np.uint16) << np.uint16(8)) | low
    return bits


def widened(bits: npt.NDArray[np.uint16]) -> torch.Tensor:
    """Return bf16 bits as fp32 values on the CPU."""
    return torch.from_numpy((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def check_scales(bits: npt.NDArray[np.uint16], limit: float) -> None:
    """Raise ProtocolError unless each scale is 0 or positive and at most `limit`: else a value could be infinite."""
    if not len(bits) or int(bits.max()) <= int(np.float32(limit).view(np.uint32)) >> 16:
        return
    if (bits & 0x7FFF >= 0x7F80).any():
        raise ProtocolError("a scale of NaN or infinity", Fault.NONFINITE)
    if (bits >= 0x8000).any():
        raise ProtocolError("a negative scale")
    raise ProtocolError(f"a scale beyond {limit:.3g}, which would decode to infinity", Fault.NONFINITE)
