"""Ternary codes under a scale for each row and one for each column of a matrix: value = code x row x column.

A block's scale fits all of its 128 columns alike, and the gradients of some columns are ten times those of others: the
small ones all become 0, or noise, and Adam, which divides each by its own size, makes much of that noise. A matrix of
n x m here has n + m scales, not n x m / 128, and codes of the gradient as it is once each row, then each column, has
mean square 1 (as Adafactor factors its second moments: Shazeer and Stern 2018). Tensors whose rows are no whole
blocks, and those with few rows, have blocks for rows, and no columns.

The body: row scales, column scales (bf16), then the codes as `pilot.codec.quantised` lays them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from pilot.codec.packed import Blocks, Bytes, check_scales, scale_bits, scale_bytes, widened
from pilot.codec.quantised import WIDTH, Ternary, chunks, divisor, gather, of_finite

if TYPE_CHECKING:
    from pilot.codec import Specs, Tensors

FEW = 128  # rows, below which scales of the columns cost more than they bring
LIMIT = 2.0**60  # of a scale: the product of two is finite


class Factors:
    """Which row and which 128 columns each block lies in. Columns 0 to 127 have scale 1: of what is no matrix."""

    def __init__(self, specs: Specs) -> None:
        self.blocks = Blocks(specs, WIDTH)
        self.matrices: list[tuple[str, int, int, int]] = []  # name, first row, first block of columns, blocks of a row
        rows, columns, self.rows, self.column_blocks = [], [], 0, 1
        for name, number in zip(self.blocks.names, np.diff(self.blocks.ends).tolist(), strict=True):
            wide = specs[name][-1] // WIDTH if len(specs[name]) > 1 and specs[name][-1] % WIDTH == 0 else 0
            here = np.arange(number)
            if wide and number // wide >= FEW:
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
        self.starts = np.flatnonzero(np.diff(self.row, prepend=-1))  # [rows] the first block of each

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[blocks] of each block: its row, and its block of columns."""
        return torch.from_numpy(self.row).to(device), torch.from_numpy(self.column).to(device)

    @property
    def scales(self) -> int:
        return self.rows + WIDTH * (self.column_blocks - 1)

    def row_sums(self, blocks: torch.Tensor) -> torch.Tensor:
        """[blocks, k] -> [rows, k], one after the other."""
        return torch.from_numpy(np.add.reduceat(blocks.cpu().numpy(), self.starts)).to(blocks.device)


class RowColumn(Ternary):
    """`ternary-rc`."""

    def sizes(self, specs: Specs) -> tuple[int, int]:
        factors = Factors(specs)
        size = 2 * factors.scales + WIDTH * -(-factors.blocks.number // self.digits)
        return size, size

    def body(self, tensors: Mapping[str, torch.Tensor]) -> Bytes:
        specs = {name: t.shape for name, t in tensors.items()}
        factors, body = Factors(specs), np.empty(self.sizes(specs)[0], np.uint8)
        if factors.blocks.number:
            flat = {name: t.reshape(-1) for name, t in tensors.items()}
            device = next(iter(flat.values())).device
            spread = self._rows(flat, factors, device)
            columns = self._columns(flat, factors, spread, device)
            sums = self._codes(flat, factors, body[2 * factors.scales :], spread, columns)
            above, below = factors.row_sums(sums).unbind(1)
            rows = of_finite(above / divisor(below), spread[:, 0])
            scales = torch.cat([rows, columns[1:].view(-1)])
            body[: 2 * factors.scales] = scale_bytes(scales.to(torch.bfloat16))
        return body

    def _rows(self, flat: Tensors, factors: Factors, device: torch.device) -> torch.Tensor:
        """[rows, 1] root mean squares."""
        blocks = factors.blocks
        square = torch.empty(blocks.number, 2, device=device)
        square[:, 1] = torch.from_numpy(blocks.counts()).to(device)
        for low, high in chunks(blocks.number, device):
            square[low:high, 0] = gather(flat, blocks, low, high, device).square().sum(1)
        sums = factors.row_sums(square)
        return (sums[:, :1] / sums[:, 1:]).sqrt_()

    def _columns(self, flat: Tensors, factors: Factors, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """[column blocks, 128] root mean squares of what is left of the columns once each row has 1; to bf16.

        Rows of nothing do not count: most of an embedding's are, and the columns' borders would be far too low.
        """
        columns = torch.ones(factors.column_blocks, WIDTH, device=device)
        for name, first_row, first_column, wide in factors.matrices:
            values = flat[name].view(-1, wide * WIDTH)
            total = torch.zeros(wide * WIDTH, device=device)
            for low, high in chunks(len(values), device, wide):
                here = slice(first_row + low, first_row + high)
                total += values[low:high].to(torch.float32).div(divisor(rows[here])).square_().sum(0)
            number = max(1, int(rows[first_row : first_row + len(values)].count_nonzero()))
            columns[first_column : first_column + wide] = (total / number).sqrt_().view(wide, WIDTH)
        return columns.to(torch.bfloat16).to(torch.float32)

    def _codes(
        self, flat: Tensors, factors: Factors, packed: Bytes, spread: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Writes the codes. [blocks, 2] for the least squares of a row's scale: x . code column, |code column|^2."""
        number, target, device = factors.blocks.number, torch.from_numpy(packed).view(-1, WIDTH), columns.device
        row, column = factors.places(device)
        height, sums = len(target), torch.zeros(number, 2, device=device)
        border, across = divisor(spread * (2 * 0.612)), divisor(columns)  # neither is below 1e-23: nor 0 a product
        for low, high in chunks(height, device):
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

    def inspect(self, body: Bytes, specs: Specs) -> float:
        factors = Factors(specs)
        check_scales(scale_bits(body[: 2 * factors.scales]), LIMIT)
        self._check_codes(body[2 * factors.scales :])
        counts, place, total = torch.from_numpy(factors.blocks.counts()), torch.arange(WIDTH), 0.0
        for start, values in self._values(body, specs, torch.device("cpu")):
            here = counts[start : start + len(values)]
            if int(here.min()) < WIDTH:  # a tensor ends here: what follows in its last block is nothing
                values *= place < here[:, None]
            total += float(values.double().square_().sum())  # of a small column fp32 does not hold the square
        return math.sqrt(total)

    def _values(self, body: Bytes, specs: Specs, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        factors = Factors(specs)
        rows, columns = (t.to(device) for t in self._scales(scale_bits(body[: 2 * factors.scales]), factors))
        row, column = factors.places(device)
        for start, levels in self._levels(body[2 * factors.scales :], factors.blocks, device):
            here = slice(start, start + len(levels))
            values = levels.to(torch.float32).mul_(rows.index_select(0, row[here]))
            yield start, values.mul_(columns.index_select(0, column[here]))

    def _scales(self, bits: np.ndarray, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, 1], [column blocks, 128]"""
        scales = widened(bits)
        columns = torch.cat([torch.ones(WIDTH), scales[factors.rows :]]).view(-1, WIDTH)
        return scales[: factors.rows].view(-1, 1), columns
