"""How much work a round orders, how long it waits, and when it closes: rules over what the miners did lately."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from market.cursor import Cursor, size
from protocol import Hotkey, Range, Receipt

FIRST_SHARE = 1024  # micro-batches for a time budget of a miner that nobody knows: what it does not do comes back
LEAST_BUDGET = 0.25  # of a round: who comes later in it waits for the next
ROUNDS_KNOWN = 8  # that a miner's share and a round's closing are judged by


@dataclass(frozen=True)
class Terms:
    """What every order of a run says, and how the validator keeps time."""

    run: str
    batches: int  # micro-batches a miner and round, with a time budget at least
    deadline_s: float
    patience: int  # rounds in a row without a good reply
    codec_up: str
    codec_down: str
    round_s: float = 0.0  # time budget of a round; 0: `batches` each
    auto: bool = False  # close a round when most have answered that would
    quorum: float = 0.5  # share of the orders that must be answered before
    deadline_k: float = 4.0
    grace_s: float = 10.0  # for partial work, once miners are told to stop
    overlap: int = 0  # versions that a miner may be behind
    once: bool = False  # no index of the next epoch before all of this one are accepted


class History:
    """What the miners did in the last rounds, from receipts alone: a restart reads them again and plans the same."""

    def __init__(self) -> None:
        self._done: dict[Hotkey, deque[int]] = {}  # micro-batches of the last accepted replies
        self._seconds: deque[list[float]] = deque(maxlen=ROUNDS_KNOWN)  # that each round's replies took

    def observe(self, receipts: Iterable[Receipt]) -> None:
        """A round's."""
        good = [r for r in receipts if r.verdict == "ACCEPTED"]
        for r in good:
            self._done.setdefault(r.hotkey, deque(maxlen=ROUNDS_KNOWN)).append(size(r.done))
        if good:
            self._seconds.append([r.seconds for r in good])

    def share(self, hotkey: Hotkey, terms: Terms) -> int:
        """Micro-batches to order: with a time budget twice the most that the miner did lately."""
        if not terms.round_s:
            return terms.batches
        done = self._done.get(hotkey)
        return max(terms.batches, 2 * max(done)) if done else max(terms.batches, FIRST_SHARE)

    def closing_s(self, terms: Terms) -> float:
        """Seconds from a round's orders by which who answers at all has answered: median + k MAD of the last replies.

        MAD is the median of the absolute deviations from the median; a tenth of the median at least, since replies that
        all took the same time say nothing about the next. Infinite while nobody is known.
        """
        if not terms.auto or not self._seconds:
            return math.inf
        seconds = [s for one in self._seconds for s in one]
        middle = median(seconds)
        spread = median(abs(s - middle) for s in seconds)
        return middle + terms.deadline_k * max(spread, 0.1 * middle)


def epoch_end(cursor: Cursor, outstanding: Iterable[Range], batches_per_epoch: int) -> int:
    """The index after the earliest epoch that is not accepted as a whole."""
    first = min([cursor.first, *(r.start for r in outstanding)])
    return (first // batches_per_epoch + 1) * batches_per_epoch


def shares(cursor: Cursor, wanted: Mapping[Hotkey, int], limit: int | None) -> dict[Hotkey, int]:
    """What each miner is ordered; where less is left below `limit` than they could do, in proportion."""
    if limit is None:
        return dict(wanted)
    left = max(0, limit - cursor.next) + sum(max(0, min(limit, stop) - start) for start, stop in cursor.returned)
    total = sum(wanted.values())
    return {hotkey: min(count, math.ceil(left * count / total)) for hotkey, count in wanted.items()}
