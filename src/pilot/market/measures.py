"""Measure the accepted contributions of a round before the step, for rankers that ask by name and for receipts.

A measure is called in the compute thread with the parameters, before the step, and with the contributions in the order
in which they are summed. It returns one finite number for each contribution. With a ranker that asks for none, nothing
is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pilot.aggregation import blocks
from pilot.common.registry import load
from pilot.market.verify import Contribution
from pilot.ranking import BadRanker, Ranker

if TYPE_CHECKING:
    import torch

Measure = Callable[[Mapping[str, "torch.Tensor"], Sequence[Contribution]], Sequence[float]]

BLOCK = 1 << 18  # coordinates of each contribution that are decoded at a time

MEASURES: dict[str, str] = {
    "norm": "pilot.market.measures:norm",
    "cosine_to_mean": "pilot.market.measures:cosine_to_mean",
}


def load_measures(ranker: Ranker) -> dict[str, Measure]:
    """Return the measures that a ranker's `measures` names: known ones, or a user's own package.module:function.

    Raises ValueError for a name that leads nowhere. A receipt shows a user's own measure under its function's name.
    """
    names: Sequence[str] = getattr(ranker, "measures", ())
    return {name.rpartition(":")[2]: load("measure", name, MEASURES, own=True) for name in names}


def measure(
    measures: Mapping[str, Measure], parameters: Mapping[str, torch.Tensor], contributions: Sequence[Contribution]
) -> list[dict[str, float]]:
    """Return each contribution's values by the measures' names. Raises BadRanker unless they are finite numbers."""
    found: list[dict[str, float]] = [{} for _ in contributions]
    for name, function in measures.items():
        values = function(parameters, contributions)
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(contributions):
            kind = type(values).__name__
            raise BadRanker(
                f"measure {name}: this {kind} is not a number for each of {len(contributions)} contributions"
            )
        for contribution, own, number in zip(contributions, found, numbers, strict=True):
            if not math.isfinite(number):
                raise BadRanker(f"measure {name} of {contribution.hotkey}: {number} is not a finite number")
            own[name] = number
    return found


def norm(parameters: Mapping[str, torch.Tensor], contributions: Sequence[Contribution]) -> list[float]:
    """Return the Euclidean norms, which `verify` has computed."""
    return [c.norm for c in contributions]


def cosine_to_mean(parameters: Mapping[str, torch.Tensor], contributions: Sequence[Contribution]) -> list[float]:
    """Return the cosine between each contribution and the mean weighted by counts; 0 where one of them is zero.

    Holds one block of coordinates of each contribution.
    """
    import torch

    if not contributions:
        return []
    total = sum(c.count for c in contributions)
    weights = torch.tensor([c.count / total for c in contributions], dtype=torch.float64)
    products = torch.zeros(len(contributions), dtype=torch.float64)
    square = 0.0
    for start, stop in blocks(contributions[0].specs, BLOCK):
        block = torch.stack([c.read(start, stop).double() for c in contributions])  # (miners, coordinates)
        mean = weights @ block
        products += block @ mean
        square += float(mean @ mean)
    scales = [c.norm * math.sqrt(square) for c in contributions]
    return [
        max(-1.0, min(1.0, float(product) / scale)) if scale else 0.0
        for product, scale in zip(products, scales, strict=True)
    ]
