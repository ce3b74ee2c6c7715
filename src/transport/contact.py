"""One miner as its validator sees it, whichever of the two opens the connections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from protocol import Hotkey, Order, Signed
from values import Link


class Contact(ABC):
    """Who it is, whether it is there, and what it is doing. `changed` is called when it comes or goes."""

    def __init__(self, name: str, hotkey: Hotkey | None) -> None:
        self.name = name  # where it is
        self.hotkey = hotkey  # None until the first hello
        self.announced = False  # it came by itself, and hears itself what is wrong
        self.complaint = ""  # what was last said about it, so that it is said once
        self.changed: Callable[[], object] = lambda: None
        self.doing = "idle"  # this and what follows is for display
        self.moving = self.moved = 0  # bytes of the transfer under way, and how many of them went
        self.batches_done = self.batches = 0
        self.latency_s = 0.0
        self.bytes_up = self.bytes_down = 0
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

    def link(self) -> Link:
        state = self.doing if self.reachable else "away"
        if self.reachable and self.moving:
            state += f" {100 * self.moved // self.moving} %"
        return Link(
            self.name, self.hotkey, state, self.batches_done, self.batches, self.latency_s, self.bytes_up,
            self.bytes_down,
        )  # fmt: skip

    @abstractmethod
    async def tell(self, signed: Signed) -> bool:
        """Delivers a receipt or a stop; False where the miner is away or refuses it."""

    @abstractmethod
    async def late(self, order: Order, signed: Signed) -> Signed | None:
        """The reply to an order whose round is closed, as it comes; None where none will. Cancelled by its caller."""
