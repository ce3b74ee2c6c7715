"""One miner as its validator sees it, whichever of the two opens the connections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from pilot.interfaces import MinerState
from protocol import Hotkey, Order, Signed


@dataclass(eq=False)
class Progress:
    """How far one exchange is, for display."""

    batches: int = 0  # ordered
    batches_done: int = 0
    doing: str = "idle"
    moving: int = 0  # bytes of the transfer under way
    moved: int = 0  # how many of them went

    def move(self, doing: str, size: int, held: int) -> None:
        self.doing, self.moving, self.moved = doing, size, held

    def rest(self, doing: str) -> None:
        self.doing, self.moving = doing, 0


class Meter:
    """What a line carries in one direction, from how long the last larger transfers took."""

    LARGE = 1 << 16  # bytes, below which a transfer is mostly waiting; where all are smaller, the largest tell
    LAST = 8

    def __init__(self) -> None:
        self._largest = 0
        self._seen: deque[float] = deque(maxlen=self.LAST)  # bits a second

    def add(self, size: float, seconds: float) -> None:
        """A transfer of so many bytes, from its request to its end."""
        if size >= min(self._largest or 1, self.LARGE) and seconds > 0:
            self._seen.append(8 * size / seconds)
        self._largest = max(self._largest, int(size))

    @property
    def bps(self) -> float:
        """Bits a second, the median; 0 where nothing was measured."""
        return median(self._seen) if self._seen else 0.0


class RemoteMiner(ABC):
    """Who it is, whether it is there, and what it is doing. `changed` is called when it comes or goes."""

    def __init__(self, name: str, hotkey: Hotkey | None) -> None:
        self.name = name  # where it is
        self.hotkey = hotkey  # None until the first hello
        self.codecs: tuple[str, ...] | None = None  # that it says it knows
        self.announced = False  # it came by itself, and hears itself what is wrong
        self.complaint = ""  # what was last said about it, so that it is said once
        self.changed: Callable[[], object] = lambda: None
        self._under_way: list[Progress] = []  # oldest first; this and what follows is for display
        self._ended = Progress()  # the last of them
        self.latency_s = 0.0
        self.bytes_up = self.bytes_down = 0
        self.up, self.down = Meter(), Meter()
        self._reachable = False

    @property
    def reachable(self) -> bool:
        """It was heard of, and not lost since."""
        return self._reachable

    @reachable.setter
    def reachable(self, there: bool) -> None:
        before, self._reachable = self._reachable, there
        if there != before:
            self.changed()

    @contextmanager
    def shows(self, progress: Progress) -> Iterator[None]:
        """While its exchange is under way."""
        self._under_way.append(progress)
        try:
            yield
        finally:
            self._under_way.remove(progress)
            self._ended = progress

    def link(self) -> MinerState:
        """With the oldest exchange under way; where there is none, the last one."""
        at = self._under_way[0] if self._under_way else self._ended
        state = at.doing if self.reachable else "away"
        if self.reachable and at.moving:
            state += f" {100 * at.moved // at.moving} %"
        sums = (self.bytes_up, self.bytes_down, self.up.bps, self.down.bps)
        return MinerState(self.name, self.hotkey, state, at.batches_done, at.batches, self.latency_s, *sums)

    @abstractmethod
    async def deliver(self, signed: Signed) -> bool:
        """Delivers a receipt or a stop; False where the miner is away or refuses it."""

    @abstractmethod
    async def await_late_reply(self, order: Order, signed: Signed) -> Signed | None:
        """The reply to an order whose round is closed, as it comes; None where none will. Cancelled by its caller."""
