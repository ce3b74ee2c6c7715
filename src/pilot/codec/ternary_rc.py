"""Encode ternary codes under a scale for each row and one for each column of a matrix: value = code x row x column.

A scale for each block of 128 values fits all of its columns alike, but the gradients of some columns are ten times
those of others: the small ones all become 0 or noise, and Adam, which divides each by its own size, amplifies that. A
matrix of n x m has n + m scales here, not n m / 128, and its codes are those of the gradient after each row, then each
column, was scaled to mean square 1. The factoring is Adafactor's (Shazeer and Stern 2018, arXiv 1804.04235). Tensors
whose rows are not whole blocks, and those with few rows, have blocks for rows and no column scales.

The body: row scales, column scales (bf16), then the codes as `pilot.codec.quantised` lays them out, five to a byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from pilot.codec.packed import CPU, Blocks, Bytes, check_scales, device_of, scale_bits, scale_bytes, widened
from pilot.codec.quantised import WIDTH, Coded, Scaler, divisor, gather, nan_unless_finite, row_chunks

if TYPE_CHECKING:
    from pilot.codec import Specs, Tensors

MIN_ROWS = 128  # with fewer, column scales cost more than they bring
MAX_SCALE = 2.0**60  # the product of two is finite


class Factors:
    """The row and the 128 columns of each block: which scales it has.

    Column block 0 has scale 1 throughout: it is that of all tensors but matrices.
    """

    def __init__(self, specs: Specs) -> None:
        self.blocks = Blocks(specs, WIDTH)
        self.rows, self.column_blocks = 0, 1
        self.tensors: dict[str, tuple[int, int, int]] = {}  # first row, first column block, blocks of a row
        for name, number in zip(self.blocks.names, np.diff(self.blocks.ends).tolist(), strict=True):
            wide = specs[name][-1] // WIDTH if len(specs[name]) > 1 and specs[name][-1] % WIDTH == 0 else 0
            if wide and number // wide >= MIN_ROWS:
                self.tensors[name] = self.rows, self.column_blocks, wide
                self.column_blocks += wide
                self.rows += number // wide
            else:
                self.tensors[name] = self.rows, 0, 1
                self.rows += number

    def rows_and_columns(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the row and the column block of each of blocks [first, stop), [blocks] each."""
        row, column = np.zeros((2, stop - first), np.int64)
        for run in self.blocks.runs(first, stop):
            first_row, first_column, wide = self.tensors[run.name]
            block, here = (
                np.arange(run.stop - run.start) + run.offset // WIDTH,
                slice(run.start - first, run.stop - first),
            )
            row[here] = first_row + block // wide
            column[here] = first_column + block % wide
        return row, column

    @property
    def scales(self) -> int:
        return self.rows + WIDTH * (self.column_blocks - 1)


class FactoredScaler(Scaler):
    """Multiply levels by the scales of their row and of their columns."""

    def __init__(self, part: Bytes, factors: Factors, first: int, stop: int, device: torch.device) -> None:
        scales = widened(scale_bits(part))
        super().__init__(first, scales[: factors.rows].view(-1, 1).to(device))  # [rows, 1]
        self._columns = torch.cat([torch.ones(WIDTH), scales[factors.rows :]]).view(-1, WIDTH).to(device)
        row, column = factors.rows_and_columns(first, stop)
        self._row, self._column = torch.from_numpy(row).to(device), torch.from_numpy(column).to(device)

    def __call__(self, start: int, levels: torch.Tensor) -> torch.Tensor:
        here = slice(start - self._first, start - self._first + len(levels))
        values = levels.to(torch.float32).mul_(self._scales.index_select(0, self._row[here]))
        return values.mul_(self._columns.index_select(0, self._column[here]))


