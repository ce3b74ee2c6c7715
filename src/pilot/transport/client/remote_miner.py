"""One miner as its validator sees it, whichever of the two opens the connections."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from pilot.interfaces import MinerState, Refused
from pilot.transport.auth import open_reply
from protocol import BlobRef, Digest, Fault, Hotkey, Order, ProtocolError, Signed, Version


class Lost(Exception):
    """A request that got no answer: the connection failed, was too slow, or the peer failed inside.

    The same request may work in a moment. `hint` tells the user why it may never work, where there is a sign of that.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class Unproven(Lost):
    """An answer that the peer has not signed as one to the request: a relay may have made or damaged it."""


A = TypeVar("A")


def open_answer(text: bytes, verified: Callable[[Signed], A]) -> A:
    """Return what `verified` makes of a signed answer.

    Raises Unproven for one that is not signed so, and ProtocolError for one that is signed and wrong.
    """
    try:
        signed = Signed.parse(text)
    except ProtocolError as error:
        raise Unproven(f"an answer that is damaged or not its own: {error}") from None
    try:
        return verified(signed)
    except ProtocolError as error:
        if error.fault is Fault.FORGED:
            raise Unproven(f"an answer that is damaged or not its own: {error}") from None
        raise


def pause(attempt: int, most: float = 1.0, jitter: random.Random | None = None) -> float:
    """Return the seconds before another attempt: doubling from 0.05 to `most`, with jitter, so that many spread out."""
    uniform = (jitter or random).uniform
    return min(most, 0.05 * 2.0 ** min(attempt, 10)) * uniform(0.5, 1.5)


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
    """A miner's identity, presence and progress. `changed` is called when it comes or goes."""

    def __init__(self, name: str, hotkey: Hotkey | None) -> None:
        self.name = name  # where it is
        self.hotkey = hotkey  # None until the first hello
        self.codecs: tuple[str, ...] | None = None  # that it says it knows
        self.announced = False  # it came by itself, and hears itself what is wrong
        self.problem = ""  # what was last said about it, so that it is said once
        self.changed: Callable[[], object] = lambda: None
        self._under_way: list[Progress] = []  # oldest first; this and what follows is for display
        self._ended = Progress()  # the last of them
        self.version: Version | None = None  # of the last order that it took, unless that order failed
        self.latency_s = 0.0
        self.bytes_up = self.bytes_down = 0
        self.up, self.down = Meter(), Meter()
        self._reachable = False
        self.lost_because = ""  # why it is not reachable, if that is known

    @property
    def reachable(self) -> bool:
        """It was heard of, and not lost since."""
        return self._reachable

    @reachable.setter
    def reachable(self, there: bool) -> None:
        before, self._reachable = self._reachable, there
        if there:
            self.lost_because = ""
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

    def state(self) -> MinerState:
        """With the oldest exchange under way; where there is none, the last one."""
        at = self._under_way[0] if self._under_way else self._ended
        state = at.doing if self.reachable else "away"
        if self.reachable and at.moving:
            state += f" {100 * at.moved // at.moving} %"
        sums = (self.bytes_up, self.bytes_down, self.up.bps, self.down.bps)
        return MinerState(
            self.name, self.hotkey, state, at.batches_done, at.batches, self.latency_s, *sums, self.lost_because
        )

    @abstractmethod
    async def deliver(self, signed: Signed) -> bool:
        """Delivers a receipt or a stop; False where the miner is away or refuses it."""

    @abstractmethod
    async def await_late_reply(self, order: Order, signed: Signed) -> Signed | None:
        """The reply to an order whose round is closed, as it comes; None where none will. Cancelled by its caller."""


class MinerChannel(RemoteMiner):
    """The requests to a miner that serves, of which an exchange (`Push`) is made.

    Implemented over HTTP (`Peer`) and in an emulation (`simulation.network`). Every request may raise Lost, Refused and
    ProtocolError, and may be repeated.
    """

    jitter: random.Random | None = None  # of the pauses between attempts; None: the process's own

    def wire_bytes(self, kind: str, size: int) -> int:
        """Return how many bytes of a blob or payload count as sent: an emulation lets small models stand for large."""
        return size

    @abstractmethod
    async def post_order(self, signed: Signed) -> bytes:
        """Post an order. Returns the miner's signed Status; raises Refused with the blobs that are missing."""

    @abstractmethod
    async def put_blob(self, ref: BlobRef, rest: memoryview, passed: Callable[[int], object]) -> bytes:
        """Send the last len(rest) bytes of a blob; `passed` counts them. Returns the miner's signed Status."""

    @abstractmethod
    async def poll_reply(self, signed: Signed) -> tuple[int, bytes]:
        """Wait for the reply to an order: 200 and the signed Reply, or after a while 202 and the signed Status."""

    @abstractmethod
    async def read_payload(self, order: Digest, offset: int, size: int, write: Callable[[bytes], object]) -> None:
        """Pass the payload of `size` bytes to `write`, from `offset` on, in order."""

    async def await_late_reply(self, order: Order, signed: Signed) -> Signed | None:
        attempt = 0
        while True:
            try:
                status, body = await self.poll_reply(signed)
                if status == 200:
                    return open_answer(body, lambda reply: (reply, open_reply(reply, order, signed.digest)))[0]
                attempt = 0
            except Lost:
                attempt += 1
            except (Refused, ProtocolError):
                return None
            await asyncio.sleep(pause(attempt, jitter=self.jitter))
