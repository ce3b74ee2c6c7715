"""Keep the 64 largest magnitudes of each 4,096 values: their indices, and two bits for each value.

The tensors lie one after the other by name, each cut into chunks of 4,096. The last chunk of a tensor may be shorter:
of n values it keeps ceil(64 n / 4096). A kept value is sign x (base + step x code), with the chunk's own base and step
in bf16. The body, every part in the order of the chunks:

    base, step       all high bytes, then all low bytes, of each
    codes, signs     two planes of bits
    indices          12 planes of bits; they ascend within a chunk

A plane holds one bit of every number, eight to a byte: all the lowest bits, then all the next ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pilot.codec.packed import (
    CPU,
    FP32_MAX,
    Blocks,
    Bytes,
    Packed,
    Windows,
    check_scales,
    device_of,
    scale_bits,
    scale_bytes,
    widened,
)
from protocol import ProtocolError

if TYPE_CHECKING:
    from pilot.codec import Specs, Tensors

CHUNK = 4096
KEPT = 64  # entries kept of each chunk
VALUE_BITS = 2  # the code's, and the sign
INDEX_BITS = 12
ENCODE_ROWS = 64  # chunks at a time on the CPU: 1 MB as fp32
DECODE_ROWS = 1024
GPU_ROWS = 1 << 15
PIECE = 1 << 17  # values packed at a time on the CPU, a multiple of 8


class Layout:
    """The sizes that follow from the shapes."""

    def __init__(self, specs: Specs) -> None:
        self.blocks = Blocks(specs, CHUNK)
        self._ends = np.cumsum([0, *(-(-size * KEPT // CHUNK) for size in self.blocks.values)], dtype=np.int64)
        self.total = int(self._ends[-1])  # values kept

    def kept_before(self, chunk: int) -> int:
        """Return the number of values kept of all chunks before this one."""
        tensor = self.blocks.tensor_of(chunk)
        return int(self._ends[tensor]) + KEPT * (chunk - int(self.blocks.ends[tensor]))

    def sizes(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the number of values of each of chunks [start, stop)."""
        sizes = np.full(stop - start, CHUNK, np.int64)
        for run in self.blocks.runs(start, stop):
            sizes[run.stop - start - 1] = run.size - CHUNK * (run.stop - run.start - 1)
        return sizes


class Entries(NamedTuple):
    """The kept values of chunks [start, stop)."""

    start: int
    stop: int
    places: torch.Tensor  # [kept] int32, counted from the first value of chunk `start`
    values: torch.Tensor  # [kept] fp32


