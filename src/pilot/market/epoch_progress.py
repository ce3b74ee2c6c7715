"""How far an epoch is, by what was accepted: for display and metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from pilot.training.ranges import Cursor, merge, subtract
from protocol import Range


@dataclass(frozen=True)
class Progress:
    """Of the earliest epoch that is not complete, the micro-batches in the model."""

    epoch: int
    done: int
    total: int
    shards: tuple[tuple[int, int], ...]  # (done, total) of each slice of the epoch's indices, in their order

    def metrics(self) -> dict[str, float | int | str]:
        """As a part of a round's row; the shards as "32/32 12/32 …"."""
        shards = " ".join(f"{done}/{total}" for done, total in self.shards)
        return {"epoch": self.epoch, "epoch_done": self.done, "epoch_total": self.total, "shards": shards}


def progress(cursor: Cursor, outstanding: Iterable[Range], batches_per_epoch: int, shards: int = 16) -> Progress:
    """Done is what was taken from the cursor, did not come back, and is not `outstanding`, in orders of open rounds.

    Outstanding ranges are disjoint; whether the cursor is the one before or after they were taken makes no difference.
    An epoch has at most as many shards as micro-batches, whose sizes differ by one at most.
    """
    outstanding = merge(outstanding)
    taken = cursor.without(outstanding)
    undone = merge([*taken.returned, *outstanding])
    epoch = (undone[0].start if undone else taken.next) // batches_per_epoch
    first, shards = epoch * batches_per_epoch, min(shards, batches_per_epoch)
    stop = min(first + batches_per_epoch, taken.next)
    done = subtract([Range(first, stop)], undone) if first < stop else ()
    cuts = [first + batches_per_epoch * shard // shards for shard in range(shards + 1)]
    slices = tuple((_overlap(done, a, b), b - a) for a, b in pairwise(cuts))
    return Progress(epoch, sum(d for d, _ in slices), batches_per_epoch, slices)


def _overlap(ranges: Iterable[Range], start: int, stop: int) -> int:
    """Indices of disjoint ranges that lie in [start, stop)."""
    return sum(max(0, min(r.stop, stop) - max(r.start, start)) for r in ranges)
