"""Units that several parts count in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def fp32_megabytes(shapes: Iterable[Sequence[int]]) -> float:
    """Return the size of tensors of these shapes as fp32, in units of 10^6 bytes."""
    return 4e-6 * sum(map(math.prod, shapes))
