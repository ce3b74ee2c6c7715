"""Put mixers and a rule together to an aggregator, such as `nnm+trimmed_mean`: pilot.aggregation names them all.

A round never fails for want of contributions: `f` is lowered to what their number allows, and the log says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from pilot.aggregation import coordinatewise, linear
from pilot.aggregation.blockwise import BLOCK, by_coordinate
from pilot.aggregation.gram import gram
from pilot.aggregation.means import weighted_sum

if TYPE_CHECKING:
    from pilot.aggregation import Aggregator, Contribution
    from pilot.codec import Tensors

Mixer = Callable[[torch.Tensor, int], torch.Tensor]  # products [n, n], f -> matrix [m, n]
LinearRule = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]  # products [n, n], votes [n], f -> weights [n]
CoordinateRule = Callable[[list[torch.Tensor], int], torch.Tensor]  # n rows [b], f -> [b]

MOST_VOTES = 2  # times the median count: more work than that adds no votes

logger = logging.getLogger(__name__)


def votes(counts: Sequence[int]) -> torch.Tensor:
    """Return each contribution's share of the work [n], fp64. No count is taken for more than twice the median."""
    limit = MOST_VOTES * sorted(counts)[(len(counts) - 1) // 2]
    capped = [min(count, limit) for count in counts]
    return torch.tensor([count / sum(capped) for count in capped], dtype=torch.float64)


def linear_aggregator(
    rule: LinearRule, mixers: Sequence[Mixer] = (), f: int | None = None, block: int = BLOCK
) -> Aggregator:
    """Return the aggregator that sums the contributions with the rule's weights.

    `f`: see `liars`. `block`: coordinates of each contribution that are read at a time.
    """

    def aggregate(contributions: Sequence[Contribution]) -> Tensors:
        usable = finite(contributions, f)
        matrix, products = mix(gram(usable, block), mixers, f)
        shares = torch.full((len(matrix),), 1 / len(matrix)).double() if mixers else votes([c.count for c in usable])
        weights = rule(products, shares, liars(len(matrix), f)) @ matrix
        return weighted_sum(usable, weights.tolist())

    return aggregate


def coordinate_aggregator(
    rule: CoordinateRule, mixers: Sequence[Mixer] = (), f: int | None = None, block: int = BLOCK
) -> Aggregator:
    """Return the aggregator that applies the rule to each coordinate, `block` of them at a time. `f`: see `liars`."""

    def aggregate(contributions: Sequence[Contribution]) -> Tensors:
        usable = finite(contributions, f)
        if not mixers:
            return by_coordinate(usable, lambda rows: rule(list(rows), liars(len(rows), f)), block)
        matrix = mix(gram(usable, block), mixers, f)[0].float()
        mixed = torch.empty(len(matrix), block)
        return by_coordinate(
            usable,
            lambda rows: rule(list(torch.mm(matrix, rows, out=mixed[:, : rows.shape[1]])), liars(len(matrix), f)),
            block,
        )

    return aggregate


def finite(contributions: Sequence[Contribution], f: int | None) -> list[Contribution]:
    """Return those whose norm is finite: the others take no part. Raises ValueError if none is left."""
    usable = [c for c in contributions if math.isfinite(c.norm)]
    if not usable:
        raise ValueError("nothing to aggregate")
    if f is not None and f > (most := liars(len(usable), f)):
        logger.warning("%d contributions withstand %d liars at most: f is %d, not %d", len(usable), most, most, f)
    return usable


def liars(n: int, f: int | None) -> int:
    """Return how many of n contributions a rule is to withstand: `f` but less than n/2, or by default less than n/3."""
    return (n - 1) // 3 if f is None else min(f, (n - 1) // 2)


def mix(products: torch.Tensor, mixers: Sequence[Mixer], f: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the mixers in turn. Returns the matrix [m, n] of all of them, and the mixed inner products [m, m]."""
    matrix = torch.eye(len(products), dtype=torch.float64)
    for mixer in mixers:
        step = mixer(products, liars(len(products), f))
        matrix, products = step @ matrix, step @ products @ step.T
    return matrix, products


LINEAR: dict[str, LinearRule] = {
    "krum": linear.krum,
    "multi_krum": linear.multi_krum,
    "geometric_median": linear.geometric_median,
    "centered_clipping": linear.centered_clipping,
    "mean": linear.mean,
}
COORDINATEWISE: dict[str, CoordinateRule] = {
    "trimmed_mean": coordinatewise.trimmed_mean,
    "coordinate_median": coordinatewise.coordinate_median,
}


def compose(mixers: Sequence[Mixer], rule: str) -> Aggregator:
    """Return the aggregator of a rule behind mixers. Raises ValueError for an unknown rule."""
    if rule in LINEAR:
        return linear_aggregator(LINEAR[rule], mixers)
    if rule in COORDINATEWISE:
        return coordinate_aggregator(COORDINATEWISE[rule], mixers)
    raise ValueError(
        f"--aggregation: {rule} takes no mixers; those that do are {', '.join((*LINEAR, *COORDINATEWISE))}"
    )


trimmed_mean, coordinate_median = compose((), "trimmed_mean"), compose((), "coordinate_median")
krum, multi_krum = compose((), "krum"), compose((), "multi_krum")
geometric_median, centered_clipping = compose((), "geometric_median"), compose((), "centered_clipping")
