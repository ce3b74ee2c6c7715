"""Quantise each block of 128 values by a bf16 scale of its own: int8, int4, 2bit, 1bit.

The tensors lie one after the other by name, each padded to whole blocks. The body: the scales, one a block (all high
bytes, then all low bytes), then rows of 128 bytes. With d digits of base b to a byte, block k of `number` has its codes
in row k mod height at digit k // height, where height = ceil(number / d): each of the d planes is a contiguous part of
the blocks, so packing and unpacking are a few operations on whole rows.

Scales are bf16, not fp16: the mean gradient of a large batch has blocks below 6e-8, the smallest fp16. A block beyond
1e19 may have a norm that fp32 cannot hold; if the scale follows from the norm, the payload is refused as not finite.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
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

WIDTH = 128  # values of a block
CPU_ROWS = 2048  # rows at a time: 1 MB as fp32, so a chunk stays in the caches
GPU_ROWS = 1 << 17


class Coded(Packed):
    """A codec whose body ends with rows of small codes, several to a byte, which scales turn into values."""

    base: ClassVar[int]  # digits are 0 … base - 1
    digits: ClassVar[int]  # digits in a byte

    @abstractmethod
    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        """Map digits, uint8, to signed levels, int8."""

    @abstractmethod
    def scale_bytes(self, specs: Specs) -> int:
        """Return the bytes of the scales, after which the rows begin."""

    @abstractmethod
    def scaler(self, body: Bytes, specs: Specs, first: int, stop: int, device: torch.device) -> Scaler:
        """Return the function that multiplies levels of blocks [first, stop) by their scales."""

    def body_size(self, specs: Specs) -> int:
        return self.scale_bytes(specs) + WIDTH * -(-Blocks(specs, WIDTH).number // self.digits)

    def add_body(self, body: Bytes, specs: Specs, windows: Windows, weight: float) -> None:
        blocks, device = Blocks(specs, WIDTH), device_of(window.values for window in windows.values())
        first, stop = blocks.covering(windows)
        scale = self.scaler(body, specs, first, stop, device)
        for start, levels in self.iterate_levels(body[self.scale_bytes(specs) :], first, stop, device):
            values = scale(start, levels)
            if weight != 1.0:
                values.mul_(weight)
            blocks.add(start, values, windows)

    def iterate_levels(
        self, rows: Bytes, first: int, stop: int, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the number of a block and levels from there on, [blocks, 128] int8, for blocks [first, stop).

        A chunk of rows at a time, digit by digit: so the order of the blocks is that of the layout.
        """
        height = len(rows) // WIDTH
        if first == stop:
            return
        if stop - first >= height:
            parts = [(0, height)]
        else:  # the rows of a few blocks, which may go on in the top rows, at the next digit
            low, high = first % height, (stop - 1) % height + 1
            parts = [(low, high)] if low < high else [(low, height), (0, high)]
        for low, high in (chunk for part in parts for chunk in row_chunks(*part, device)):
            found = rows[low * WIDTH : high * WIDTH]
            row = torch.from_numpy(found if found.flags.writeable else found.copy()).view(-1, WIDTH).to(device)
            for plane in range(self.digits):
                start, end = max(plane * height + low, first), min(plane * height + high, stop)
                if start < end:
                    skip = plane * height + low
                    yield start, self.levels(self.digit(row[start - skip : end - skip], plane))

    def digit(self, row: torch.Tensor, plane: int) -> torch.Tensor:
        """Return digit `plane` of each byte, 0 for the lowest."""
        if self.digits == 1:
            return row
        shifted = row >> plane * (self.base.bit_length() - 1)
        return shifted if plane == self.digits - 1 else shifted & (self.base - 1)

    def check_codes(self, rows: Bytes) -> None:
        """Raise ProtocolError for a byte that is not `digits` digits of `base`."""
        limit = self.base**self.digits
        if len(rows) and limit < 256 and (found := int(rows.max())) >= limit:
            raise ProtocolError(f"{self.name}: byte {found} is not {self.digits} digits of base {self.base}")


class Scaler:
    """Multiply levels by the scales of their blocks, from block `first` on."""

    def __init__(self, first: int, scales: torch.Tensor) -> None:
        self._first, self._scales = first, scales  # [blocks, 1] fp32

    def __call__(self, start: int, levels: torch.Tensor) -> torch.Tensor:
        """Return the values of the blocks from `start` on, [blocks, 128] fp32, of levels [blocks, 128] int8."""
        at = start - self._first
        return levels.to(torch.float32).mul_(self._scales[at : at + len(levels)])


