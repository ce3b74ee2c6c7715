"""Weighted means. Both hold one result and nothing else that is dense, whatever the number of miners."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pilot.aggregation import Contribution
    from pilot.codec import Tensors


def mean(contributions: Sequence[Contribution]) -> Tensors:
    """Return sum_i w_i g_i with w_i = count_i / sum_j count_j."""
    return weighted_sum(contributions, shares(contributions))


def median_norm_mean(contributions: Sequence[Contribution]) -> Tensors:
    """Return the mean of contributions, each scaled down to the median norm if its own is larger.

    Bounds what one liar can add to (count share) x (median norm). The median of an even number is the mean of the
    middle two, so of two contributions the larger is scaled down to the mean of both norms.
    """
    limit = median(c.norm for c in contributions)
    factors = [1.0 if c.norm <= limit else limit / c.norm for c in contributions]
    return weighted_sum(contributions, [f * share for f, share in zip(factors, shares(contributions), strict=True)])


def shares(contributions: Sequence[Contribution]) -> list[float]:
    """Return count_i / sum_j count_j."""
    total = sum(c.count for c in contributions)
    return [c.count / total for c in contributions]


def weighted_sum(contributions: Sequence[Contribution], weights: Sequence[float]) -> Tensors:
    """Return sum_i weight_i g_i, in the order given. Raises ValueError if there are no contributions."""
    if not contributions:
        raise ValueError("nothing to aggregate")
    result = {name: torch.zeros(shape) for name, shape in contributions[0].specs.items()}
    for c, weight in zip(contributions, weights, strict=True):
        if weight:
            c.add(result, weight)
    return result
