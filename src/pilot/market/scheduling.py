"""Decide how much work a round orders, in which codecs, how long it waits, and when it closes.

The rules follow from what miners did lately and what they say they can read; a restart decides the same again.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, takewhile
from statistics import median

from pilot.codec import BITS
from pilot.training.diloco import DiLoCo
from pilot.training.ranges import Cursor, merge, overlapping, size, subtract
from protocol import Digest, Hotkey, Order, Range, Receipt, Update, one_line

FIRST_SHARE = 1024  # micro-batches for a miner without history in a round with a time budget; what is undone returns
MAX_SHARE = 1 << 16
MAX_RATIO = 16  # to the median miner's share
MIN_BUDGET = 0.25  # share of a round's time; a miner that comes later waits for the next round
HISTORY_ROUNDS = 8  # that shares and closing times are computed from
WHOLE = "fp32"  # codec of whole states, which every release reads
SHOWN = 200  # characters of a miner's list of codecs in a log line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundPolicy:
    """The settings of a run's rounds: what every order says, and how the validator keeps time."""

    run: str
    batches: int  # micro-batches a miner and round; with a time budget, at least so many
    deadline_s: float
    patience: int  # rounds in a row without a good reply before the run ends, if it took `patience_s` as well
    codec_up: str
    codec_down: str
    round_s: float = 0.0  # time budget of a round; 0: `batches` each
    auto: bool = False  # close a round early, by `quorum` and `deadline_k`
    quorum: float = 0.5  # share of the orders that must be answered before a round closes early
    deadline_k: float = 4.0
    patience_s: float = 0.0  # seconds without a good reply before the run ends; with it such rounds have pauses between
    grace_s: float = 10.0  # seconds for partial work after miners are told to stop
    overlap: int = 0  # versions that a miner may be behind
    once: bool = False  # order nothing of the next epoch before all of this one is accepted
    broadcast: str = "full"  # or "delta"
    digest_every: int = 0  # rounds between orders that carry the state's digest; 0: none
    feedback: float = 0.0  # decay of the miners' error feedback; 0: none
    norm_bound: float = 10.0  # largest norm of a contribution, in those that are usual; 0: any (norm_bound.py)
    rollback: int = 3  # steps in a row that may be undone because the model diverged
    diloco: DiLoCo | None = None  # None: every round is a gradient round

    def inner(self, round: int) -> bool:
        """Return whether miners make inner steps in this round."""
        return self.diloco is not None and self.diloco.inner(round)


# --- shares and closing times -----------------------------------------------------------------------------------------


