"""Rounds in flight: orders out, replies in, each verified as it arrives, until all are in or the round is closed.

An order is settled when its round is closed. But inner steps (DiLoCo) are a long work: an order of these that is under
way then is carried into the next round, once. Its exchange goes on, its ranges stay ordered; in that round it counts
like any other, or is late.
"""

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

from typing_extensions import Buffer

from pilot.codec import Codec
from pilot.codec import buffers as buffers_codec
from pilot.common.units import fp32_megabytes
from pilot.interfaces import Faulted, Network, ReceivedReply, Store
from pilot.market.notifications import Notifier
from pilot.market.receipts import AssignmentKey, Outcome, VerifiedReply
from pilot.market.scheduling import History, RoundPolicy
from pilot.market.verify import Contribution, verify
from pilot.training.executor import TimedExecutor
from protocol import Digest, Fault, Order, ProtocolError, Range, Signed
from tasks import Task

if TYPE_CHECKING:
    from pilot.codec import Specs

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Assignment:
    """An order that has left, and what comes of it."""

    order: Order
    signed: Signed
    at: float  # when it left
    taken: asyncio.Event = field(default_factory=asyncio.Event)  # it is at the miner, or all is over
    found: ReceivedReply | None = None  # by a process before this one
    coming: asyncio.Task[ReceivedReply] | None = None  # reply and payload: goes on while the order is carried
    outcome: asyncio.Task[Outcome] | None = None  # in the round at hand
    arrived: bool = False  # the whole reply

    @property
    def part(self) -> AssignmentKey:
        return self.order.hotkey, self.order.round


@dataclass
class OpenRound:
    """A round in flight."""

    round: int
    started: float
    blobs: dict[Digest, Buffer]
    sent: dict[AssignmentKey, Assignment] = field(default_factory=dict)  # its own orders, and those carried into it
    pending: int = 0  # of these without an outcome
    cut: float | None = None  # told to stop: when it is closed for good
    unsealed: list[ReceivedReply] = field(default_factory=list)
    sealing: asyncio.Task[None] | None = None  # is making them durable, and what it has taken of them
    last: ReceivedReply | None = (
        None  # the reply that came when no other was awaited: sealed when nobody waits for the disk
    )

    @property
    def outcomes(self) -> list[asyncio.Task[Outcome]]:
        return [sent.outcome for sent in self.sent.values() if sent.outcome]