class TopK(Packed):
    def body_size(self, specs: Specs) -> int:
        layout = Layout(specs)
        return 4 * layout.blocks.number + planes_size(layout.total, VALUE_BITS) + planes_size(layout.total, INDEX_BITS)

    def encode_body(self, tensors: Mapping[str, torch.Tensor]) -> Bytes:
        layout = Layout({name: t.shape for name, t in tensors.items()})
        flat = {name: t.reshape(-1) for name, t in tensors.items()}
        device = device_of(flat.values())
        indices = torch.empty(layout.total, dtype=torch.int16, device=device)
        codes = torch.empty(layout.total, dtype=torch.uint8, device=device)
        scales = torch.empty(2, layout.blocks.number, dtype=torch.bfloat16, device=device)
        for start, stop, values in _equal_chunks(flat, layout.blocks):
            index = _largest(values, -(-values.shape[1] * KEPT // CHUNK))
            found = values.gather(1, index)
            here = slice(layout.kept_before(start), layout.kept_before(stop))
            base, step, code = _two_levels(found.abs())
            scales[0, start:stop], scales[1, start:stop] = base[:, 0], step[:, 0]
            codes[here] = code.add_(torch.signbit(found).to(torch.uint8) << VALUE_BITS - 1).view(-1)
            indices[here] = index.to(torch.int16).view(-1)
        parts = [scale_bytes(scales[0]), scale_bytes(scales[1]), pack_planes(codes, VALUE_BITS)]
        del codes
        return np.concatenate([*parts, pack_planes(indices, INDEX_BITS)])

    def check_body(self, body: Bytes, specs: Specs) -> float:
        layout, total = Layout(specs), 0.0
        number = layout.blocks.number
        for scales in (body[: 2 * number], body[2 * number : 4 * number]):
            check_scales(scale_bits(scales), FP32_MAX / 16)
        for entries in self._entries(body, layout, CPU, 0, number):
            total += float(entries.values.double().square_().sum())
        return math.sqrt(total)

    def add_body(self, body: Bytes, specs: Specs, windows: Windows, weight: float) -> None:
        layout, device = Layout(specs), device_of(window.values for window in windows.values())
        first, last = layout.blocks.covering(windows)
        for start, stop, places, values in self._entries(body, layout, device, first, last):
            if weight != 1.0:
                values.mul_(weight)
            before = layout.kept_before(start)
            for run in layout.blocks.runs(start, stop):
                begin, target = windows[run.name]
                low, high = layout.kept_before(run.start) - before, layout.kept_before(run.stop) - before
                at, found = places[low:high] + (run.offset - (run.start - start) * CHUNK - begin), values[low:high]
                if begin > run.offset or begin + len(target) < run.offset + run.size:  # only a part of the chunks
                    inside = (at >= 0) & (at < len(target))
                    at, found = at[inside], found[inside]
                target.index_add_(0, at, found)

    def _entries(self, body: Bytes, layout: Layout, device: torch.device, first: int, last: int) -> Iterator[Entries]:
        """Yield what chunks [first, last) keep. Raises ProtocolError for indices that do not ascend in their chunk."""
        number, total, parts, end = layout.blocks.number, layout.total, [], 0
        for size in (2 * number, 2 * number, planes_size(total, VALUE_BITS), planes_size(total, INDEX_BITS)):
            parts.append(body[end : end + size])
            end += size
        rows = DECODE_ROWS if device.type == "cpu" else max(last - first, 1)
        for start in range(first, last, rows):
            stop = min(start + rows, last)
            low, high = layout.kept_before(start), layout.kept_before(stop)
            sizes = torch.from_numpy(layout.sizes(start, stop)).to(device)
            kept = (sizes * KEPT + CHUNK - 1) // CHUNK
            codes = unpack_planes(parts[2], VALUE_BITS, low, high, device)
            found = unpack_planes(parts[3], INDEX_BITS, low, high, device)
            shift = torch.arange(0, (stop - start) * CHUNK, CHUNK, dtype=torch.int32, device=device)
            found += shift.repeat_interleave(kept, output_size=high - low)
            if bool((found.diff() <= 0).any()):
                raise ProtocolError(f"{self.name}: indices that do not ascend")
            if bool((found[kept.cumsum(0) - 1] - torch.arange(stop - start, device=device) * CHUNK >= sizes).any()):
                raise ProtocolError(f"{self.name}: an index beyond its chunk")
            base, step = (widened(scale_bits(part, start, stop)).to(device) for part in parts[:2])
            magnitude = (codes & (1 << VALUE_BITS - 1) - 1).to(torch.float32)
            magnitude.mul_(step.repeat_interleave(kept, output_size=high - low))
            magnitude.add_(base.repeat_interleave(kept, output_size=high - low))
            yield Entries(start, stop, found, magnitude.mul_(1 - 2 * (codes >> VALUE_BITS - 1)))


TOPK64 = TopK("topk64")


# --- the largest of a chunk -------------------------------------------------------------------------------------------


def _equal_chunks(flat: Tensors, blocks: Blocks) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield runs of chunks of one tensor and one size: first, end, [chunks, values] fp32."""
    for run in blocks.runs(0, blocks.number):
        whole, last = divmod(run.size, CHUNK)
        rows = ENCODE_ROWS if flat[run.name].device.type == "cpu" else GPU_ROWS
        for first in range(0, whole, rows):
            stop = min(first + rows, whole)
            yield (
                run.start + first,
                run.start + stop,
                flat[run.name][first * CHUNK : stop * CHUNK].view(-1, CHUNK).float(),
            )
        if last:
            yield run.stop - 1, run.stop, flat[run.name][whole * CHUNK :].view(1, last).float()


def _largest(values: torch.Tensor, kept: int) -> torch.Tensor:
    """Return ascending indices [rows, kept] of the largest magnitudes of [rows, n] fp32; of equal ones the first."""
    rows, size = values.shape
    if values.device.type != "cpu":
        return values.abs().topk(kept, 1, sorted=False).indices.sort(1).values
    magnitude = values.numpy().view(np.int32) & np.int32(0x7FFFFFFF)  # ordered as the numbers are, NaN above all
    partitioned = np.partition(magnitude, size - kept, axis=1)
    least = partitioned[:, size - kept, None]
    chosen = magnitude >= least
    found = np.flatnonzero(chosen)
    if len(found) != rows * kept:  # several values have the smallest magnitude that is kept
        above = magnitude > least
        equal = magnitude == least
        spare = kept - above.sum(1, keepdims=True)
        found = np.flatnonzero(above | (equal & (equal.cumsum(1, dtype=np.int32) <= spare)))
    return torch.from_numpy(found.reshape(rows, kept) - np.arange(0, rows * size, size)[:, None])


def _two_levels(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return base and step [rows, 1] and codes [rows, kept]: the means of the magnitudes below and above the mean."""
    mean = magnitude.mean(1, keepdim=True)
    high = magnitude > mean
    above, number = (magnitude * high).sum(1, keepdim=True), high.sum(1, keepdim=True)
    rest = magnitude.shape[1] - number  # 0 for equal values if the mean was rounded down
    below = ((magnitude * ~high).sum(1, keepdim=True) / rest.clamp(min=1)).where(rest > 0, mean)
    step = (above / number - below).masked_fill_((number == 0) | (rest == 0), 0.0)
    return below, step.clamp_(min=0.0), high.to(torch.uint8)


# --- planes of bits --------------------------------------------------------------------------------------------------


def planes_size(count: int, bits: int) -> int:
    return bits * -(-count // 8)


def pack_planes(values: torch.Tensor, bits: int) -> Bytes:
    """Pack [count] integers below 2^bits, on any device, into bits x ceil(count / 8) bytes."""
    planes = np.empty((bits, -(-len(values) // 8)), np.uint8)
    if values.device.type != "cpu":
        values = torch.nn.functional.pad(values.to(torch.int32), (0, -len(values) % 8)).view(-1, 8)
        places = torch.arange(7, -1, -1, device=values.device)
        packed = [((values >> bit & 1) << places).sum(1).to(torch.uint8) for bit in range(bits)]
        planes[:] = torch.stack(packed).cpu().numpy()
        return planes.reshape(-1)
    for start in range(0, len(values), PIECE):
        piece = values[start : start + PIECE].numpy()
        for bit in range(bits):
            packed_bits = np.packbits((piece & (1 << bit)) != 0)
            planes[bit, start // 8 : start // 8 + len(packed_bits)] = packed_bits
    return planes.reshape(-1)


def unpack_planes(planes: Bytes, bits: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Return values `start`, …, `stop` - 1 of those packed in `planes`, int32 on the device."""
    rows = planes.reshape(bits, -1)[:, start // 8 : -(-stop // 8)]
    here = slice(start % 8, start % 8 + stop - start)
    if device.type != "cpu":
        packed = torch.from_numpy(np.ascontiguousarray(rows)).to(device).to(torch.int32)
        places = torch.arange(7, -1, -1, device=device)
        ones = (packed[:, :, None] >> places & 1).view(bits, -1)[:, here]
        return (ones << torch.arange(bits, device=device)[:, None]).sum(0).to(torch.int32)
    found = np.zeros(stop - start, np.int16)
    for bit, row in enumerate(rows):
        found |= np.unpackbits(row)[here].astype(np.int16) << np.int16(bit)
    return torch.from_numpy(found).to(torch.int32)