class History:
    """The work of the last rounds, read from orders and receipts alone."""

    def __init__(self) -> None:
        # For each round, by miner: micro-batches done, seconds, and the round.
        self._rounds: deque[dict[Hotkey, tuple[int, float, int]]] = deque(maxlen=HISTORY_ROUNDS)
        self._failed: deque[dict[Hotkey, bool]] = deque(maxlen=HISTORY_ROUNDS)  # whether nothing was accepted
        self._undone: deque[dict[Hotkey, tuple[Range, ...]]] = deque(maxlen=HISTORY_ROUNDS)

    def observe(self, receipts: Iterable[Receipt], orders: Mapping[Digest, Order] | None = None) -> None:
        """Add the receipts of a round, and the orders that they are for, by digest."""
        done: dict[Hotkey, tuple[int, float, int]] = {}
        failed: dict[Hotkey, bool] = {}
        undone: dict[Hotkey, tuple[Range, ...]] = {}
        for r in receipts:
            accepted = r.verdict == "ACCEPTED"
            if accepted:
                done[r.hotkey] = size(r.done), r.seconds, r.round
            failed[r.hotkey] = failed.get(r.hotkey, True) and not accepted
            order = (orders or {}).get(r.order)
            if order and (left := subtract(order.ranges, r.done)):
                undone[r.hotkey] = merge([*undone.get(r.hotkey, ()), *left])
        self._rounds.append(done)
        self._failed.append(failed)
        self._undone.append(undone)

    def failures(self, hotkey: Hotkey) -> int:
        """Return in how many of the miner's last rounds nothing of it was accepted, counted back from the newest."""
        own = (failed[hotkey] for failed in reversed(self._failed) if hotkey in failed)
        return sum(1 for _ in takewhile(bool, own))

    def left_undone(self) -> dict[Hotkey, tuple[Range, ...]]:
        """Return the indices that each miner was the last to be ordered without doing them."""
        found: dict[Hotkey, tuple[Range, ...]] = {}
        later: tuple[Range, ...] = ()  # what newer rounds left undone
        for undone in reversed(self._undone):
            for hotkey, ranges in undone.items():
                newer = overlapping(later, Range(ranges[0].start, ranges[-1].stop))
                found[hotkey] = merge([*found.get(hotkey, ()), *subtract(ranges, newer)])
            later = merge([*later, *subtract(chain.from_iterable(undone.values()), later)])
        return found

    def shares(self, hotkeys: Iterable[Hotkey], policy: RoundPolicy, number: int = 0) -> dict[Hotkey, int]:
        """Return the micro-batches to order from each miner in round `number`.

        With a time budget that is twice the most that the miner did lately. Since a miner says itself what it did, its
        share is at most MAX_RATIO times the median share. A miner without history gets the median share. In a DiLoCo
        round no miner gets more than the round's inner steps.

        The miners that failed least come first, so that they get what others left undone. Each failure in a row that a
        miner has more than these halves its share.
        """
        inner = policy.diloco.tau * policy.batches if policy.diloco and policy.inner(number) else None
        failures = {hotkey: self.failures(hotkey) for hotkey in sorted(hotkeys)}
        wanted = self._shares(failures, policy, inner)
        least, fewest = policy.batches if inner else 1, min(failures.values(), default=0)
        ordered = sorted(failures, key=lambda hotkey: failures[hotkey])
        return {h: max(least, wanted[h] >> (failures[h] - fewest)) for h in ordered}

    def _shares(self, hotkeys: Iterable[Hotkey], policy: RoundPolicy, inner: int | None) -> dict[Hotkey, int]:
        if not policy.round_s:
            return dict.fromkeys(hotkeys, inner or policy.batches)
        known: dict[Hotkey, int] = {}
        for done_by in self._rounds:
            for hotkey, (done, _, _) in done_by.items():
                known[hotkey] = max(known.get(hotkey, 0), 2 * done)
        middle = max(policy.batches, round(median(known.values())) if known else FIRST_SHARE)
        most = min(MAX_RATIO * middle if len(known) > 1 else MAX_SHARE, inner or MAX_SHARE)
        return {hotkey: max(policy.batches, min(known.get(hotkey, middle), most)) for hotkey in hotkeys}

    def closing_s(self, policy: RoundPolicy, number: int = 0) -> float:
        """Return after how many seconds round `number` may close: median + k MAD of the last replies' seconds.

        MAD is the median absolute deviation, at least a tenth of the median, since equal times say nothing about the
        next. Gradient rounds and DiLoCo rounds are looked at separately. Infinite without history.
        """
        if not policy.auto:
            return math.inf
        entries = (entry for done_by in self._rounds for entry in done_by.values())
        seconds = [s for _, s, round in entries if policy.inner(round) == policy.inner(number)]
        if not seconds:
            return math.inf
        middle = median(seconds)
        spread = median(abs(s - middle) for s in seconds)
        return middle + policy.deadline_k * max(spread, 0.1 * middle)