class Quantised(Coded):
    """A scale a block. `quantise` chooses scale and codes; `levels` says what the codes mean."""

    largest_level: ClassVar[int]

    @abstractmethod
    def quantise(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales [rows, 1] fp32 and digits int8 of [rows, 128] fp32, zero after the first `count` [rows, 1]."""

    def scale_bytes(self, specs: Specs) -> int:
        return 2 * Blocks(specs, WIDTH).number

    def scaler(self, body: Bytes, specs: Specs, first: int, stop: int, device: torch.device) -> Scaler:
        bits = scale_bits(body[: self.scale_bytes(specs)], first, stop)
        return Scaler(first, widened(bits).to(device).view(-1, 1))

    def encode_body(self, tensors: Mapping[str, torch.Tensor]) -> Bytes:
        blocks = Blocks({name: t.shape for name, t in tensors.items()}, WIDTH)
        flat = {name: t.reshape(-1) for name, t in tensors.items()}
        device = device_of(flat.values())
        height = -(-blocks.number // self.digits)
        scales = torch.zeros(height * self.digits, dtype=torch.bfloat16, device=device)
        counts = torch.ones(len(scales), 1, device=device)
        counts[: blocks.number, 0] = torch.from_numpy(blocks.counts()).to(device)
        body = np.empty(2 * blocks.number + WIDTH * height, np.uint8)
        packed = torch.from_numpy(body[2 * blocks.number :]).view(-1, WIDTH)
        for low, high in row_chunks(0, height, device):
            row = torch.zeros(high - low, WIDTH, dtype=torch.uint8, device=device)
            for plane in reversed(range(self.digits)):
                here = slice(plane * height + low, plane * height + high)
                scale, digits = self.quantise(gather(flat, blocks, here.start, here.stop, device), counts[here])
                scales[here] = scale[:, 0]
                row.mul_(self.base % 256).add_(digits.view(torch.uint8))
            packed[low:high] = row
        body[: 2 * blocks.number] = scale_bytes(scales[: blocks.number])
        return body

    def check_body(self, body: Bytes, specs: Specs) -> float:
        blocks = Blocks(specs, WIDTH)
        bits = scale_bits(body[: 2 * blocks.number])
        check_scales(bits, FP32_MAX / self.largest_level)
        scales = widened(bits).double()
        rows = body[2 * blocks.number :]
        self.check_codes(rows)
        counts = torch.from_numpy(blocks.counts())
        total, column = 0.0, torch.arange(WIDTH)
        for start, levels in self.iterate_levels(rows, 0, blocks.number, CPU):
            here = slice(start, start + len(levels))
            wide = levels.to(torch.float32)
            if int(counts[here].min()) < WIDTH:  # a tensor ends here: the rest of its last block is padding
                wide *= column < counts[here, None]
            square = (wide * wide).sum(1)  # whole numbers below 2^24: exact
            total += float(square.double().mul_(scales[here]).mul_(scales[here]).sum())
        return math.sqrt(total)


class Int8(Quantised):
    """255 levels, scaled by the largest magnitude, rounded to the nearest even code."""

    base, digits, largest_level = 256, 1, 128
    steps: ClassVar[int] = 127
    zero: ClassVar[int] = 0  # the digit of level 0

    def quantise(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = _bf16_above(x.abs().amax(1, keepdim=True) / self.steps)
        codes = (x / divisor(scale)).round_().to(torch.int8)
        return scale, codes.add_(self.zero) if self.zero else codes

    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        levels = digits.view(torch.int8)
        return levels - self.zero if self.zero else levels


class Int4(Int8):
    """15 levels like int8's, two to a byte."""

    base, digits, largest_level = 16, 2, 8
    steps, zero = 7, 8


class TwoBit(Quantised):
    """Four levels, ±29 and ±95 of the scale: nearly the Lloyd-Max levels of a Gaussian (±0.4528, ±1.510 of the rms).

    The scale is the least-squares one. A digit is the number of its interval modulo 4, so a level is 29 + 66 x digit
    modulo 256. Levels: Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory, 1960.
    """

    base, digits, largest_level = 4, 4, 95

    def quantise(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norm: torch.Tensor = torch.linalg.vector_norm(x, 2, 1, keepdim=True)
        rms = norm / count.sqrt()
        index = (x / divisor(rms * 0.9816)).floor_().clamp_(-2, 1)
        digits = index.to(torch.int8).bitwise_and_(3)
        level = self.levels(digits.view(torch.uint8)).to(torch.float32)
        square = (level * level).sum(1, keepdim=True) - (WIDTH - count) * 29**2  # padding lies in the interval of 0
        return nan_unless_finite((x * level).sum(1, keepdim=True) / square, rms), digits

    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        return (digits * 66).add_(29).view(torch.int8)


class OneBit(Quantised):
    """The sign times the mean magnitude of the block (Bernstein et al. 2018, arXiv 1802.04434)."""

    base, digits, largest_level = 2, 8, 1

    def quantise(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.abs().sum(1, keepdim=True) / count, (x >= 0).view(torch.int8)

    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        return (digits * 2).view(torch.int8) - 1


INT8, INT4, TWO_BIT, ONE_BIT = Int8("int8"), Int4("int4"), TwoBit("2bit"), OneBit("1bit")


# --- scales -----------------------------------------------------------------------------------------------------------


def nan_unless_finite(scale: torch.Tensor, rms: torch.Tensor) -> torch.Tensor:
    """Return the scale, or NaN if the rms overflowed: the codes then mean nothing, and the payload must be refused."""
    return scale + (rms - rms)


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """Return the scale with 1 in place of 0, which a block of zeros has."""
    return scale.masked_fill(scale == 0, 1.0)


def _bf16_above(values: torch.Tensor) -> torch.Tensor:
    """Round up to bf16, as fp32, so that no code exceeds the largest. The values are not negative."""
    bits = values.nan_to_num(nan=math.inf, posinf=math.inf).view(torch.int32)
    return bits.add(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


# --- chunks -----------------------------------------------------------------------------------------------------------


def row_chunks(first: int, stop: int, device: torch.device, wide: int = 1) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, each row `wide` blocks, small enough for a CPU's cache or large enough for a GPU."""
    rows = max(1, (CPU_ROWS if device.type == "cpu" else GPU_ROWS) // wide)
    for low in range(first, stop, rows):
        yield low, min(low + rows, stop)


def gather(flat: Tensors, blocks: Blocks, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Return blocks [start, stop) as [blocks, 128] fp32 with zeros for padding; a view if they lie so in memory."""
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
