"""Aggregate a block of coordinates at a time: medians, trimmed means and others that need all values at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from pilot.aggregation import blocks

if TYPE_CHECKING:
    from pilot.aggregation import Contribution
    from pilot.codec import Tensors

BLOCK = 1 << 20  # coordinates: 4 MB of each contribution


def by_coordinate(
    contributions: Sequence[Contribution], combine: Callable[[torch.Tensor], torch.Tensor], size: int = BLOCK
) -> Tensors:
    """Combine the contributions' values of each coordinate to one: `combine` takes [contributions, n] to [n].

    Takes the memory of the result and of `size` coordinates of each contribution. Raises ValueError if there are none.
    """
    if not contributions:
        raise ValueError("nothing to aggregate")
    specs = contributions[0].specs
    flat = torch.empty(sum(map(math.prod, specs.values())))
    for start, stop in blocks(specs, size):
        flat[start:stop] = combine(torch.stack([c.read(start, stop) for c in contributions]))
    result, first = {}, 0
    for name in sorted(specs):
        result[name] = flat[first : first + math.prod(specs[name])].view(specs[name])
        first += math.prod(specs[name])
    return result
