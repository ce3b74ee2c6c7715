"""The K largest magnitudes of each 4,096 values: where they are, and each at two or four bits.

A tensor's last chunk may be short: of n values it keeps ceil(K n / 4096). A kept value is sign x (base + step x code):
base and step are the chunk's own, in bf16. The body, every part in the order of the chunks:

    base, step       high bytes, low bytes, of each
    codes, signs     planes of bits (pilot/codec/bitplanes.py)
    indices          12 planes; or, to be entropy-coded, Rice's code of the gaps between them:
                     planes of the low bits, then what is left in unary, that many zeros and a one, in one bit stream

Indices ascend within a chunk, so of those of a gap none can be out of order, and only the last can be out of range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pilot.codec import CHUNK
from pilot.codec.bitplanes import pack_planes, planes_size, unpack_planes
from pilot.codec.packed import Blocks, Bytes, Packed, check_scales, scale_bits, scale_bytes, widened
from protocol import ProtocolError

if TYPE_CHECKING:
    from pilot.codec import Specs, Tensors

ROWS = 64  # chunks at a time on the CPU: 1 MB as fp32
STRETCH = 1024  # chunks that are decoded at a time
GPU_ROWS = 1 << 15
INDEX_BITS = 12
LARGEST = float(torch.finfo(torch.float32).max)

Quantity = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Entries = tuple[int, int, torch.Tensor, torch.Tensor]  # chunks [start, stop), places from the first one's on, values


class Layout(NamedTuple):
    """What follows from the shapes."""

    blocks: Blocks
    kept: npt.NDArray[np.int64]  # values of each chunk
    sizes: npt.NDArray[np.int64]  # values that each chunk has
    starts: npt.NDArray[np.int64]  # the first kept value of each chunk, and the number of all

    @property
    def total(self) -> int:
        return int(self.starts[-1])


class TopK(Packed):
    def __init__(self, name: str, kept: int, bits: int, entropy: bool) -> None:
        super().__init__(name, entropy)
        self.kept, self.bits = kept, bits
        self.rice = int(math.log2(math.log(2) * (CHUNK - kept) / kept))  # low bits of a gap: best where all are random

    def layout(self, specs: Specs) -> Layout:
        blocks = Blocks(specs, CHUNK)
        sizes = blocks.counts()
        kept = -(-self.kept * sizes // CHUNK)
        return Layout(blocks, kept, sizes, np.concatenate([[0], np.cumsum(kept)]))

    def sizes(self, specs: Specs) -> tuple[int, int]:
        layout = self.layout(specs)
        fixed = 4 * layout.blocks.number + planes_size(layout.total, self.bits)
        if not self.entropy:
            fixed += planes_size(layout.total, INDEX_BITS)
            return fixed, fixed
        fixed += planes_size(layout.total, self.rice)
        zeros = int((layout.sizes - layout.kept >> self.rice).sum())
        return fixed + -(-layout.total // 8), fixed + -(-(layout.total + zeros) // 8)

    # --- encoding -----------------------------------------------------------------------------------------------------

    def body(self, tensors: Mapping[str, torch.Tensor]) -> Bytes:
        layout = self.layout({name: t.shape for name, t in tensors.items()})
        flat = {name: t.reshape(-1) for name, t in tensors.items()}
        device = next(iter(flat.values())).device if flat else torch.device("cpu")
        indices = torch.empty(layout.total, dtype=torch.int16, device=device)
        codes = torch.empty(layout.total, dtype=torch.uint8, device=device)
        scales = torch.empty(2, layout.blocks.number, dtype=torch.bfloat16, device=device)
        for start, stop, values in _stretches(flat, layout.blocks):
            index = _largest(values, int(layout.kept[start]))
            found = values.gather(1, index)
            here = slice(int(layout.starts[start]), int(layout.starts[stop]))
            base, step, code = _two_levels(found.abs()) if self.bits == 2 else _eight_levels(found.abs())
            scales[0, start:stop], scales[1, start:stop] = base[:, 0], step[:, 0]
            codes[here] = code.add_(torch.signbit(found).to(torch.uint8) << self.bits - 1).view(-1)
            indices[here] = index.to(torch.int16).view(-1)
        parts = [scale_bytes(scales[0]), scale_bytes(scales[1]), pack_planes(codes, self.bits)]
        del codes
        parts += self._rice(indices, layout) if self.entropy else [pack_planes(indices, INDEX_BITS)]
        return np.concatenate(parts)

    def _rice(self, indices: torch.Tensor, layout: Layout) -> list[Bytes]:
        gaps = indices.diff(prepend=indices.new_zeros(1)).sub_(1)
        first = torch.from_numpy(layout.starts[:-1][layout.kept > 0]).to(indices.device)
        gaps[first] = indices[first]
        ends = (gaps >> self.rice).add_(1).cumsum(0, dtype=torch.int32 if len(gaps) < 1 << 24 else torch.int64).sub_(1)
        unary = torch.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=torch.uint8, device=indices.device)
        unary[ends] = 1
        return [pack_planes(gaps, self.rice), pack_planes(unary, 1)]

    # --- decoding -----------------------------------------------------------------------------------------------------

    def inspect(self, body: Bytes, specs: Specs) -> float:
        layout, total = self.layout(specs), 0.0
        check_scales(scale_bits(body[: 2 * layout.blocks.number]), LARGEST / 16)
        check_scales(scale_bits(body[2 * layout.blocks.number : 4 * layout.blocks.number]), LARGEST / 16)
        for _, _, _, values in self._entries(body, layout, torch.device("cpu")):
            total += float(values.double().square_().sum())
        return math.sqrt(total)

    def accumulate(self, body: Bytes, into: Tensors, weight: float) -> None:
        layout = self.layout({name: t.shape for name, t in into.items()})
        flat = {name: t.view(-1) for name, t in into.items()}
        device = next(iter(flat.values())).device if flat else torch.device("cpu")
        for start, stop, positions, values in self._entries(body, layout, device):
            if weight != 1.0:
                values.mul_(weight)
            for run in layout.blocks.runs(start, stop):
                low, high = (int(layout.starts[i] - layout.starts[start]) for i in (run.start, run.stop))
                at = positions[low:high] + (run.offset - (run.start - start) * CHUNK)
                flat[run.name].index_add_(0, at, values[low:high])

    def _entries(self, body: Bytes, layout: Layout, device: torch.device) -> Iterator[Entries]:
        """Raises ProtocolError for indices that are not of their chunk, do not ascend, or are too few or too many."""
        number, parts, end = layout.blocks.number, [], 0
        index_bits = self.rice if self.entropy else INDEX_BITS
        for size in (
            2 * number,
            2 * number,
            planes_size(layout.total, self.bits),
            planes_size(layout.total, index_bits),
        ):
            parts.append(body[end : end + size])
            end += size
        base, step = (widened(scale_bits(part)).to(device) for part in parts[:2])
        unary = Unary(body[end:])
        for start in range(0, number, rows := STRETCH if device.type == "cpu" else number):
            stop = min(start + rows, number)
            low, high = int(layout.starts[start]), int(layout.starts[stop])
            kept = torch.from_numpy(layout.kept[start:stop]).to(device)
            codes = unpack_planes(parts[2], self.bits, low, high, device)
            found = unpack_planes(parts[3], index_bits, low, high, device)
            ends = kept.cumsum(0) - 1
            shift = torch.arange(0, (stop - start) * CHUNK, CHUNK, dtype=torch.int32, device=device)
            if self.entropy:
                zeros = int((layout.sizes[start:stop] - layout.kept[start:stop] >> self.rice).sum())
                found += (unary.take(high - low, zeros, device) << self.rice) + 1
                found = found.cumsum(0, dtype=torch.int32)
                shift[1:] -= found[ends[:-1]]
                shift -= 1
            found += shift.repeat_interleave(kept, output_size=high - low)
            sizes = torch.from_numpy(layout.sizes[start:stop]).to(device)
            if bool((found.diff() <= 0).any()):
                raise ProtocolError(f"{self.name}: indices that do not ascend")
            if bool((found[ends] - torch.arange(stop - start, device=device) * CHUNK >= sizes).any()):
                raise ProtocolError(f"{self.name}: an index beyond its chunk")
            magnitude = (codes & (1 << self.bits - 1) - 1).to(torch.float32)
            magnitude.mul_(step[start:stop].repeat_interleave(kept, output_size=high - low))
            magnitude.add_(base[start:stop].repeat_interleave(kept, output_size=high - low))
            yield start, stop, found, magnitude.mul_(1 - 2 * (codes >> self.bits - 1))
        if not unary.done:
            raise ProtocolError(f"{self.name}: bits after the last index")


class Unary:
    """A stream of zeros and ones, from which numbers of zeros before each one are taken."""

    def __init__(self, stream: Bytes) -> None:
        self.stream, self.at = stream, 0  # bits

    def take(self, count: int, zeros: int, device: torch.device) -> torch.Tensor:
        """The next `count` numbers, int32, together `zeros` at most. ProtocolError where there are none such."""
        window = self.stream[self.at // 8 : -(-(self.at + count + zeros) // 8)]
        bits = unpack_planes(window, 1, self.at % 8, 8 * len(window), device)
        ones = bits.nonzero()[:count, 0]
        if len(ones) < count:
            raise ProtocolError("indices that end too early, or beyond their chunks")
        self.at += int(ones[-1]) + 1
        return ones.diff(prepend=ones.new_full((1,), -1)).sub_(1).to(torch.int32)

    @property
    def done(self) -> bool:
        """Nothing is left but what fills the last byte, which is zeros."""
        whole, used = divmod(self.at, 8)
        rest = self.stream[whole:].tobytes()
        return rest == b"" if not used else len(rest) == 1 and not rest[0] << used & 0xFF


# --- the largest of a chunk -------------------------------------------------------------------------------------------


def _stretches(flat: Tensors, blocks: Blocks) -> Iterator[tuple[int, int, torch.Tensor]]:
    """First chunk, the one after the last, and [chunks, values] fp32: all of one tensor and of one size."""
    for run in blocks.runs(0, blocks.number):
        whole, last = divmod(run.size, CHUNK)
        rows = ROWS if flat[run.name].device.type == "cpu" else GPU_ROWS
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
    """[rows, n] fp32 -> [rows, kept] ascending indices of the largest magnitudes; of equal ones the first."""
    rows, size = values.shape
    if values.device.type != "cpu":
        return values.abs().topk(kept, 1, sorted=False).indices.sort(1).values
    magnitude = values.numpy().view(np.int32) & np.int32(0x7FFFFFFF)  # ordered as the numbers are, NaN above all
    partitioned = np.partition(magnitude, size - kept, axis=1)
    least = partitioned[:, size - kept, None]
    chosen = magnitude >= least
    found = np.flatnonzero(chosen)
    if len(found) != rows * kept:  # more than one has the least magnitude that is kept
        above = magnitude > least
        equal = magnitude == least
        spare = kept - above.sum(1, keepdims=True)
        found = np.flatnonzero(above | (equal & (equal.cumsum(1, dtype=np.int32) <= spare)))
    return torch.from_numpy(found.reshape(rows, kept) - np.arange(0, rows * size, size)[:, None])


def _two_levels(magnitude: torch.Tensor) -> Quantity:
    """[rows, kept] -> base and step [rows, 1], codes: the means of those below and above the mean."""
    mean = magnitude.mean(1, keepdim=True)
    high = magnitude > mean
    above, number = (magnitude * high).sum(1, keepdim=True), high.sum(1, keepdim=True)
    rest = magnitude.shape[1] - number  # of equal ones none, where the mean was rounded down
    below = ((magnitude * ~high).sum(1, keepdim=True) / rest.clamp(min=1)).where(rest > 0, mean)
    step = (above / number - below).masked_fill_((number == 0) | (rest == 0), 0.0)
    return below, step.clamp_(min=0.0), high.to(torch.uint8)


def _eight_levels(magnitude: torch.Tensor) -> Quantity:
    """[rows, kept] -> base and step [rows, 1], codes: from the least to the largest in equal steps."""
    least, largest = magnitude.aminmax(dim=1, keepdim=True)
    step = (largest - least) / 7
    return least, step, ((magnitude - least) / step.masked_fill(step == 0, 1.0)).round_().clamp_(0, 7).to(torch.uint8)