class Dispatcher:
    """The rounds in flight, oldest first. Time is the network's."""

    def __init__(
        self,
        policy: RoundPolicy,
        task: Task,
        network: Network,
        store: Store,
        notifier: Notifier,
        executor: TimedExecutor,
        history: History,
        codec: Callable[[str], Codec],
        specs: Specs,
        buffers: Specs,
    ) -> None:
        self.policy, self.task, self.network, self.store = policy, task, network, store
        self.notifier, self.executor, self.history, self.codec, self.specs = notifier, executor, history, codec, specs
        self.buffers = buffers
        self.rounds: deque[OpenRound] = deque()
        self.carried: list[Assignment] = []  # into the next round that is opened
        self.stop_by: float | None = None  # every round is closed then
        self._failed: BaseException | None = None  # our own failure in an exchange
        self._look = asyncio.Event()  # something has happened that somebody may wait for
        self._changed = True  # somebody has come or gone since the last look
        self._watching: asyncio.Task[None] | None = None

    @property
    def unsettled(self) -> list[Order]:
        """Orders that have no receipt yet."""
        return [sent.order for opened in self.rounds for sent in opened.sent.values()] + [s.order for s in self.carried]

    @property
    def outstanding(self) -> list[Range]:
        """What miners have been ordered and have not answered for."""
        return [r for order in self.unsettled for r in order.ranges]

    @property
    def stopping(self) -> bool:
        return self.stop_by is not None

    def request_stop(self) -> None:
        self.stop_by = self.network.now() + self.policy.grace_s
        self._look.set()

    async def close(self) -> None:
        """Cancels what is under way."""
        sent = [*self.carried, *(s for opened in self.rounds for s in opened.sent.values())]
        tasks: list[asyncio.Task[Any]] = [task for s in sent for task in (s.coming, s.outcome) if task]
        tasks += [opened.sealing for opened in self.rounds if opened.sealing]
        tasks += [self._watching] if self._watching else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def wait_for_peer(self) -> None:
        """Until somebody is there, the deadline is over, or the run is stopped."""
        until = self.network.now() + self.policy.deadline_s
        while not self.network.peers() and not self.stopping and self.network.now() < until:
            await self._something(until)

    # --- out ------------------------------------------------------------------------------------------------------

    def send(
        self,
        opened: OpenRound,
        orders: Sequence[tuple[Order, Signed]],
        received: Mapping[Digest, ReceivedReply],
    ) -> None:
        """Starts the exchanges, but for those of orders whose replies a process before this one has `received`.

        Orders that are carried join the round.
        """
        before = self.rounds[-1] if self.rounds and self.rounds[-1] is not opened else None
        joining, self.carried = self.carried, []
        for sent in [*joining, *(Assignment(order, signed, self.network.now()) for order, signed in orders)]:
            opened.sent[sent.part] = sent
            if sent.coming is None:
                sent.found = received.get(sent.signed.digest)
                first = before.sent.get((sent.order.hotkey, before.round)) if before and sent.order.staleness else None
                sent.coming = asyncio.create_task(self._receive(opened, sent, first))
            sent.outcome = asyncio.create_task(self._exchange(opened, sent, sent.coming))
            opened.pending += 1
            sent.outcome.add_done_callback(partial(self._ended, opened, sent))

    def _ended(self, opened: OpenRound, sent: Assignment, task: asyncio.Task[Outcome]) -> None:
        if not task.cancelled():
            self._failed = self._failed or task.exception()
        opened.pending -= 1
        sent.taken.set()
        self._look.set()

    async def _receive(self, opened: OpenRound, sent: Assignment, first: Assignment | None) -> ReceivedReply:
        """Order out, reply and payload in. `first` must be at the miner before. Raises Faulted."""
        order = sent.order
        if order.inner_steps is not None and not self.policy.inner(opened.round):  # since a resume with other --rounds
            raise Faulted(
                Fault.VALIDATOR_FAILED, f"round {opened.round} takes gradients, and this would be inner steps"
            )
        if sent.found is not None:
            return sent.found
        if first is not None:
            await first.taken.wait()
        sent.at = self.network.now()
        path = self.store.payload_path(order.round, order.hotkey)
        largest = self.codec(order.codec_up).largest(self.specs) + buffers_codec.largest(self.buffers)
        taken = partial(self._taken, sent)
        received = await self.network.exchange(order, sent.signed, opened.blobs, path, largest, taken)
        received = replace(received, seconds=self.network.now() - sent.at)
        if received.seconds > order.deadline_s:
            self.store.discard(order.round, order.hotkey)
            raise Faulted(Fault.LATE, f"no whole reply within {order.deadline_s:g} s")
        return received

    def _taken(self, sent: Assignment) -> None:
        sent.taken.set()
        self.notifier.deliver_again(sent.order.hotkey)

    async def _exchange(self, opened: OpenRound, sent: Assignment, coming: asyncio.Task[ReceivedReply]) -> Outcome:
        """One miner's part: reply and payload in, verified. A fault is an outcome, not an error."""
        order = sent.order
        try:
            received = await asyncio.shield(coming)
            if received is not sent.found:
                if opened.pending == 1 and opened.last is None and opened is self.rounds[0]:
                    opened.last = received
                else:
                    self._seal(opened, received)
            sent.arrived = True
            megabytes = fp32_megabytes(self.specs.values())
            contribution = await self.executor.run("verify", megabytes, self.verify, order, received)
            logger.debug(
                "round %d: %s sent %d bytes after %.3f s, norm %.4g",
                *(order.round, order.hotkey[:8], received.reply.payload_bytes, received.seconds, contribution.norm),
            )
            return VerifiedReply(received, contribution)
        except ProtocolError as error:
            return Faulted(error.fault, str(error))
        except Faulted as fault:
            return fault

    def verify(self, order: Order, received: ReceivedReply) -> Contribution:
        """Raises ProtocolError with the fault."""
        payload = partial(self.store.payload, order.round, order.hotkey)
        codec = self.codec(order.codec_up)
        return verify(
            order, received.reply, payload, codec=codec, specs=self.specs, buffers=self.buffers, count=self.task.count
        )

    # --- back -----------------------------------------------------------------------------------------------------

    async def collect(
        self, admit: Callable[[OpenRound], Awaitable[None]], carries: bool
    ) -> dict[AssignmentKey, Outcome]:
        """What came of each order of the oldest round, but for those that are carried into the next, if that `carries`.

        Every exchange ends by itself, or with the round. `admit` may order something from who has come since.
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
                opened.cut = min(now + self.policy.grace_s, math.inf if self.stop_by is None else self.stop_by)
            if opened.cut is None or now < opened.cut:
                await self._something(self._closing(opened) if opened.cut is None else opened.cut)
            else:
                await self._cut_off(opened, carries and not self.stopping)
        self._changed = True  # for the next round, who is not in it has come too
        return {part: self._outcome(sent) for part, sent in opened.sent.items()}

    def _outcome(self, sent: Assignment) -> Outcome:
        assert sent.outcome is not None  # of a round that is closed
        if not sent.outcome.cancelled():
            return sent.outcome.result()
        seconds = self.network.now() - sent.at
        return Faulted(Fault.LATE, f"no whole reply within {seconds:.1f} s, when the round was closed")

    def pop(self) -> None:
        """The oldest round is settled. What it carries joins the next one at once, where that is open already."""
        self.rounds.popleft()
        if self.rounds:
            self.send(self.rounds[0], (), {})

    def _closing(self, opened: OpenRound) -> float:
        """When those that have not answered are told to send what they have: never before enough have answered."""
        if self.stopping:
            return -math.inf
        answered = len(opened.sent) - opened.pending
        if answered < self.policy.quorum * len(opened.sent):
            return math.inf
        return opened.started + self.history.closing_s(self.policy, opened.round)

    def _tell_stop(self, opened: OpenRound) -> None:
        for sent in opened.sent.values():
            if sent.outcome and not sent.outcome.done() and not sent.arrived:
                self.notifier.stop(sent.order, sent.signed.digest)

    async def _cut_off(self, opened: OpenRound, carries: bool) -> None:
        outcomes, slow = opened.outcomes, [sent for sent in opened.sent.values() if not sent.arrived]
        for sent in slow:
            if carries and self._may_be_carried(opened, sent):
                self.carried.append(opened.sent.pop(sent.part))
            task = sent.outcome if sent in self.carried else sent.coming
            if task:
                task.cancel()
        await asyncio.wait(outcomes)
        for sent in slow:  # what has come of a payload is of no use, and its file as large as the whole
            if not sent.arrived and sent not in self.carried:
                self.store.discard(sent.order.round, sent.order.hotkey)

    def _may_be_carried(self, opened: OpenRound, sent: Assignment) -> bool:
        """Inner steps that its miner is at, and that are not a round late already."""
        at_work = sent.taken.is_set() and sent.outcome is not None and not sent.outcome.done()
        return at_work and sent.order.inner_steps is not None and sent.order.round == opened.round

    async def sealed(self, opened: OpenRound) -> None:
        """Everything that was received is durable."""
        if opened.last is not None:
            self._seal(opened, opened.last)
        if opened.sealing is not None:
            await opened.sealing

    def _seal(self, opened: OpenRound, received: ReceivedReply) -> None:
        opened.unsealed.append(received)
        if opened.sealing is None:
            opened.sealing = asyncio.create_task(self._seal_all(opened))

    async def _seal_all(self, opened: OpenRound) -> None:
        """What comes while the disk is at work goes to it together."""
        while opened.unsealed:
            together, opened.unsealed = opened.unsealed, []
            await asyncio.to_thread(self.store.make_durable, *together)
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
        self.notifier.check()
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
