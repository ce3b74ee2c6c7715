"""Each figure in the README, as a command that prints it: `python -m bench.overhead`; all of them: `make bench`.

A figure is a JSON line: {"name", "value", "unit", "peer", "peer_value", "ratio"}. A ratio is ours to the peer's, both
measured in the same run, interleaved, medians of several: machines are noisy, so seconds alone mean little.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Figure:
    """A figure, printed as it is made."""

    name: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        print(json.dumps(asdict(self)), flush=True)
