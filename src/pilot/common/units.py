"""Sizes and rates in decimal units: a megabyte is 10**6 bytes, a megabit 10**6 bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def fp32_megabytes(shapes: Iterable[Sequence[int]]) -> float:
    """Return the size of tensors of these shapes as fp32, in units of 10^6 bytes."""
    return 4e-6 * sum(map(math.prod, shapes))


def format_bytes(count: float) -> str:
    """Return a size in three digits and at most seven characters, such as "512 B", "3.46 kB" or "2.5 TB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_mbps(bps: float) -> str:
    """Return bits per second as megabits per second in three digits, such as "9.38" or "1,000"; "?" for 0, unknown."""
    mbps = bps / 1e6
    return "?" if not bps else f"{mbps:,.0f}" if mbps >= 99.95 else f"{mbps:.3g}"
