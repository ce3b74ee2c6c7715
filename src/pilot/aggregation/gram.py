"""Inner products of contributions. Distances between them, and to any combination of them, follow from these alone.

So rules that select, clip or weigh whole contributions (pilot.aggregation.linear) read each gradient twice, once here
and once for the sum, however often they iterate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pilot.aggregation.blockwise import BLOCK, row_blocks

if TYPE_CHECKING:
    from pilot.aggregation import Contribution


def gram(contributions: Sequence[Contribution], block: int = BLOCK) -> torch.Tensor:
    """Return the inner products [n, n] of the contributions, fp64 on the CPU. Their norms must be finite.

    Products are of unit vectors in fp32, a block at a time, and summed in fp64. So nothing overflows, and a distance is
    off by about 1e-3 of the larger norm at most. Holds one block of each contribution.
    """
    norms = torch.tensor([c.norm for c in contributions], dtype=torch.float64)
    scales = torch.where(norms > 1e-37, 1 / norms, 0.0).to(torch.float32)[:, None]  # below that 1 / norm overflows
    cosines = torch.zeros(len(norms), len(norms), dtype=torch.float64)
    for _, _, rows in row_blocks(contributions, block):
        rows *= scales
        cosines += rows @ rows.T
    cosines = ((cosines + cosines.T) / 2).fill_diagonal_(1.0)
    return cosines * norms[:, None] * norms


def squared_distances(products: torch.Tensor) -> torch.Tensor:
    """Return |x_i - x_j|^2 from the inner products [n, n]. No rounding makes one negative."""
    squares = products.diagonal()
    return (squares[:, None] + squares - 2 * products).clamp_min_(0.0).fill_diagonal_(0.0)


def squared_distances_to(products: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return |x_i - z|^2 [n] to the combination z = sum_j weights_j x_j."""
    along = products @ weights
    return (products.diagonal() - 2 * along + weights @ along).clamp_min_(0.0)
