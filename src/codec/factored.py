"""Ternary codes under a scale for each row and one for each column of a matrix: value = code x row x column.

A block's scale fits all of its 128 columns alike, and the gradients of some columns are ten times those of others: the
small ones all become 0, or noise, and Adam, which divides each by its own size, makes much of that noise. A matrix of
n x m here has n + m scales, not n x m / 128, and codes of the gradient as it is once each row, then each column, has
mean square 1 (as Adafactor factors its second moments: Shazeer and Stern 2018). Tensors whose rows are no whole
blocks, and those with few rows, have blocks for rows, and no columns.

The body: row scales, column scales (bf16), then the codes as `codec.quantised` lays them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from codec.packed import Blocks, Bytes, check_scales, scale_bits, scale_bytes, widened
from codec.quantised import WIDTH, Ternary, _chunks, _divisor, _gather

if TYPE_CHECKING:
    from codec import Specs, Tensors

FEW = 128  # rows, below which scales of the columns cost more than they bring
LIMIT = 2.0**60  # of a scale: the product of two is finite


class Factors:
    """Which row and which 128 columns each block lies in. Columns 0 to 127 have scale 1: of what is no matrix."""

    def __init__(self, specs: Specs) -> None:
        self.blocks = Blocks(specs, WIDTH)
        rows, columns, self.rows, self.column_blocks = [], [], 0, 1
        sizes = np.diff(self.blocks.ends)
        for name, number in zip(self.blocks.names, sizes, strict=True):
            wide = specs[name][-1] // WIDTH if len(specs[name]) > 1 and specs[name][-1] % WIDTH == 0 else 0
            matrix = wide > 0 and number // wide >= FEW
            here = np.arange(number)
            rows.append(self.rows + (here // wide if matrix else here))
            columns.append(self.column_blocks + here % wide if matrix else np.zeros_like(here))
            self.rows += int(number // wide if matrix else number)
            self.column_blocks += wide if matrix else 0
        self.row = np.concatenate(rows) if rows else np.zeros(0, np.int64)  # [blocks]
        self.column = np.concatenate(columns) if columns else np.zeros(0, np.int64)  # [blocks]
        self.starts = np.flatnonzero(np.diff(self.row, prepend=-1))  # [rows] the first block of each

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
        factors = Factors({name: t.shape for name, t in tensors.items()})
        flat = {name: t.reshape(-1) for name, t in tensors.items()}
        number = factors.blocks.number
        body = np.empty(self.sizes({name: t.shape for name, t in tensors.items()})[0], np.uint8)
        if number:
            device = next(iter(flat.values())).device
            row, column = (torch.from_numpy(index).to(device) for index in (factors.row, factors.column))
            spread, columns = self._spread(flat, factors, row, column, device)
            sums = self._codes(flat, factors, body[2 * factors.scales :], spread[row] * 1.224, columns[column], device)
            scale = factors.row_sums(sums)
            rows = scale[:, :1] / _divisor(scale[:, 1:])
            scales = torch.cat([rows.view(-1), columns[1:].view(-1)]).to(torch.bfloat16)
            body[: 2 * factors.scales] = scale_bytes(scales)
        return body

    def _spread(
        self, flat: Tensors, factors: Factors, row: torch.Tensor, column: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Root mean squares: [rows, 1] of the rows, and [column blocks, 128] of the columns over their rows' ones."""
        number, blocks = factors.blocks.number, factors.blocks
        square = torch.empty(number, 2, device=device)
        square[:, 1] = torch.from_numpy(blocks.counts()).to(device)
        for low, high in _chunks(number, device):
            square[low:high, 0] = _gather(flat, blocks, low, high, device).square().sum(1)
        sums = factors.row_sums(square)
        rows = (sums[:, :1] / sums[:, 1:]).sqrt_()
        columns = torch.zeros(factors.column_blocks, WIDTH, device=device)
        for low, high in _chunks(number, device):
            values = _gather(flat, blocks, low, high, device) / _divisor(rows[row[low:high]])
            columns.index_add_(0, column[low:high], values.square_())
        members = torch.bincount(column, minlength=factors.column_blocks).clamp_(min=1)
        columns = (columns / members[:, None]).sqrt_().to(torch.bfloat16).to(torch.float32)
        columns[0] = 1.0
        return rows, columns

    def _codes(
        self,
        flat: Tensors,
        factors: Factors,
        packed: Bytes,
        border: torch.Tensor,
        columns: torch.Tensor,
        device: torch.device,
    ) -> torch.Tensor:
        """Writes the codes. [blocks, 2] sums for the least squares of a row's scale: x . code column, |code column|^2."""
        number, target = factors.blocks.number, torch.from_numpy(packed).view(-1, WIDTH)
        height = len(target)
        sums = torch.zeros(number, 2, device=device)
        for low, high in _chunks(height, device):
            byte = torch.zeros(high - low, WIDTH, dtype=torch.uint8, device=device)
            for plane in reversed(range(self.digits)):
                start, stop = plane * height + low, min(plane * height + high, number)
                digits = torch.ones(high - low, WIDTH, dtype=torch.uint8, device=device)  # code 0
                if stop > start:
                    x, scale = _gather(flat, factors.blocks, start, stop, device), columns[start:stop]
                    codes = (x / _divisor(scale * border[start:stop])).round_().clamp_(-1, 1)
                    digits[: stop - start] = codes.to(torch.int8).add_(1).view(torch.uint8)
                    codes.mul_(scale)
                    sums[start:stop, 0], sums[start:stop, 1] = (x * codes).sum(1), codes.square().sum(1)
                byte.mul_(self.base).add_(digits)
            target[low:high] = byte.cpu()
        return sums

    def inspect(self, body: Bytes, specs: Specs) -> float:
        factors = Factors(specs)
        bits = scale_bits(body[: 2 * factors.scales])
        check_scales(bits, LIMIT)
        codes = body[2 * factors.scales :]
        self._check_codes(codes)
        rows, columns = self._scales(bits, factors)
        counts, place = torch.from_numpy(factors.blocks.counts()), torch.arange(WIDTH)
        total = 0.0
        for start, levels in self._levels(codes, factors.blocks, torch.device("cpu")):
            here = slice(start, start + len(levels))
            wide = levels.to(torch.float32)
            if int(counts[here].min()) < WIDTH:  # a tensor ends here: what follows in its last block is nothing
                wide *= place < counts[here, None]
            wide.mul_(columns[factors.column[here]]).square_()
            total += float(wide.double().sum(1).mul_(rows[factors.row[here], 0].double().square_()).sum())
        return math.sqrt(total)

    def accumulate(self, body: Bytes, into: Tensors, weight: float) -> None:
        factors = Factors({name: t.shape for name, t in into.items()})
        flat = {name: t.view(-1) for name, t in into.items()}
        device = next(iter(flat.values())).device if flat else torch.device("cpu")
        rows, columns = (t.to(device) for t in self._scales(scale_bits(body[: 2 * factors.scales]), factors))
        row, column = (torch.from_numpy(index).to(device) for index in (factors.row, factors.column))
        for start, levels in self._levels(body[2 * factors.scales :], factors.blocks, device):
            here = slice(start, start + len(levels))
            values = levels.to(torch.float32).mul_(rows[row[here]]).mul_(columns[column[here]])
            if weight != 1.0:
                values.mul_(weight)
            values = values.view(-1)
            for run in factors.blocks.runs(start, start + len(levels)):
                at = (run.start - start) * WIDTH
                flat[run.name][run.offset : run.offset + run.size].add_(values[at : at + run.size])

    def _scales(self, bits: np.ndarray, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, 1], [column blocks, 128]"""
        scales = widened(bits)
        columns = torch.cat([torch.ones(WIDTH), scales[factors.rows :]]).view(-1, WIDTH)
        return scales[: factors.rows].view(-1, 1), columns
