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
    """The row and the 128 columns of each block. Columns 0 to 127 have scale 1: that is all but matrices."""

    def __init__(self, specs: Specs) -> None:
        self.blocks = Blocks(specs, WIDTH)
        self.matrices: list[tuple[str, int, int, int]] = []  # name, first row, first column block, blocks of a row
        rows, columns, self.rows, self.column_blocks = [], [], 0, 1
        for name, number in zip(self.blocks.names, np.diff(self.blocks.ends).tolist(), strict=True):
            wide = specs[name][-1] // WIDTH if len(specs[name]) > 1 and specs[name][-1] % WIDTH == 0 else 0
            here = np.arange(number)
            if wide and number // wide >= MIN_ROWS:
                self.matrices.append((name, self.rows, self.column_blocks, wide))
                rows.append(self.rows + here // wide)
                columns.append(self.column_blocks + here % wide)
                self.column_blocks += wide
                self.rows += number // wide
            else:
                rows.append(self.rows + here)
                columns.append(np.zeros_like(here))
                self.rows += number
        self.row = np.concatenate(rows) if rows else np.zeros(0, np.int64)  # [blocks]
        self.column = np.concatenate(columns) if columns else np.zeros(0, np.int64)  # [blocks]
        self.starts = np.flatnonzero(np.diff(self.row, prepend=-1))  # [rows], the first block of each

    def rows_and_columns(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row and the column block of each block, [blocks] each."""
        return torch.from_numpy(self.row).to(device), torch.from_numpy(self.column).to(device)

    @property
    def scales(self) -> int:
        return self.rows + WIDTH * (self.column_blocks - 1)

    def row_sums(self, blocks: torch.Tensor) -> torch.Tensor:
        """Sum [blocks, k] over the blocks of each row, one after the other: [rows, k]."""
        return torch.from_numpy(np.add.reduceat(blocks.cpu().numpy(), self.starts)).to(blocks.device)


class FactoredScaler(Scaler):
    """Multiply levels by the scales of their row and of their columns."""

    def __init__(self, bits: np.ndarray, factors: Factors, device: torch.device) -> None:
        scales = widened(bits)
        super().__init__(scales[: factors.rows].view(-1, 1).to(device))  # [rows, 1]
        self._columns = torch.cat([torch.ones(WIDTH), scales[factors.rows :]]).view(-1, WIDTH).to(device)
        self._row, self._column = factors.rows_and_columns(device)

    def __call__(self, start: int, levels: torch.Tensor) -> torch.Tensor:
        here = slice(start, start + len(levels))
        values = levels.to(torch.float32).mul_(self._scales.index_select(0, self._row[here]))
        return values.mul_(self._columns.index_select(0, self._column[here]))


class TernaryRowColumn(Coded):
    """A code is ±1 beyond 0.612 of row times column, else 0; the row's scale is then the least-squares one."""

    base, digits = 3, 5

    def levels(self, digits: torch.Tensor) -> torch.Tensor:
        return digits.view(torch.int8) - 1

    def split_digit(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        on_cpu = row.device.type == "cpu"  # torch has no fast division of bytes there
        rest = torch.from_numpy(row.numpy() // np.uint8(3)) if on_cpu else row // 3
        return row - rest * 3, rest

    def scale_bytes(self, specs: Specs) -> int:
        return 2 * Factors(specs).scales

    def scaler(self, body: Bytes, specs: Specs, device: torch.device) -> Scaler:
        factors = Factors(specs)
        return FactoredScaler(scale_bits(body[: 2 * factors.scales]), factors, device)

    def encode_body(self, tensors: Mapping[str, torch.Tensor]) -> Bytes:
        specs = {name: t.shape for name, t in tensors.items()}
        factors, body = Factors(specs), np.empty(self.body_size(specs), np.uint8)
        if factors.blocks.number:
            flat = {name: t.reshape(-1) for name, t in tensors.items()}
            device = device_of(flat)
            spread = self._row_rms(flat, factors, device)
            columns = self._column_rms(flat, factors, spread, device)
            sums = self._write_codes(flat, factors, body[2 * factors.scales :], spread, columns)
            above, below = factors.row_sums(sums).unbind(1)
            rows = nan_unless_finite(above / divisor(below), spread[:, 0])
            scales = torch.cat([rows, columns[1:].view(-1)])
            body[: 2 * factors.scales] = scale_bytes(scales.to(torch.bfloat16))
        return body

    def _row_rms(self, flat: Tensors, factors: Factors, device: torch.device) -> torch.Tensor:
        """Return the root mean square of each row, [rows, 1]."""
        blocks = factors.blocks
        square = torch.empty(blocks.number, 2, device=device)
        square[:, 1] = torch.from_numpy(blocks.counts()).to(device)
        for low, high in row_chunks(blocks.number, device):
            square[low:high, 0] = gather(flat, blocks, low, high, device).square().sum(1)
        sums = factors.row_sums(square)
        return (sums[:, :1] / sums[:, 1:]).sqrt_()

    def _column_rms(self, flat: Tensors, factors: Factors, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the root mean squares of the columns of the scaled rows, [column blocks, 128], rounded to bf16.

        Rows of zeros do not count: most rows of an embedding are zero, and would make the thresholds far too low.
        """
        columns = torch.ones(factors.column_blocks, WIDTH, device=device)
        for name, first_row, first_column, wide in factors.matrices:
            values = flat[name].view(-1, wide * WIDTH)
            total = torch.zeros(wide * WIDTH, device=device)
            for low, high in row_chunks(len(values), device, wide):
                here = slice(first_row + low, first_row + high)
                total += values[low:high].to(torch.float32).div(divisor(rows[here])).square_().sum(0)
            number = max(1, int(rows[first_row : first_row + len(values)].count_nonzero()))
            columns[first_column : first_column + wide] = (total / number).sqrt_().view(wide, WIDTH)
        return columns.to(torch.bfloat16).to(torch.float32)

    def _write_codes(
        self, flat: Tensors, factors: Factors, packed: Bytes, spread: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Write the codes to `packed`.

        Returns [blocks, 2] for the least-squares scale of a row: x . (code column) and |code column|^2.
        """
        number, target, device = factors.blocks.number, torch.from_numpy(packed).view(-1, WIDTH), columns.device
        row, column = factors.rows_and_columns(device)
        height, sums = len(target), torch.zeros(number, 2, device=device)
        border, across = divisor(spread * (2 * 0.612)), divisor(columns)  # neither is below 1e-23, so no product is 0
        for low, high in row_chunks(height, device):
            byte = torch.zeros(high - low, WIDTH, dtype=torch.uint8, device=device)
            for plane in reversed(range(self.digits)):
                start, stop = plane * height + low, min(plane * height + high, number)
                digits = torch.zeros(high - low, WIDTH, dtype=torch.int8, device=device)
                if stop > start:
                    x = gather(flat, factors.blocks, start, stop, device)
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
        rows, scale = body[2 * factors.scales :], self.scaler(body, specs, CPU)
        self.check_codes(rows)
        counts, place, total = torch.from_numpy(factors.blocks.counts()), torch.arange(WIDTH), 0.0
        for start, levels in self.iterate_levels(rows, factors.blocks, CPU):
            values, here = scale(start, levels), counts[start : start + len(levels)]
            if int(here.min()) < WIDTH:  # a tensor ends here: the rest of its last block is padding
                values *= place < here[:, None]
            total += float(values.double().square_().sum())  # fp32 cannot hold the square of a small value
        return math.sqrt(total)


TERNARY_RC = TernaryRowColumn("ternary-rc")
