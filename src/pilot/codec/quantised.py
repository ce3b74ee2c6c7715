"""A few bits a parameter: in blocks of 128 values, each with a scale, code x scale in fp32.

The body: the scales as bf16 (all high bytes, then all low ones, for the entropy coder), then the codes of the blocks as
digits of bytes. With P digits to a byte and H = ceil(blocks / P), row j of the H rows of 128 bytes holds, from the
lowest digit up, blocks j, H + j, 2H + j, …: each step of packing and unpacking is on contiguous memory.

Scales are bf16, not fp16: the mean gradient of a large batch has blocks below 6e-8, where fp16 ends. A block beyond
1e19 may have a norm that fp32 cannot hold: where a scale follows from that, the payload is refused as not finite.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from pilot.codec.packed import Blocks, Bytes, Packed, check_scales, scale_bits, scale_bytes, widened
from protocol import ProtocolError

if TYPE_CHECKING:
    from pilot.codec import Specs, Tensors

WIDTH = 128  # values of a block
ROWS = 2048  # blocks at a time on the CPU: 1 MB as fp32, so a chunk stays in the caches
GPU_ROWS = 1 << 17
LARGEST = float(torch.finfo(torch.float32).max)


class Quantised(Packed):
    """`quantise` and `levels` say what the codes are; here is where they lie."""

    base: ClassVar[int]  # digits are 0 … base - 1
    digits: ClassVar[int]  # of a byte
    top: ClassVar[int]  # the largest magnitude of a level

    @abstractmethod
    def quantise(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, 128] fp32, zeros after the first `count` [rows, 1] -> scales [rows, 1] fp32, digits int8."""

    @abstractmethod
    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        """uint8 -> int8."""

    def sizes(self, specs: Specs) -> tuple[int, int]:
        blocks = Blocks(specs, WIDTH).number
        size = 2 * blocks + WIDTH * -(-blocks // self.digits)
        return size, size

    def body(self, tensors: Mapping[str, torch.Tensor]) -> Bytes:
        blocks = Blocks({name: t.shape for name, t in tensors.items()}, WIDTH)
        flat = {name: t.reshape(-1) for name, t in tensors.items()}
        device = next(iter(flat.values())).device if flat else torch.device("cpu")
        height = -(-blocks.number // self.digits)
        scales = torch.zeros(height * self.digits, dtype=torch.bfloat16, device=device)
        counts = torch.ones(len(scales), 1, device=device)
        counts[: blocks.number, 0] = torch.from_numpy(blocks.counts()).to(device)
        body = np.empty(2 * blocks.number + WIDTH * height, np.uint8)
        packed = torch.from_numpy(body[2 * blocks.number :]).view(-1, WIDTH)
        for low, high in chunks(height, device):
            row = torch.zeros(high - low, WIDTH, dtype=torch.uint8, device=device)
            for plane in reversed(range(self.digits)):
                here = slice(plane * height + low, plane * height + high)
                scale, digits = self.quantise(gather(flat, blocks, here.start, here.stop, device), counts[here])
                scales[here] = scale[:, 0]
                row.mul_(self.base % 256).add_(digits.view(torch.uint8))
            packed[low:high] = row
        body[: 2 * blocks.number] = scale_bytes(scales[: blocks.number])
        return body

    def inspect(self, body: Bytes, specs: Specs) -> float:
        blocks = Blocks(specs, WIDTH)
        bits = scale_bits(body[: 2 * blocks.number])
        check_scales(bits, LARGEST / self.top)
        scales = widened(bits).double()
        rows = body[2 * blocks.number :]
        self._check_codes(rows)
        counts = torch.from_numpy(blocks.counts())
        total, column = 0.0, torch.arange(WIDTH)
        for start, levels in self._levels(rows, blocks, torch.device("cpu")):
            here = slice(start, start + len(levels))
            wide = levels.to(torch.float32)
            if int(counts[here].min()) < WIDTH:  # a tensor ends here: what follows in its last block is nothing
                wide *= column < counts[here, None]
            square = (wide * wide).sum(1)  # whole numbers below 2^24: exact
            total += float(square.double().mul_(scales[here]).mul_(scales[here]).sum())
        return math.sqrt(total)

    def _check_codes(self, rows: Bytes) -> None:
        limit = self.base**self.digits
        if len(rows) and limit < 256 and (found := int(rows.max())) >= limit:
            raise ProtocolError(f"{self.name}: byte {found} is no {self.digits} digits of base {self.base}")

    def accumulate(self, body: Bytes, into: Tensors, weight: float) -> None:
        blocks = Blocks({name: t.shape for name, t in into.items()}, WIDTH)
        flat = {name: t.view(-1) for name, t in into.items()}
        device = next(iter(flat.values())).device if flat else torch.device("cpu")
        for start, values in self._values(body, {name: t.shape for name, t in into.items()}, device):
            if weight != 1.0:
                values.mul_(weight)
            lying = values.view(-1)
            for run in blocks.runs(start, start + len(values)):
                at = (run.start - start) * WIDTH
                flat[run.name][run.offset : run.offset + run.size].add_(lying[at : at + run.size])

    def _values(self, body: Bytes, specs: Specs, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        """As `_levels`, dequantised: [blocks, 128] fp32."""
        blocks = Blocks(specs, WIDTH)
        scales = widened(scale_bits(body[: 2 * blocks.number])).to(device).view(-1, 1)
        for start, levels in self._levels(body[2 * blocks.number :], blocks, device):
            yield start, levels.to(torch.float32).mul_(scales[start : start + len(levels)])

    def _levels(self, rows: Bytes, blocks: Blocks, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        """The first block's number and [blocks, 128] int8, a chunk at a time, in the order of the layout."""
        height = len(rows) // WIDTH
        for low, high in chunks(height, device):
            chunk = rows[low * WIDTH : high * WIDTH]
            row = torch.from_numpy(chunk if chunk.flags.writeable else chunk.copy()).view(-1, WIDTH).to(device)
            for plane in range(self.digits):
                start = plane * height + low
                stop = min(start + high - low, blocks.number)
                digits, row = self._split(row)
                if stop > start:
                    yield start, self.levels(digits[: stop - start])

    def _split(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest digit of each byte, and the rest of it."""
        if self.digits == 1:
            return row, row
        shift = self.base.bit_length() - 1
        return row & (self.base - 1), row >> shift


class Int8(Quantised):
    """255 levels, the scale that of the largest magnitude, rounded to nearest even."""

    base, digits, top = 256, 1, 128
    steps: ClassVar[int] = 127

    def quantise(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = _bf16_above(x.abs().amax(1, keepdim=True) / self.steps)
        return scale, self._digits((x / divisor(scale)).round_())

    def _digits(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(torch.int8)

    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        return digits.view(torch.int8)


class Int4(Int8):
    """15 levels, as int8's; two to a byte."""

    base, digits, top = 16, 2, 8
    steps = 7

    def _digits(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(torch.int8).add_(8)

    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        return digits.view(torch.int8) - 8


class TwoBit(Quantised):
    """Four levels, +-29 and +-95 of the scale: nearly Lloyd and Max's of a Gaussian (+-0.4528, +-1.510 of the rms).

    The scale is the one of least squares. A digit is the number of its interval, modulo 4, so a level is
    29 + 66 x digit, modulo 256.
    """

    base, digits, top = 4, 4, 95

    def quantise(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rms = _rms(x, count)
        index = (x / divisor(rms * 0.9816)).floor_().clamp_(-2, 1)
        digits = index.to(torch.int8).bitwise_and_(3)
        level = self.levels(digits.view(torch.uint8)).to(torch.float32)
        square = (level * level).sum(1, keepdim=True) - (WIDTH - count) * 29**2  # padding is in the interval of 0
        return of_finite((x * level).sum(1, keepdim=True) / square, rms), digits

    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        return (digits * 66).add_(29).view(torch.int8)


class Ternary(Quantised):
    """-1, 0 and 1 times the mean magnitude of those beyond 0.612 of the rms: five to a byte."""

    base, digits, top = 3, 5, 1

    def quantise(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rms = _rms(x, count)
        codes = (x / divisor(rms * (2 * 0.612))).round_().clamp_(-1, 1)
        beyond = (codes * codes).sum(1, keepdim=True)
        return of_finite((x * codes).sum(1, keepdim=True) / beyond.clamp_(min=1), rms), codes.to(torch.int8).add_(1)

    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        return digits.view(torch.int8) - 1

    def _split(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        on_cpu = row.device.type == "cpu"  # where torch has no fast one
        rest = torch.from_numpy(row.numpy() // np.uint8(3)) if on_cpu else row // 3
        return row - rest * 3, rest


class OneBit(Quantised):
    """The sign times the mean magnitude."""

    base, digits, top = 2, 8, 1

    def quantise(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.abs().sum(1, keepdim=True) / count, (x >= 0).view(torch.int8)

    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        return (digits * 2).view(torch.int8) - 1


# --- scales -----------------------------------------------------------------------------------------------------------


def _rms(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(x, 2, 1, keepdim=True)
    return norm / count.sqrt()


def of_finite(scale: torch.Tensor, rms: torch.Tensor) -> torch.Tensor:
    """NaN where the rms overflowed: its codes say nothing of the values, and the payload is to be refused."""
    return scale + (rms - rms)


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """What to divide by: a block of zeros has scale 0."""
    return scale.masked_fill(scale == 0, 1.0)


def _bf16_above(values: torch.Tensor) -> torch.Tensor:
    """The next bf16 that is not below, as fp32: no code exceeds the largest then. Not negative."""
    bits = values.nan_to_num(nan=math.inf, posinf=math.inf).view(torch.int32)
    return bits.add(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


# --- chunks -----------------------------------------------------------------------------------------------------------


def chunks(height: int, device: torch.device, wide: int = 1) -> Iterator[tuple[int, int]]:
    """Of rows of `wide` blocks."""
    rows = max(1, (ROWS if device.type == "cpu" else GPU_ROWS) // wide)
    for low in range(0, height, rows):
        yield low, min(low + rows, height)


def gather(flat: Tensors, blocks: Blocks, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """[stop - start, 128] fp32, zeros where no tensor is: a view where it lies so in memory already."""
    values = None
    for run in blocks.runs(start, stop):
        found = flat[run.name][run.offset : run.offset + run.size]
        if run.size == (stop - start) * WIDTH and found.dtype == torch.float32:
            return found.view(-1, WIDTH)
        if values is None:
            values = torch.zeros((stop - start) * WIDTH, device=device)
        at = (run.start - start) * WIDTH
        values[at : at + run.size] = found
    return (torch.zeros((stop - start) * WIDTH, device=device) if values is None else values).view(-1, WIDTH)
