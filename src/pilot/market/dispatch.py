"""Keep the rounds in flight: send orders, receive and verify replies, and close the rounds.

Closing a round settles its orders. Inner steps (DiLoCo) take long, so an order of these that is still being worked on
is carried into the next round, once. Its exchange continues and its ranges stay ordered; in that round it counts like
any other, or is late.
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
    """An order that was sent, and its exchange."""

    order: Order
    signed: Signed
    at: float  # when it was sent
    taken: asyncio.Event = field(default_factory=asyncio.Event)  # the miner has the order, or the exchange has ended
    found: ReceivedReply | None = None  # received by an earlier process
    reply_task: asyncio.Task[ReceivedReply] | None = (
        None  # receives reply and payload; continues while the order is carried
    )
    outcome: asyncio.Task[Outcome] | None = None  # of the current round
    arrived: bool = False  # the whole reply is here

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
    pending: int = 0  # assignments without an outcome
    closes_at: float | None = None  # when the round is closed for good, once its miners were told to stop
    not_durable: list[ReceivedReply] = field(default_factory=list)
    durable_task: asyncio.Task[None] | None = None  # makes the replies durable
    last: ReceivedReply | None = None  # the last reply: made durable only after the next orders have left

    @property
    def outcomes(self) -> list[asyncio.Task[Outcome]]:
        return [sent.outcome for sent in self.sent.values() if sent.outcome]


class Dispatcher:
    """The rounds in flight, oldest first. Times are the network's."""

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
        self.carried: list[Assignment] = []  # join the next round that is opened
        self.stop_by: float | None = None  # when every round is closed, once the run was told to stop
        self._failed: BaseException | None = None  # a failure of our own in an exchange
        self._event = asyncio.Event()  # set when something happens that `collect` waits for
        self._miners_changed = True  # a miner came or went since `admit` was last called
        self._watcher: asyncio.Task[None] | None = None

    @property
    def unsettled(self) -> list[Order]:
        """Return the orders that have no receipt yet."""
        return [sent.order for opened in self.rounds for sent in opened.sent.values()] + [s.order for s in self.carried]

    @property
    def outstanding(self) -> list[Range]:
        """Return the ranges that are ordered and not settled."""
        return [r for order in self.unsettled for r in order.ranges]

    @property
    def stopping(self) -> bool:
        return self.stop_by is not None

    def request_stop(self) -> None:
        self.stop_by = self.network.now() + self.policy.grace_s
        self._event.set()

    async def close(self) -> None:
        """Cancel every exchange."""
        sent = [*self.carried, *(s for opened in self.rounds for s in opened.sent.values())]
        tasks: list[asyncio.Task[Any]] = [task for s in sent for task in (s.reply_task, s.outcome) if task]
        tasks += [opened.durable_task for opened in self.rounds if opened.durable_task]
        tasks += [self._watcher] if self._watcher else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until the run is told to stop."""
        until = self.network.now() + seconds
        while not self.stopping and self.network.now() < until:
            await self._wait_for_event(until)

    async def wait_for_peer(self) -> None:
        """Wait until a miner is there, the deadline has passed, or the run is told to stop."""
        until = self.network.now() + self.policy.deadline_s
        while not self.network.peers() and not self.stopping and self.network.now() < until:
            await self._wait_for_event(until)

    # --- out ------------------------------------------------------------------------------------------------------

    def send(
        self,
        opened: OpenRound,
        orders: Sequence[tuple[Order, Signed]],
        received: Mapping[Digest, ReceivedReply],
    ) -> None:
        """Start the exchanges, except of orders whose replies an earlier process has `received`.

        Orders that are carried join the round.
        """
        before = self.rounds[-1] if self.rounds and self.rounds[-1] is not opened else None
        joining, self.carried = self.carried, []
        for sent in [*joining, *(Assignment(order, signed, self.network.now()) for order, signed in orders)]:
            opened.sent[sent.part] = sent
            if sent.reply_task is None:
                sent.found = received.get(sent.signed.digest)
                first = before.sent.get((sent.order.hotkey, before.round)) if before and sent.order.staleness else None
                sent.reply_task = asyncio.create_task(self._receive(opened, sent, first))
            sent.outcome = asyncio.create_task(self._exchange(opened, sent, sent.reply_task))
            opened.pending += 1
            sent.outcome.add_done_callback(partial(self._on_exchange_end, opened, sent))

    def _on_exchange_end(self, opened: OpenRound, sent: Assignment, task: asyncio.Task[Outcome]) -> None:
        if not task.cancelled():
            self._failed = self._failed or task.exception()
        opened.pending -= 1
        sent.taken.set()
        self._event.set()

    async def _receive(self, opened: OpenRound, sent: Assignment, first: Assignment | None) -> ReceivedReply:
        """Send an order and receive its reply and payload. The miner must have `first` before. Raises Faulted."""
        order = sent.order
        if order.inner_steps is not None and not self.policy.inner(opened.round):  # after a resume with other --rounds
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
        taken = partial(self._on_taken, sent)
        received = await self.network.exchange(order, sent.signed, opened.blobs, path, largest, taken)
        received = replace(received, seconds=self.network.now() - sent.at)
        if received.seconds > order.deadline_s:
            self.store.discard(order.round, order.hotkey)
            raise Faulted(Fault.LATE, f"no whole reply within {order.deadline_s:g} s")
        return received

    def _on_taken(self, sent: Assignment) -> None:
        sent.taken.set()
        self.notifier.deliver_again(sent.order.hotkey)

    async def _exchange(self, opened: OpenRound, sent: Assignment, reply_task: asyncio.Task[ReceivedReply]) -> Outcome:
        """Receive and verify one reply. A fault is an outcome, not an error."""
        order = sent.order
        try:
            received = await asyncio.shield(reply_task)
            if received is not sent.found:
                if opened.pending == 1 and opened.last is None and opened is self.rounds[0]:
                    opened.last = received
                else:
                    self._queue_durable(opened, received)
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
        """Verify a reply. Raises ProtocolError with the fault."""
        payload = partial(self.store.payload, order.round, order.hotkey)
        codec = self.codec(order.codec_up)
        return verify(
            order, received.reply, payload, codec=codec, specs=self.specs, buffers=self.buffers, count=self.task.count
        )

    # --- back -----------------------------------------------------------------------------------------------------

    async def collect(
        self, admit: Callable[[OpenRound], Awaitable[None]], carries: bool
    ) -> dict[AssignmentKey, Outcome]:
        """Return the outcome of each order of the oldest round; with `carries`, some may be carried into the next.

        Every exchange ends by itself, or with the round. `admit` may order work from miners that came since.
        """
        opened = self.rounds[0]
        while opened.pending:
            if self._miners_changed:
                self._miners_changed = False
                await admit(opened)
            now = self.network.now()
            if opened.closes_at is None and now >= self._closing_time(opened):
                for other in self.rounds if self.stopping else [opened]:
                    self._stop_miners(other)
                opened.closes_at = min(now + self.policy.grace_s, math.inf if self.stop_by is None else self.stop_by)
            if opened.closes_at is None or now < opened.closes_at:
                await self._wait_for_event(self._closing_time(opened) if opened.closes_at is None else opened.closes_at)
            else:
                await self._close_round(opened, carries and not self.stopping)
        self._miners_changed = True  # for the next round, every miner without an order is new
        return {part: self._outcome(sent) for part, sent in opened.sent.items()}

    def _outcome(self, sent: Assignment) -> Outcome:
        assert sent.outcome is not None  # the round is closed
        if not sent.outcome.cancelled():
            return sent.outcome.result()
        seconds = self.network.now() - sent.at
        return Faulted(Fault.LATE, f"no whole reply within {seconds:.1f} s, when the round was closed")

    def pop(self) -> None:
        """Remove the oldest round. The orders that it carries join the next one, if that is open already."""
        self.rounds.popleft()
        if self.rounds:
            self.send(self.rounds[0], (), {})

    def _closing_time(self, opened: OpenRound) -> float:
        """Return when the remaining miners are told to send what they have; infinite before a quorum has answered."""
        if self.stopping:
            return -math.inf
        answered = len(opened.sent) - opened.pending
        if answered < self.policy.quorum * len(opened.sent):
            return math.inf
        return opened.started + self.history.closing_s(self.policy, opened.round)

    def _stop_miners(self, opened: OpenRound) -> None:
        for sent in opened.sent.values():
            if sent.outcome and not sent.outcome.done() and not sent.arrived:
                self.notifier.stop(sent.order, sent.signed.digest)

    async def _close_round(self, opened: OpenRound, carries: bool) -> None:
        outcomes, missing = opened.outcomes, [sent for sent in opened.sent.values() if not sent.arrived]
        for sent in missing:
            if carries and self._may_be_carried(opened, sent):
                self.carried.append(opened.sent.pop(sent.part))
            task = sent.outcome if sent in self.carried else sent.reply_task
            if task:
                task.cancel()
        await asyncio.wait(outcomes)
        for sent in missing:  # a partial payload is useless, and its file as large as a whole one
            if not sent.arrived and sent not in self.carried:
                self.store.discard(sent.order.round, sent.order.hotkey)

    def _may_be_carried(self, opened: OpenRound, sent: Assignment) -> bool:
        """Return whether a miner is at work on the order's inner steps, and it was not carried before."""
        at_work = sent.taken.is_set() and sent.outcome is not None and not sent.outcome.done()
        return at_work and sent.order.inner_steps is not None and sent.order.round == opened.round

    async def make_durable(self, opened: OpenRound) -> None:
        """Make everything that was received durable."""
        if opened.last is not None:
            self._queue_durable(opened, opened.last)
        if opened.durable_task is not None:
            await opened.durable_task

    def _queue_durable(self, opened: OpenRound, received: ReceivedReply) -> None:
        opened.not_durable.append(received)
        if opened.durable_task is None:
            opened.durable_task = asyncio.create_task(self._make_all_durable(opened))

    async def _make_all_durable(self, opened: OpenRound) -> None:
        """Make replies durable, those together that arrive while the disk is busy."""
        while opened.not_durable:
            together, opened.not_durable = opened.not_durable, []
            await asyncio.to_thread(self.store.make_durable, *together)
        opened.durable_task = None

    # --- waiting --------------------------------------------------------------------------------------------------

    async def _wait_for_event(self, until: float) -> None:
        """Wait until an exchange ends, a miner comes or goes, the run is told to stop, or `until` has passed."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch_miners())
        if self._watcher.done():
            self._watcher.result()
        if self._failed is not None:
            raise self._failed
        self.notifier.check()
        left_s = until - self.network.now()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if left_s == math.inf else max(0.0, left_s)):
                await self._event.wait()
        self._event.clear()

    async def _watch_miners(self) -> None:
        try:
            while True:
                await self.network.wait_for_change()
                self._miners_changed = True
                self._event.set()
        finally:
            self._event.set()
