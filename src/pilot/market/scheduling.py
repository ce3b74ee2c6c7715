"""How much work a round orders, how long it waits, and when it closes: rules over what the miners did lately."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from pilot.training.diloco import DiLoCo
from pilot.training.ranges import Cursor, size
from protocol import Hotkey, Range, Receipt

FIRST_SHARE = 1024  # micro-batches for a time budget of a miner that nobody knows: what it does not do comes back
MOST_SHARE = 1 << 16
AHEAD = 16
LEAST_BUDGET = 0.25  # of a round: who comes later in it waits for the next
ROUNDS_KNOWN = 8  # that a miner's share and a round's closing are judged by


@dataclass(frozen=True)
class RoundPolicy:
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
    broadcast: str = "full"  # or "delta"
    digest_every: int = 0  # rounds between orders that name the digest of their version's state; 0: none does
    feedback: float = 0.0  # decay of the miners' error feedback; 0: none
    diloco: DiLoCo | None = None  # None: every round is a gradient round

    def inner(self, round: int) -> bool:
        """Whether miners make inner steps in this round."""
        return self.diloco is not None and self.diloco.inner(round)


class History:
    """What the miners did in the last rounds, from receipts alone: a restart reads them again and plans the same."""

    def __init__(self) -> None:
        self._rounds: deque[dict[Hotkey, tuple[int, float, int]]] = deque(maxlen=ROUNDS_KNOWN)
        """Of each a miner's micro-batches, its seconds, and the round."""

    def observe(self, receipts: Iterable[Receipt]) -> None:
        """A round's."""
        self._rounds.append({r.hotkey: (size(r.done), r.seconds, r.round) for r in receipts if r.verdict == "ACCEPTED"})

    def shares(self, hotkeys: Iterable[Hotkey], policy: RoundPolicy, number: int = 0) -> dict[Hotkey, int]:
        """Micro-batches to order in round `number`: with a time budget twice the most that the miner did lately.

        What it did is what it claims, so nobody is ordered more than `AHEAD` times what the median miner is. Who is not
        known begins as the median. Of inner steps nobody is ordered more than a round has.
        """
        inner = policy.diloco.tau * policy.batches if policy.diloco and policy.inner(number) else None
        if not policy.round_s:
            return dict.fromkeys(hotkeys, inner or policy.batches)
        known: dict[Hotkey, int] = {}
        for one in self._rounds:
            for hotkey, (done, _, _) in one.items():
                known[hotkey] = max(known.get(hotkey, 0), 2 * done)
        middle = max(policy.batches, round(median(known.values())) if known else FIRST_SHARE)
        most = min(AHEAD * middle if len(known) > 1 else MOST_SHARE, inner or MOST_SHARE)
        return {hotkey: max(policy.batches, min(known.get(hotkey, middle), most)) for hotkey in hotkeys}

    def closing_s(self, policy: RoundPolicy, number: int = 0) -> float:
        """Seconds from a round's orders by which who answers at all has answered: median + k MAD of the last replies.

        MAD is the median of the absolute deviations from the median; a tenth of the median at least, since replies that
        all took the same time say nothing about the next. Infinite while nobody is known. What gradient rounds took
        says nothing about inner steps.
        """
        if not policy.auto:
            return math.inf
        entries = (entry for one in self._rounds for entry in one.values())
        seconds = [s for _, s, of in entries if policy.inner(of) == policy.inner(number)]
        if not seconds:
            return math.inf
        middle = median(seconds)
        spread = median(abs(s - middle) for s in seconds)
        return middle + policy.deadline_k * max(spread, 0.1 * middle)


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
