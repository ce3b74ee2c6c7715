"""Bound what one contribution may move, by the norms of those that were accepted lately.

    usual      median of the last rounds' norms; in the first rounds no more than the lowest of the round's own
    refused    a norm of more than `--norm-bound` times the usual one, and also more than that for so much work
    recorded   of each round the accepted norm that is closest to the usual one, in its metrics

A restart reads the same numbers from the ledger. Two miners that disagree in the first rounds cannot be told apart, so
the larger contribution is refused: the model is safe then, whichever of them is wrong. If all contributions of a round
are refused, the record moves up to the bound, so that a change that stays is accepted after some rounds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median_low
from typing import TypeVar

from pilot.market.scheduling import HISTORY_ROUNDS, RoundPolicy
from pilot.market.verify import Contribution

SETTLED = HISTORY_ROUNDS // 2  # rounds of history that outweigh a round's own norms
NORM, BY_WORK, BUFFERS = "gradient_norm", "gradient_norm_by_work", "buffers_norm"

K = TypeVar("K")


class NormBound:
    """The norms of the last rounds, and what they allow."""

    def __init__(self, policy: RoundPolicy) -> None:
        self.policy = policy
        self._rounds: deque[tuple[int, dict[str, float]]] = deque(maxlen=HISTORY_ROUNDS)

    def observe(self, round: int, metrics: Mapping[str, float | int | str]) -> None:
        """Add the metrics of a committed round, with what `judge` returned for it."""
        self._rounds.append((round, {n: float(metrics[n]) for n in (NORM, BY_WORK, BUFFERS) if n in metrics}))

    def judge(self, round: int, contributions: Mapping[K, Contribution]) -> tuple[dict[K, str], dict[str, float]]:
        """Return why contributions of a round are refused, and the metrics that the round's record keeps."""
        sizes = {key: self._sizes(round, c) for key, c in contributions.items()}
        usual = {name: self._usual(round, name, sizes) for name in (NORM, BY_WORK, BUFFERS)}
        refused = {key: why for key, own in sizes.items() if (why := self._reason(own, usual))}
        counted = {key: own for key, own in sizes.items() if key not in refused} or sizes
        row = {name: _closest(value, counted, name, self.policy.norm_bound) for name, value in usual.items() if value}
        return refused, row

    def _sizes(self, round: int, c: Contribution) -> dict[str, float]:
        """Return the norms of a contribution.

        The mean over little work has more noise, by the root of the work; the sum of few inner steps is shorter.
        """
        by_work = c.norm / max(1, c.count) if self.policy.inner(round) else c.norm * math.sqrt(c.count)
        return {NORM: c.norm, BY_WORK: by_work, BUFFERS: c.buffers_norm}

    def _usual(self, round: int, name: str, sizes: Mapping[K, Mapping[str, float]]) -> float:
        """Return the usual norm in such rounds; 0 if nothing is known of it."""
        inner = self.policy.inner(round)
        before = [row[name] for number, row in self._rounds if name in row and self.policy.inner(number) == inner]
        now = [own[name] for own in sizes.values() if own[name]]
        known = [median_low(values) for values in (before, now) if values]
        return median_low(before) if len(before) >= SETTLED else min(known, default=0.0)

    def _reason(self, own: Mapping[str, float], usual: Mapping[str, float]) -> str:
        """Return why a contribution is refused, or nothing."""
        most = self.policy.norm_bound or math.inf
        beyond = {name for name, value in own.items() if usual[name] and value > most * usual[name]}
        for name, what in ((NORM, "norm"), (BUFFERS, "norm of the buffers")):
            if name in beyond and (name is not NORM or BY_WORK in beyond):
                return f"{what} {own[name]:.4g}, the usual one is {usual[name]:.4g}, and --norm-bound is {most:g}"
        return ""


def _closest(usual: float, sizes: Mapping[K, Mapping[str, float]], name: str, most: float) -> float:
    """Return the norm closest to the usual one, at most the bound; the usual one if there is none."""
    found = [min(own[name], (most or math.inf) * usual) for own in sizes.values() if own[name]]
    return min(found, key=lambda value: abs(math.log(value / usual)), default=usual)
