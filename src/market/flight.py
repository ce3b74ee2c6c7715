"""Rounds in flight: orders out, replies in, each verified as it arrives, until all are in or the round is closed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from codec import Codec
from market.courier import Courier
from market.phases import Phases
from market.planning import History, Terms
from market.ports import Network, Store
from market.score import Delivery, Outcome
from market.verify import Contribution, verify
from protocol import Fault, Hotkey, Order, ProtocolError, Range, Signed
from tasks import Task
from values import Blobs, Faulted, Received

if TYPE_CHECKING:
    from codec import Specs

logger = logging.getLogger(__name__)


@dataclass
class Opened:
    """A round in flight."""

    round: int
    started: float
    blobs: Blobs
    orders: dict[Hotkey, Order] = field(default_factory=dict)
    signed: dict[Hotkey, Signed] = field(default_factory=dict)
    exchanges: dict[Hotkey, asyncio.Task[Outcome]] = field(default_factory=dict)
    accepted: dict[Hotkey, asyncio.Event] = field(default_factory=dict)  # the order is at the miner, or all is over
    arrived: set[Hotkey] = field(default_factory=set)  # whole replies
    pending: int = 0  # exchanges
    cut: float | None = None  # told to stop: when it is closed for good
    unsealed: list[Received] = field(default_factory=list)
    sealing: asyncio.Task[None] | None = None  # is making them durable, and what it has taken of them
    last: Received | None = None  # the reply that came when no other was awaited: sealed when nobody waits for the disk


class Flight:
    """The rounds in flight, oldest first. Time is the network's."""

    def __init__(
        self,
        terms: Terms,
        task: Task,
        network: Network,
        store: Store,
        courier: Courier,
        phases: Phases,
        history: History,
        codec: Codec,
        specs: Specs,
    ) -> None:
        self.terms, self.task, self.network, self.store = terms, task, network, store
        self.courier, self.phases, self.history, self.codec, self.specs = courier, phases, history, codec, specs
        self.largest = codec.largest(specs)  # bytes of a payload
        self.rounds: deque[Opened] = deque()
        self.stop_by: float | None = None  # every round is closed then
        self._failed: BaseException | None = None  # our own failure in an exchange
        self._look = asyncio.Event()  # something has happened that somebody may wait for
        self._changed = True  # somebody has come or gone since the last look
        self._watching: asyncio.Task[None] | None = None

    @property
    def outstanding(self) -> list[Range]:
        """What miners have been ordered and have not answered for."""
        return [r for opened in self.rounds for order in opened.orders.values() for r in order.ranges]

    @property
    def stopping(self) -> bool:
        return self.stop_by is not None

    def request_stop(self) -> None:
        self.stop_by = self.network.now() + self.terms.grace_s
        self._look.set()

    async def close(self) -> None:
        """Cancels what is under way."""
        tasks: list[asyncio.Task[Any]] = [t for opened in self.rounds for t in opened.exchanges.values()]
        tasks += [opened.sealing for opened in self.rounds if opened.sealing]
        tasks += [self._watching] if self._watching else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def wait_for_peer(self) -> None:
        """Until somebody is there, the deadline is over, or the run is stopped."""
        until = self.network.now() + self.terms.deadline_s
        while not self.network.peers() and not self.stopping and self.network.now() < until:
            await self._something(until)

    # --- out ------------------------------------------------------------------------------------------------------

    def send(
        self,
        opened: Opened,
        orders: Sequence[tuple[Order, Signed]],
        received: Mapping[Hotkey, Received],
    ) -> None:
        """Starts the exchanges, but for replies that a process before this one has received."""
        before = self.rounds[-1] if self.rounds and self.rounds[-1] is not opened else None
        for order, signed in orders:
            hotkey = order.hotkey
            opened.orders[hotkey], opened.signed[hotkey] = order, signed
            opened.accepted[hotkey] = asyncio.Event()
            first = before.accepted.get(hotkey) if before and order.staleness else None
            task = asyncio.create_task(self._exchange(opened, hotkey, received.get(hotkey), first))
            opened.exchanges[hotkey] = task
            opened.pending += 1
            task.add_done_callback(partial(self._ended, opened, hotkey))

    def _ended(self, opened: Opened, hotkey: Hotkey, task: asyncio.Task[Outcome]) -> None:
        if not task.cancelled():
            self._failed = self._failed or task.exception()
        opened.pending -= 1
        opened.accepted[hotkey].set()
        self._look.set()

    async def _exchange(
        self, opened: Opened, hotkey: Hotkey, received: Received | None, first: asyncio.Event | None
    ) -> Outcome:
        """One miner's part: order out, reply and payload in, verified. A fault is an outcome, not an error.

        `first`: the order before this one is at the miner.
        """
        order, signed = opened.orders[hotkey], opened.signed[hotkey]
        try:
            if received is None or received.reply.order != signed.digest:
                if first is not None:
                    await first.wait()
                path = self.store.payload_path(opened.round, hotkey)
                sent, accepted = self.network.now(), opened.accepted[hotkey].set
                received = await self.network.exchange(order, signed, opened.blobs, path, self.largest, accepted)
                received = replace(received, seconds=self.network.now() - sent)
                if received.seconds > order.deadline_s:
                    self.store.discard(opened.round, hotkey)
                    raise Faulted(Fault.LATE, f"no whole reply within {order.deadline_s:g} s")
                if opened.pending == 1 and opened.last is None and opened is self.rounds[0]:
                    opened.last = received
                else:
                    self._seal(opened, received)
            opened.arrived.add(hotkey)
            size = received.reply.payload_bytes / 1e6
            contribution = await self.phases.run("verify", size, self.verify, order, received)
            logger.debug(
                "round %d: %s sent %d bytes after %.3f s, norm %.4g",
                *(opened.round, hotkey[:8], received.reply.payload_bytes, received.seconds, contribution.norm),
            )
            return Delivery(received, contribution)
        except ProtocolError as error:
            return Faulted(error.fault, str(error))
        except Faulted as fault:
            return fault

    def verify(self, order: Order, received: Received) -> Contribution:
        """Raises ProtocolError with the fault."""
        payload = partial(self.store.payload, order.round, order.hotkey)
        return verify(order, received.reply, payload, codec=self.codec, specs=self.specs, count=self.task.count)

    # --- back -----------------------------------------------------------------------------------------------------

    async def collect(self, admit: Callable[[Opened], Awaitable[None]]) -> dict[Hotkey, Outcome]:
        """What came of each order of the oldest round. Every exchange ends by itself, or with the round.

        `admit` may order something from who has come since.
        """
        opened = self.rounds[0]
        while opened.pending:
            if self._changed:
                self._changed = False
                await admit(opened)
            now = self.network.now()
            if opened.cut is None and now >= self._closing(opened):
                for other in self.rounds if self.stopping else [opened]:
                    self._tell_stop(other)
                opened.cut = min(now + self.terms.grace_s, math.inf if self.stop_by is None else self.stop_by)
            if opened.cut is None or now < opened.cut:
                await self._something(self._closing(opened) if opened.cut is None else opened.cut)
            else:
                await self._cut_off(opened)
        self._changed = True  # for the next round, who is not in it has come too
        opened.blobs = {}  # their memory is the next version's
        seconds = self.network.now() - opened.started
        late = Faulted(Fault.LATE, f"no whole reply within {seconds:.1f} s, when the round was closed")
        return {hotkey: late if task.cancelled() else task.result() for hotkey, task in opened.exchanges.items()}

    def _closing(self, opened: Opened) -> float:
        """When those that have not answered are told to send what they have: never before enough have answered."""
        if self.stopping:
            return -math.inf
        answered = len(opened.exchanges) - opened.pending
        if answered < self.terms.quorum * len(opened.exchanges):
            return math.inf
        return opened.started + self.history.closing_s(self.terms)

    def _tell_stop(self, opened: Opened) -> None:
        for hotkey, task in opened.exchanges.items():
            if not task.done() and hotkey not in opened.arrived:
                self.courier.stop(opened.orders[hotkey], opened.signed[hotkey].digest)

    async def _cut_off(self, opened: Opened) -> None:
        slow = {hotkey: task for hotkey, task in opened.exchanges.items() if hotkey not in opened.arrived}
        for task in slow.values():
            task.cancel()
        await asyncio.wait(opened.exchanges.values())
        for hotkey in slow:  # what has come of a payload is of no use, and its file as large as the whole
            self.store.discard(opened.round, hotkey)

    async def sealed(self, opened: Opened) -> None:
        """Everything that was received is durable."""
        if opened.last is not None:
            self._seal(opened, opened.last)
        if opened.sealing is not None:
            await opened.sealing

    def _seal(self, opened: Opened, received: Received) -> None:
        opened.unsealed.append(received)
        if opened.sealing is None:
            opened.sealing = asyncio.create_task(self._seal_all(opened))

    async def _seal_all(self, opened: Opened) -> None:
        """What comes while the disk is at work goes to it together."""
        while opened.unsealed:
            together, opened.unsealed = opened.unsealed, []
            await asyncio.to_thread(self.store.seal, *together)
        opened.sealing = None

    # --- waiting --------------------------------------------------------------------------------------------------

    async def _something(self, until: float) -> None:
        """Until an exchange ends, a miner comes or goes, the run is stopped, or it is so late."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        if self._watching.done():
            self._watching.result()
        if self._failed is not None:
            raise self._failed
        self.courier.check()
        left_s = until - self.network.now()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if left_s == math.inf else max(0.0, left_s)):
                await self._look.wait()
        self._look.clear()

    async def _watch(self) -> None:
        try:
            while True:
                await self.network.wait_for_change()
                self._changed = True
                self._look.set()
        finally:
            self._look.set()
