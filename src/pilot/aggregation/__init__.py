"""Aggregate contributions to one gradient. An aggregator is a plain function without state.

It gets the accepted contributions in the order of their hotkeys and sums in that order, so a round replayed from its
record is bit-equal. Weights are the validator's own counts, normalised first: one miner weighs exactly 1.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from pilot.common.registry import load

if TYPE_CHECKING:
    import torch

    from pilot.codec import Specs, Tensors


class Contribution(Protocol):
    """A verified gradient as an aggregator sees it: encoded, however many of them a round has."""

    @property
    def count(self) -> int:
        """Return the examples or tokens in it, by the validator's count."""

    @property
    def norm(self) -> float:
        """Return the Euclidean norm over all tensors."""

    @property
    def specs(self) -> Specs:
        """Return the shapes of its tensors, which are the same in every contribution of a round."""

    def add(self, into: Tensors, weight: float) -> None:
        """Add weight times its tensors to those of `into`, without a dense copy."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return coordinates [start, stop) of the flat gradient as a vector, fp32 on the CPU (codec.Codec.read)."""


Aggregator = Callable[[Sequence[Contribution]], "Tensors"]

AGGREGATORS: dict[str, str] = {
    "mean": "pilot.aggregation.means:mean",
    "median_norm_mean": "pilot.aggregation.means:median_norm_mean",
    "trimmed_mean": "pilot.aggregation.robust:trimmed_mean",
    "coordinate_median": "pilot.aggregation.robust:coordinate_median",
    "krum": "pilot.aggregation.robust:krum",
    "multi_krum": "pilot.aggregation.robust:multi_krum",
    "geometric_median": "pilot.aggregation.robust:geometric_median",
    "centered_clipping": "pilot.aggregation.robust:centered_clipping",
}

MIXERS: dict[str, str] = {  # may come before any aggregator below the means: nnm+trimmed_mean
    "nnm": "pilot.aggregation.mixers:nnm",
    "bucketing": "pilot.aggregation.mixers:bucketing",
    "arc": "pilot.aggregation.mixers:arc",
}


def load_aggregator(name: str) -> Aggregator:
    """Return the aggregator of that name, such as `nnm+trimmed_mean`, or a user's own at package.module:function.

    Raises ValueError, in one line, for others.
    """
    if "+" in name:
        from pilot.aggregation.robust import compose

        *mixers, rule = name.split("+")
        return compose([load("--aggregation", mixer, MIXERS) for mixer in mixers], rule)
    aggregator: Aggregator = load("--aggregation", name, AGGREGATORS, own=True)
    if not callable(aggregator):
        raise ValueError(f"--aggregation {name}: not a function; it is called with a round's contributions")
    return aggregator


def blocks(specs: Specs, size: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of consecutive blocks of at most `size` coordinates that cover the flat gradient."""
    total = sum(math.prod(shape) for shape in specs.values())
    for start in range(0, total, size):
        yield start, min(start + size, total)
