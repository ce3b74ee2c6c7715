"""Weighted means. Both hold one result and one contribution at a time, whatever the number of miners."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from aggregation import Tensors, Weighted

CHUNK = 1 << 15  # values that are widened to fp64 at a time: torch takes one thread for so few, and they stay in cache


def mean(contributions: Sequence[Weighted]) -> Tensors:
    """sum_i w_i g_i with w_i = count_i / sum_j count_j."""
    return _weighted_sum(contributions, [1.0] * len(contributions))


def median_norm_mean(contributions: Sequence[Weighted]) -> Tensors:
    """The mean of contributions that are each scaled down to the median norm where theirs is larger.

    Bounds what one liar can add to (count share) x (median norm). The median of an even number is the mean of the
    middle two, so of two contributions the larger is clipped to half-way between them.
    """
    limit = median(c.norm for c in contributions)
    return _weighted_sum(contributions, [1.0 if c.norm <= limit else limit / c.norm for c in contributions])


def _weighted_sum(contributions: Sequence[Weighted], factors: Sequence[float]) -> Tensors:
    """sum_i factor_i count_i / (sum_j count_j) g_i, in the order given. Raises ValueError for none at all."""
    if not contributions:
        raise ValueError("nothing to aggregate")
    total = sum(c.count for c in contributions)
    result: Tensors = {}
    for c, factor in zip(contributions, factors, strict=True):
        _add(result, c.load(), factor * (c.count / total))
    return result


def _add(result: Tensors, tensors: Mapping[str, torch.Tensor], weight: float) -> None:
    """A function of its own, so that one contribution is gone before the next is loaded."""
    for name, tensor in tensors.items():
        if name in result:
            result[name] += tensor * weight  # multiply, then add: no fused arithmetic, the same on every device
        else:
            result[name] = tensor * weight


def global_norm(tensors: dict[str, torch.Tensor]) -> float:
    """Euclidean norm over all tensors on the CPU, summed in fp64. NaN or infinity anywhere makes it non-finite."""
    total, wide = 0.0, torch.empty(CHUNK, dtype=torch.float64)
    for _, t in sorted(tensors.items()):
        for chunk in torch.split(t.flatten(), CHUNK):
            total += float(wide[: chunk.numel()].copy_(chunk).square_().sum())
    return math.sqrt(total)