def epoch_end(cursor: Cursor, outstanding: Iterable[Range], batches_per_epoch: int) -> int:
    """Return the end of the earliest epoch that is not wholly accepted."""
    first = min([cursor.first, *(r.start for r in outstanding)])
    return (first // batches_per_epoch + 1) * batches_per_epoch


def shares(cursor: Cursor, wanted: Mapping[Hotkey, int], limit: int | None) -> dict[Hotkey, int]:
    """Return each miner's share; in proportion to `wanted` if fewer indices are left below `limit`."""
    if limit is None:
        return dict(wanted)
    left = max(0, limit - cursor.next) + sum(max(0, min(limit, stop) - start) for start, stop in cursor.returned)
    total = sum(wanted.values())
    return {hotkey: min(count, math.ceil(left * count / total)) for hotkey, count in wanted.items()}


# --- progress ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpochProgress:
    """The accepted micro-batches of the earliest epoch that is not complete, for display and metrics."""

    epoch: int
    done: int
    total: int
    shards: tuple[tuple[int, int], ...]  # (done, total) of each slice of the epoch's indices, in order

    def metrics(self) -> dict[str, float | int | str]:
        """Return the metrics of a round's row; the shards are written as "32/32 12/32 …"."""
        shards = " ".join(f"{done}/{total}" for done, total in self.shards)
        return {"epoch": self.epoch, "epoch_done": self.done, "epoch_total": self.total, "shards": shards}


def epoch_progress(
    cursor: Cursor, outstanding: Iterable[Range], batches_per_epoch: int, shards: int = 16
) -> EpochProgress:
    """Count as done every index that was ordered, has not come back, and is not `outstanding` in an open round.

    Outstanding ranges are disjoint; the cursor may be the one before or after they were taken. An epoch has at most as
    many shards as micro-batches, and their sizes differ by at most one.
    """
    outstanding = merge(outstanding)
    taken = cursor.without(outstanding)
    undone = merge([*taken.returned, *outstanding])
    epoch = (undone[0].start if undone else taken.next) // batches_per_epoch
    first, shards = epoch * batches_per_epoch, min(shards, batches_per_epoch)
    stop = min(first + batches_per_epoch, taken.next)
    done = subtract([Range(first, stop)], undone) if first < stop else ()
    cuts = [first + batches_per_epoch * shard // shards for shard in range(shards + 1)]
    slices = tuple(
        (sum(max(0, min(r.stop, high) - max(r.start, low)) for r in done), high - low) for low, high in pairwise(cuts)
    )
    return EpochProgress(epoch, sum(d for d, _ in slices), batches_per_epoch, slices)


# --- codecs of other releases -----------------------------------------------------------------------------------------


class CodecFallback:
    """Choose the codecs of an order to a miner that does not know the run's.

    Miners of other releases take part all the same. What they name costs bytes: the smallest codec of theirs that is no
    coarser than the run's up, and whole states down, which the validator encodes before it sends the round's orders. A
    miner that names no codec of ours buys nothing by that: it gets the run's, and may refuse them.
    """

    def __init__(self, known: Callable[[Hotkey], Sequence[str] | None]) -> None:
        """`known` returns the codecs that a miner has named; None before it was heard."""
        self._known = known
        self._logged: set[tuple[Hotkey, str]] = set()

    def up(self, hotkey: Hotkey, codec: str) -> str:
        """Return the codec of the miner's payload."""
        known = self._lacking(hotkey, codec)
        if not known:
            return codec
        finer = [name for name in known if BITS[name] >= BITS.get(codec, 0.0)]
        found = min(finer, key=BITS.__getitem__) if finer else max(known, key=BITS.__getitem__)
        self._log_once(hotkey, codec, f"sends {found}")
        return found

    def down(self, hotkey: Hotkey, codec: str) -> str:
        """Return the codec of updates that the miner's order names."""
        if not self._lacking(hotkey, codec):
            return codec
        self._log_once(hotkey, codec, "gets whole states")
        return WHOLE

    def needs_state(self, hotkey: Hotkey, update: Update) -> bool:
        """Return whether the update has a step that the miner cannot read."""
        return any(self._lacking(hotkey, step.codec) for step in update.steps)

    def _lacking(self, hotkey: Hotkey, codec: str) -> list[str]:
        """Return the codecs of ours that the miner knows, if `codec` is not one of them; otherwise none."""
        named = self._known(hotkey)
        if named is None or codec in named:
            return []
        known = [name for name in BITS if name in named]
        if not known:
            self._log_once(hotkey, codec, "gets orders in it all the same")
        return known

    def _log_once(self, hotkey: Hotkey, codec: str, instead: str) -> None:
        if (hotkey, instead) not in self._logged:
            self._logged.add((hotkey, instead))
            knows = one_line(", ".join(self._known(hotkey) or ()))[:SHOWN] or "none"
            logger.warning("%s does not know codec %s (it knows: %s): it %s", hotkey, codec, knows, instead)
