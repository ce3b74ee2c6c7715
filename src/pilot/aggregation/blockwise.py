"""Walk all contributions a block of coordinates at a time: for medians, trimmed means and inner products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from pilot.aggregation import blocks

if TYPE_CHECKING:
    from pilot.aggregation import Contribution
    from pilot.codec import Tensors

BLOCK = 1 << 16  # coordinates of each contribution, 0.5 MB: a dozen of them stay in a processor's cache


def row_blocks(contributions: Sequence[Contribution], size: int = BLOCK) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (start, stop, rows [n, stop - start]) for consecutive blocks of the flat gradients, one row each.

    The rows lie in one buffer that is filled again for each block, so they may be overwritten but not kept.
    """
    buffer = torch.empty(len(contributions), size)
    for start, stop in blocks(contributions[0].specs, size):
        rows = buffer[:, : stop - start]
        for row, contribution in zip(rows, contributions, strict=True):
            row.copy_(contribution.read(start, stop))
        yield start, stop, rows


def by_coordinate(
    contributions: Sequence[Contribution], combine: Callable[[torch.Tensor], torch.Tensor], size: int = BLOCK
) -> Tensors:
    """Combine the contributions' values of each coordinate to one: `combine` takes [contributions, n] to [n].

    It may overwrite what it gets. Takes the memory of the result and of `size` coordinates of each contribution.
    Raises ValueError if there are no contributions.
    """
    if not contributions:
        raise ValueError("nothing to aggregate")
    specs = contributions[0].specs
    flat = torch.empty(sum(map(math.prod, specs.values())))
    for start, stop, rows in row_blocks(contributions, size):
        flat[start:stop] = combine(rows)
    result, first = {}, 0
    for name in sorted(specs):
        result[name] = flat[first : first + math.prod(specs[name])].view(specs[name])
        first += math.prod(specs[name])
    return result
