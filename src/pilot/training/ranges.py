"""Hand out disjoint index ranges from one cursor, so that no micro-batch is skipped or ordered twice."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from protocol import MAX_RANGES, Range


@dataclass(frozen=True)
class Cursor:
    """The next index that was never ordered, and the ranges that came back undone, which are ordered first."""

    next: int = 0
    returned: tuple[Range, ...] = ()

    def take(
        self, count: int, limit: int | None = None, avoid: Iterable[Range] = ()
    ) -> tuple[tuple[Range, ...], Cursor]:
        """Return `count` indices as ascending ranges, as many as an order may have, and the cursor after them.

        It takes no index from `limit` on, and of the returned ones none of `avoid`, so it may return fewer than
        `count`, or none.
        """
        taken: list[Range] = []
        left: list[Range] = []  # of the first `passed` ranges
        blocked, passed = merge(avoid), 0
        for entry in self.returned:
            if not count or len(taken) >= MAX_RANGES - 1 or (limit is not None and entry.start >= limit):
                break
            allowed = Range(entry.start, entry.stop if limit is None else min(entry.stop, limit))
            cut: list[Range] = []
            for start, stop in subtract([allowed], overlapping(blocked, entry))[: MAX_RANGES - 1 - len(taken)]:
                if count:
                    cut.append(Range(start, min(stop, start + count)))
                    count -= cut[-1].stop - start
            taken += cut
            left += subtract([entry], cut)
            passed += 1
        if limit is not None:
            count = max(0, min(count, limit - self.next))
        if count:
            taken.append(Range(self.next, self.next + count))
        return merge(taken), Cursor(self.next + count, (*left, *self.returned[passed:]))

    def give_back(self, ranges: Iterable[Range]) -> Cursor:
        return Cursor(self.next, merge([*self.returned, *ranges]))

    def without(self, ranges: Iterable[Range]) -> Cursor:
        """Return the cursor after these ranges were taken, whether or not they already were."""
        ordered = merge(ranges)
        stop = max([self.next, *(r.stop for r in ordered)])
        fresh = [Range(self.next, stop)] if stop > self.next else []
        return Cursor(stop, subtract([*self.returned, *fresh], ordered))

    @property
    def first(self) -> int:
        """Return the lowest index that can still be taken."""
        return self.returned[0].start if self.returned else self.next

    def dumps(self) -> str:
        return json.dumps({"next": self.next, "returned": self.returned})

    @classmethod
    def loads(cls, text: str) -> Cursor:
        state = json.loads(text)
        return cls(state["next"], tuple(Range(*r) for r in state["returned"]))


def merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the same indices in ascending order, with adjacent ranges joined."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and merged[-1].stop == start:
            merged[-1] = Range(merged[-1].start, stop)
        else:
            merged.append(Range(start, stop))
    return tuple(merged)


def subtract(ranges: Iterable[Range], done: Iterable[Range]) -> tuple[Range, ...]:
    """Return the indices of `ranges` that are not in `done`."""
    left: list[Range] = []
    finished = deque(merge(done))
    for start, stop in merge(ranges):
        while finished and finished[0].start < stop:
            if start < finished[0].start:
                left.append(Range(start, finished[0].start))
            start = max(start, finished[0].stop)
            if finished[0].stop > stop:
                break
            finished.popleft()
        if start < stop:
            left.append(Range(start, stop))
    return tuple(left)


def overlapping(ranges: Sequence[Range], span: Range) -> Sequence[Range]:
    """Return those of ascending, disjoint ranges that share an index with `span`."""
    first = bisect_right(ranges, span.start, key=lambda r: r.stop)
    return ranges[first : bisect_left(ranges, span.stop, key=lambda r: r.start)]


def within(done: Iterable[Range], ordered: Iterable[Range]) -> bool:
    """Return whether every index of `done` was ordered."""
    return not subtract(done, ordered)


def size(ranges: Iterable[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def indices(ranges: Iterable[Range]) -> Iterator[int]:
    for start, stop in ranges:
        yield from range(start, stop)
