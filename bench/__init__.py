"""Measure every figure of docs/BENCHMARKS.md: `python -m bench.overhead` prints one, `make bench` measures all.

A figure is a JSON line: {"name", "value", "unit", "peer", "peer_value", "ratio"}. Ours and the peer's are
measured in the same run, interleaved, as medians of several: machines are noisy, so seconds alone mean little.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Figure:
    """One figure. Creating it prints it."""

    name: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        print(json.dumps(asdict(self)), flush=True)
