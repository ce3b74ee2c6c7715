"""An emulated link: bandwidth, latency, jitter, loss and pauses, in the running loop's (virtual) time.

    a message   one-way latency, plus up to `jitter_s`; lost with chance `loss`, and then sent again after `timeout_s`
    its bytes   share the bandwidth of their direction evenly with all that are under way; the part `loss` of them is
                sent twice, and of that again, so they take 1 / (1 - loss) times as long
    a pause     nothing moves, in neither direction: what is under way goes on afterwards

All randomness comes from a generator seeded by the link's seed and name, so a run is the same each time.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down"]  # miner to validator, validator to miner
Pause = tuple[float, float]  # seconds of the loop's clock: from, until


@dataclass(frozen=True)
class LinkSpec:
    """What a link is like. Raises ValueError for what no link can be."""

    up_bps: float = math.inf  # bits per second
    down_bps: float = math.inf
    latency_s: float = 0.0  # one way
    jitter_s: float = 0.0
    loss: float = 0.0
    timeout_s: float = 1.0
    pauses: tuple[Pause, ...] = ()

    def __post_init__(self) -> None:
        if not (self.up_bps > 0 and self.down_bps > 0):
            raise ValueError(f"a link of {self.up_bps:g} bit/s up, {self.down_bps:g} down: both must be above 0")
        if not (0 <= self.latency_s < math.inf and 0 <= self.jitter_s < math.inf and 0 <= self.timeout_s < math.inf):
            raise ValueError(f"a link with {self.latency_s:g} s of latency, {self.jitter_s:g} s of jitter")
        if not 0 <= self.loss < 1:
            raise ValueError(f"a link that loses {self.loss:g} of what it carries: must be at least 0 and below 1")
        edges = [edge for pause in self.pauses for edge in pause]
        if not all(a < b for a, b in self.pauses) or edges != sorted(edges) or not all(map(math.isfinite, edges)):
            raise ValueError(f"pauses {self.pauses}: must be (from, until), one after the other")


class EmulatedLink:
    """A link in use."""

    def __init__(self, spec: LinkSpec, seed: int = 0, name: str = "") -> None:
        self.spec = spec
        self._random = random.Random(f"{seed}/{name}")
        self._pipes = {
            "up": _Pipe(spec.up_bps * (1 - spec.loss), spec.pauses),
            "down": _Pipe(spec.down_bps * (1 - spec.loss), spec.pauses),
        }

    async def travel(self, direction: Direction, size: float) -> None:
        """Returns when a message of `size` bytes has arrived."""
        spec = self.spec
        delay = spec.latency_s + (self._random.uniform(0, spec.jitter_s) if spec.jitter_s else 0.0)
        while spec.loss and self._random.random() < spec.loss:
            delay += spec.timeout_s
        if delay:
            await asyncio.sleep(delay)
        await self._pipes[direction].carry(8 * size)


class _Pipe:
    """One direction: a fluid that all transfers under way get equal parts of (processor sharing)."""

    def __init__(self, bps: float, pauses: Sequence[Pause]) -> None:
        self._bps, self._pauses = bps, pauses
        self._starts = [start for start, _ in pauses]
        self._served = 0.0  # bits that a transfer which is there from the start has got by `_looked`
        self._looked = 0.0
        self._under_way: list[tuple[float, int, asyncio.Future[None]]] = []  # a heap, by `_served` at their end
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    async def carry(self, bits: float) -> None:
        loop = asyncio.get_running_loop()
        if math.isinf(self._bps):
            if (wait := self._end(loop.time(), 0.0) - loop.time()) > 0:
                await asyncio.sleep(wait)
            return
        self._look()
        transfer = (self._served + bits, next(self._numbers), loop.create_future())
        heapq.heappush(self._under_way, transfer)
        self._set_timer()
        try:
            await transfer[2]
        finally:
            if transfer in self._under_way:  # cancelled: the others share what it leaves
                self._look()
                self._under_way.remove(transfer)
                heapq.heapify(self._under_way)
                self._set_timer()

    def _look(self) -> None:
        """`_served` as it is now."""
        now = asyncio.get_running_loop().time()
        if self._under_way:
            moving = now - self._looked - sum(_overlap(pause, self._looked, now) for pause in self._since(self._looked))
            self._served += max(moving, 0.0) * self._bps / len(self._under_way)
        self._looked = now

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._under_way:
            seconds = max(self._under_way[0][0] - self._served, 0.0) * len(self._under_way) / self._bps
            at = self._end(self._looked, seconds)
            self._timer = asyncio.get_running_loop().call_at(at, self._arrived)

    def _arrived(self) -> None:
        """The first one's end, and that of those that end with it."""
        self._look()
        self._served = max(self._served, self._under_way[0][0])  # rounding shall not keep it
        while self._under_way and self._under_way[0][0] <= self._served:
            _, _, future = heapq.heappop(self._under_way)
            if not future.done():
                future.set_result(None)
        self._timer = None
        self._set_timer()

    def _end(self, begin: float, seconds: float) -> float:
        """When so many seconds have passed in which something moves."""
        at = begin
        for start, stop in self._since(begin):
            if at < start and at + seconds <= start:
                break
            seconds -= max(start - at, 0.0)
            at = max(at, stop)
        return at + seconds

    def _since(self, time: float) -> Sequence[Pause]:
        """The pauses that are not over."""
        first = max(bisect_right(self._starts, time) - 1, 0)
        return [pause for pause in self._pauses[first:] if pause[1] > time]


def _overlap(pause: Pause, begin: float, end: float) -> float:
    return max(min(pause[1], end) - max(pause[0], begin), 0.0)