class TernaryRowColumn(Coded):
    """A code is ±1 beyond 0.612 of row times column, else 0; the row's scale is then the least-squares one."""

    base, digits = 3, 5

    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        return digits.view(torch.int8) - 1

    def digit(self, row: torch.Tensor, plane: int) -> torch.Tensor:
        if row.device.type == "cpu":  # torch has no fast division of bytes there
            upper = row.numpy() // np.uint8(3**plane)
            return torch.from_numpy(upper - upper // np.uint8(3) * np.uint8(3))
        weight: int = 3**plane
        return row // weight % 3

    def scale_bytes(self, specs: Specs) -> int:
        return 2 * Factors(specs).scales

    def scaler(self, body: Bytes, specs: Specs, first: int, stop: int, device: torch.device) -> Scaler:
        factors = Factors(specs)
        return FactoredScaler(body[: 2 * factors.scales], factors, first, stop, device)

    def encode_body(self, tensors: Mapping[str, torch.Tensor]) -> Bytes:
        specs = {name: t.shape for name, t in tensors.items()}
        factors, body = Factors(specs), np.empty(self.body_size(specs), np.uint8)
        if factors.blocks.number:
            flat = {name: t.reshape(-1) for name, t in tensors.items()}
            row, column = factors.rows_and_columns(0, factors.blocks.number)
            starts = np.flatnonzero(np.diff(row, prepend=-1))  # [rows], the first block of each
            spread = self._row_rms(flat, factors.blocks, starts)
            columns = self._column_rms(flat, factors, spread)
            places = torch.from_numpy(row).to(spread.device), torch.from_numpy(column).to(spread.device)
            sums = self._write_codes(flat, factors.blocks, body[2 * factors.scales :], spread, columns, *places)
            above, below = _row_sums(sums, starts).unbind(1)
            rows = nan_unless_finite(above / divisor(below), spread[:, 0])
            scales = torch.cat([rows, columns[1:].view(-1)])
            body[: 2 * factors.scales] = scale_bytes(scales.to(torch.bfloat16))
        return body

    def _row_rms(self, flat: Tensors, blocks: Blocks, starts: np.ndarray) -> torch.Tensor:
        """Return the root mean square of each row, [rows, 1]."""
        device = device_of(flat.values())
        square = torch.empty(blocks.number, 2, device=device)
        square[:, 1] = torch.from_numpy(blocks.counts()).to(device)
        for low, high in row_chunks(0, blocks.number, device):
            square[low:high, 0] = gather(flat, blocks, low, high, device).square().sum(1)
        sums = _row_sums(square, starts)
        return (sums[:, :1] / sums[:, 1:]).sqrt_()

    def _column_rms(self, flat: Tensors, factors: Factors, rows: torch.Tensor) -> torch.Tensor:
        """Return the root mean squares of the columns of the scaled rows, [column blocks, 128], rounded to bf16.

        Rows of zeros do not count: most rows of an embedding are zero, and would make the thresholds far too low.
        """
        device = rows.device
        columns = torch.ones(factors.column_blocks, WIDTH, device=device)
        for name, (first_row, first_column, wide) in factors.tensors.items():
            if not first_column:
                continue
            values = flat[name].view(-1, wide * WIDTH)
            total = torch.zeros(wide * WIDTH, device=device)
            for low, high in row_chunks(0, len(values), device, wide):
                here = slice(first_row + low, first_row + high)
                total += values[low:high].to(torch.float32).div(divisor(rows[here])).square_().sum(0)
            number = max(1, int(rows[first_row : first_row + len(values)].count_nonzero()))
            columns[first_column : first_column + wide] = (total / number).sqrt_().view(wide, WIDTH)
        return columns.to(torch.bfloat16).to(torch.float32)

    def _write_codes(
        self,
        flat: Tensors,
        blocks: Blocks,
        packed: Bytes,
        spread: torch.Tensor,
        columns: torch.Tensor,
        row: torch.Tensor,
        column: torch.Tensor,
    ) -> torch.Tensor:
        """Write the codes to `packed`.

        Returns [blocks, 2] for the least-squares scale of a row: x . (code column) and |code column|^2.
        """
        number, target, device = blocks.number, torch.from_numpy(packed).view(-1, WIDTH), columns.device
        height, sums = len(target), torch.zeros(number, 2, device=device)
        border, across = divisor(spread * (2 * 0.612)), divisor(columns)  # neither is below 1e-23, so no product is 0
        for low, high in row_chunks(0, height, device):
            byte = torch.zeros(high - low, WIDTH, dtype=torch.uint8, device=device)
            for plane in reversed(range(self.digits)):
                start, stop = plane * height + low, min(plane * height + high, number)
                digits = torch.zeros(high - low, WIDTH, dtype=torch.int8, device=device)
                if stop > start:
                    x = gather(flat, blocks, start, stop, device)
                    scale = across.index_select(0, column[start:stop])
                    codes = scale * border.index_select(0, row[start:stop])
                    codes = torch.div(x, codes, out=codes).round_().clamp_(-1, 1)
                    digits[: stop - start] = codes
                    codes.mul_(scale)
                    sums[start:stop, 0] = torch.mul(x, codes, out=scale).sum(1)
                    sums[start:stop, 1] = codes.square_().sum(1)
                byte.mul_(self.base).add_(digits.add_(1).view(torch.uint8))
            target[low:high] = byte
        return sums

    def check_body(self, body: Bytes, specs: Specs) -> float:
        factors = Factors(specs)
        check_scales(scale_bits(body[: 2 * factors.scales]), MAX_SCALE)
        rows, number = body[2 * factors.scales :], factors.blocks.number
        scale = self.scaler(body, specs, 0, number, CPU)
        self.check_codes(rows)
        counts, place, total = torch.from_numpy(factors.blocks.counts()), torch.arange(WIDTH), 0.0
        for start, levels in self.iterate_levels(rows, 0, number, CPU):
            values, here = scale(start, levels), counts[start : start + len(levels)]
            if int(here.min()) < WIDTH:  # a tensor ends here: the rest of its last block is padding
                values *= place < here[:, None]
            total += float(values.double().square_().sum())  # fp32 cannot hold the square of a small value
        return math.sqrt(total)


def _row_sums(blocks: torch.Tensor, starts: np.ndarray) -> torch.Tensor:
    """Sum [blocks, k] over the blocks of each row, one after the other: [rows, k]."""
    return torch.from_numpy(np.add.reduceat(blocks.cpu().numpy(), starts)).to(blocks.device)


TERNARY_RC = TernaryRowColumn("ternary-rc")
