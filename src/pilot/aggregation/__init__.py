"""Contributions → one gradient. Plain functions without state; the literal dict is the list of them.

Each is called with the accepted contributions in the order of their hotkeys and sums in that order, so a round replayed
from its record is bit-equal. Weights are the validator's own counts, normalised first: one miner weighs exactly 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pilot.codec import Specs, Tensors


class Weighted(Protocol):
    """What an aggregator sees of a contribution."""

    @property
    def count(self) -> int:
        """Examples or tokens, as the validator counts them."""

    @property
    def norm(self) -> float:
        """Euclidean norm over all tensors."""

    @property
    def specs(self) -> Specs:
        """The shapes of its tensors: the same in every contribution of a round."""

    @property
    def add(self) -> Callable[[Tensors, float], None]:
        """add(result, weight): adds weight times its tensors to those of `result`, without a dense copy of its own."""


Aggregator = Callable[[Sequence[Weighted]], "Tensors"]

AGGREGATORS: dict[str, str] = {
    "mean": "pilot.aggregation.means:mean",
    "median_norm_mean": "pilot.aggregation.means:median_norm_mean",
}


def load_aggregator(name: str) -> Aggregator:
    """The aggregator of that name; ValueError where there is none."""
    from importlib import import_module

    if name not in AGGREGATORS:
        raise ValueError(f"--aggregation {name}: unknown; known: {', '.join(AGGREGATORS)}")
    module, attribute = AGGREGATORS[name].split(":")
    aggregator: Aggregator = getattr(import_module(module), attribute)
    return aggregator
