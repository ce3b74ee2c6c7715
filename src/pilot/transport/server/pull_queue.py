"""A miner that pulls, as its validator sees it: what waits for it here, and what it brings for an order.

    PullQueue   the `RemoteMiner`: orders, stops and receipts in their order, each until the miner has taken it
    Pull        an `Exchange` in which the miner makes every request, and the validator waits

The gateway passes requests on. Every message has a task here that waits for it, so no more of them pile up than there
are tasks; a reply counts for an order that is under way, or was one of the last.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from pilot.common.limits import Limits
from pilot.interfaces import Faulted, ReceivedReply, Refused
from pilot.transport.auth import open_reply
from pilot.transport.client.download import Download
from pilot.transport.client.exchange import Exchange, faulted
from pilot.transport.client.remote_miner import RemoteMiner
from pilot.transport.server.base import Transfers
from pilot.transport.streaming import CHUNK
from protocol import BlobRef, Digest, Fault, Hotkey, Order, ProtocolError, Reply, Signed, Status

T = TypeVar("T")

PULLS = "pull"  # in place of an endpoint
QUIET_S = 3.0  # without a request, beyond which it gets no new order: it asks again within a second
KEPT = 8  # orders that are over, whose replies are still noted and whose payloads are known to be here

Stream = Callable[[Callable[[bytes], object]], Awaitable[None]]  # the request's body, to a writer


@dataclass
class QueuedMessage:
    """An order, a stop or a receipt that waits for the miner."""

    signed: Signed
    given: bool = False  # by this queue; what the miner has from one before a restart was not
    taken: asyncio.Event = field(default_factory=asyncio.Event)


class PullQueue(RemoteMiner):
    """Of one hotkey. `session` names the process that empties it; another takes its place only when that is gone."""

    def __init__(self, hotkey: Hotkey, limits: Limits) -> None:
        super().__init__(PULLS, hotkey)
        self.announced = True
        self.session = ""
        self.exchanges: dict[Digest, Pull] = {}
        self._limits = limits
        self._messages: dict[Digest, QueuedMessage] = {}
        self._news = asyncio.Event()  # a message, for who polls
        self._polls = 0
        self._unanswered: dict[Digest, Order] = {}  # the last orders that brought nothing
        self._late_replies: dict[Digest, asyncio.Future[Signed | None]] = {}  # replies to them
        self._delivered: deque[Digest] = deque(maxlen=KEPT)
        self._requests = 0  # under way
        self._heard = time.monotonic()

    # --- whether it is there ------------------------------------------------------------------------------------------

    @property
    def away_s(self) -> float:
        """Seconds since it was last heard of."""
        return 0.0 if self._requests else time.monotonic() - self._heard

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Around each of its requests."""
        self._requests += 1
        self.reachable = True
        try:
            yield
        finally:
            self._requests -= 1
            self._heard = time.monotonic()
            asyncio.get_running_loop().call_later(QUIET_S + 0.01, self._check_reachable)

    def _check_reachable(self) -> None:
        if self.away_s >= QUIET_S:
            self.reachable = False
            self.lost_because = f"did not ask for {QUIET_S:g} s"

    def begin(self, session: str) -> None:
        """Another process empties it from now on: that knows nothing of what the one before has taken."""
        if session != self.session:
            self.session = session
            for exchange in self.exchanges.values():
                exchange.news.set()

    # --- messages -----------------------------------------------------------------------------------------------------

    @contextmanager
    def waiting(self, message: QueuedMessage) -> Iterator[None]:
        """It is here for the miner, until it was taken, which sets its event, or the caller gives up."""
        self._messages[message.signed.digest] = message
        self._news.set()
        try:
            yield
        finally:
            if self._messages.get(message.signed.digest) is message:
                del self._messages[message.signed.digest]

    async def next(self, taken: Digest, wait_s: float) -> Signed | None:
        """Return the first message but `taken`, which the miner has; None after `wait_s`, or at a newer poll."""
        if (message := self._messages.get(taken)) is not None and message.given:
            del self._messages[taken]
            message.taken.set()
        self._polls += 1
        poll = self._polls
        self._news.set()
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    if poll != self._polls:
                        return None
                    if self._messages:
                        message = next(iter(self._messages.values()))
                        message.given = True
                        return message.signed
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return None

    async def deliver(self, signed: Signed) -> bool:
        if not self.reachable:
            return False
        message = QueuedMessage(signed)
        try:
            with self.waiting(message):
                async with asyncio.timeout(self._limits.message_s):
                    await message.taken.wait()
        except TimeoutError:
            return False
        return True

    # --- replies ------------------------------------------------------------------------------------------------------

    def order(self, digest: Digest) -> Pull:
        """The exchange of an order. Raises Refused 404 where none is under way."""
        try:
            return self.exchanges[digest]
        except KeyError:
            raise Refused(404, "no such order is under way; it may be too late") from None

    def has(self, digest: Digest) -> bool:
        """The order's payload is here, whole."""
        return digest in self._delivered

    def take_reply(self, digest: Digest, signed: Signed) -> None:
        """For an order under way, or for one that is over: then it is noted. Raises Refused, ProtocolError."""
        if digest in self.exchanges:
            self.exchanges[digest].take_reply(signed)
        elif digest in self._unanswered:
            open_reply(signed, self._unanswered[digest], digest)
            noted = self._late_reply(digest)
            if not noted.done():
                noted.set_result(signed)
        elif digest not in self._delivered:
            self.order(digest)

    async def await_late_reply(self, order: Order, signed: Signed) -> Signed | None:
        digest = signed.digest
        if digest in self._delivered:
            return None
        self._remember(order, digest)
        return await asyncio.shield(self._late_reply(digest))

    def _late_reply(self, digest: Digest) -> asyncio.Future[Signed | None]:
        if digest not in self._late_replies:
            self._late_replies[digest] = asyncio.get_running_loop().create_future()
        return self._late_replies[digest]

    def _remember(self, order: Order, digest: Digest) -> None:
        self._unanswered.pop(digest, None)
        self._unanswered[digest] = order
        while len(self._unanswered) > KEPT:
            oldest = next(iter(self._unanswered))
            del self._unanswered[oldest]
            unheard = self._late_replies.pop(oldest, None)
            if unheard is not None and not unheard.done():
                unheard.set_result(None)

    @contextmanager
    def under_way(self, exchange: Pull) -> Iterator[None]:
        digest = exchange.signed.digest
        self.exchanges[digest] = exchange
        try:
            yield
            self._delivered.append(digest)
        except BaseException:
            if exchange.accepted:
                self._remember(exchange.order, digest)
            raise
        finally:
            if self.exchanges.get(digest) is exchange:
                del self.exchanges[digest]


class Pull(Exchange):
    """The miner calls: it takes the order from its queue, and brings status, reply and payload."""

    peer: PullQueue

    async def run(self) -> ReceivedReply:
        self.news = asyncio.Event()  # something was brought, or the miner is another process
        self._ready = asyncio.Event()  # for the payload
        self._uploads = Transfers()
        self._download: Download | None = None
        self._reset()
        with self.peer.under_way(self):
            return await super().run()

    def _reset(self) -> None:
        self._session = self.peer.session
        self._taken = False
        self._bytes_given, self._sending_since = 0, 0.0  # bytes of the blobs that it fetched, and when it began
        self._failure: Exception | None = None
        self._reply: tuple[Signed, Reply] | None = None

    async def _offer(self) -> None:
        while True:
            self._reset()
            try:
                with self.peer.waiting(QueuedMessage(self.signed)):
                    self.bytes_down += len(self.signed.body)
                    await self._until(lambda: self._taken or None)
                return
            except Refused as refused:
                if refused.status != 404:
                    raise faulted(refused) from None

    async def _await_reply(self) -> tuple[Signed, Reply]:
        return await self._until(lambda: self._reply)

    async def _bring(self, download: Download, size: int) -> None:
        began, before = time.monotonic(), download.held
        self.progress.move("fetching", size, before)
        self._download = download
        self._ready.set()
        try:
            await self._until(lambda: download.held == size or None)
        finally:
            self._download = None
            self._ready.clear()
            await self._uploads.end(self.signed.digest)  # its thread writes to the file that is about to be closed
            self.progress.rest("working")
        self._log("payload brought", download.held - before, began)

    async def _until(self, brought: Callable[[], T | None]) -> T:
        """Raises what the miner refused with or did wrong, Refused 404 for another process, SILENT where it is gone."""
        while True:
            self.news.clear()
            if self._failure is not None:
                raise self._failure
            if (value := brought()) is not None:
                return value
            if self.peer.session != self._session:
                raise Refused(404, "another process of this miner")
            left_s = self.limits.away_s - self.peer.away_s
            if left_s <= 0:
                raise Faulted(Fault.SILENT, f"did not ask for {self.limits.away_s:g} s")
            try:
                async with asyncio.timeout(left_s + 0.01):
                    await self.news.wait()
            except TimeoutError:
                continue

    # --- what the miner brings ----------------------------------------------------------------------------------------

    def take_status(self, status: Status) -> None:
        """It has the order, and all that it needs for it, and works on it."""
        if self._bytes_given:  # only now: what was written to a socket need not be there
            self.peer.down.add(self._bytes_given, time.monotonic() - self._sending_since)
            self._bytes_given = 0
        self.progress.batches_done = status.batches_done
        self._taken = True
        self.news.set()

    def take_refusal(self, reason: str, fault: Fault | None) -> None:
        self._fail(faulted(Refused(409, reason, fault)))

    def take_reply(self, signed: Signed) -> None:
        """Raises ProtocolError, which is then its part's outcome too; Refused for a second one that differs."""
        try:
            reply = open_reply(signed, self.order, self.signed.digest)
        except ProtocolError as error:
            self._fail(error)
            raise
        if self._reply is not None and self._reply[0].body != signed.body:
            raise Refused(409, "another reply to this order is here already", Fault.MALFORMED)
        self.bytes_up += len(signed.body)
        self.peer.bytes_up += len(signed.body)
        self._reply, self._taken = (signed, reply), True
        self.news.set()

    @contextmanager
    def sending(self, digest: Digest, offset: int) -> Iterator[memoryview]:
        """What is left of a blob of the order, on its way. Raises Refused where it asks for what it should not."""
        ref = next((ref for ref in self._refs() if ref.digest == digest), None)
        try:
            rest = self._blob(digest, ref.bytes if ref else 0, ref.kind if ref else "blob", offset)
        except Faulted as fault:
            self._fail(fault)
            raise Refused(400, fault.reason, fault.fault) from None
        self.sent[digest] += CHUNK
        self._sending_since = self._sending_since if self._bytes_given else time.monotonic()
        self.progress.move("sending", len(rest) + offset, offset)
        try:
            yield rest
        finally:
            self.progress.rest("ordering")

    def _refs(self) -> list[BlobRef]:
        data = self.order.data
        return [*self.order.update.refs, *data.blobs.values()]

    def count_sent(self, digest: Digest, size: int) -> None:
        """So many more bytes of a blob have left."""
        self.bytes_down += size
        self._bytes_given += size
        self.sent[digest] += size
        self.peer.bytes_down += size
        self.progress.moved += size

    async def take_payload(self, digest: Digest, size: int, offset: int, stream: Stream) -> None:
        """The payload's bytes from `offset` on. Raises Refused: 409 with what is held where that is another part."""
        if self._reply is None or (self._reply[1].payload_digest, self._reply[1].payload_bytes) != (digest, size):
            raise Refused(409, "not the payload of the reply that is here", Fault.MALFORMED)
        async with self._uploads.take_over(self.signed.digest):
            try:
                async with asyncio.timeout(self.limits.message_s / 2):
                    await self._ready.wait()
            except TimeoutError:
                raise Refused(503, "not ready yet") from None
            download = self._download
            if download is None:
                raise Refused(404, "this order is over")
            if offset != download.held:
                raise Refused(409, f"{download.held} bytes are held", held={digest: download.held})
            began = time.monotonic()
            try:
                await stream(partial(self._write, download))
            finally:
                self.news.set()
            whole, held = download.finish(), download.held
            self.peer.up.add(held - offset, time.monotonic() - began)
        if held < size:
            raise Refused(409, f"{held} bytes are held", held={digest: held})
        if not whole:  # damaged on the way, or what was held before was another payload
            raise Refused(409, "not the bytes that the reply's digest names", held={digest: 0})

    def _write(self, download: Download, chunk: bytes) -> None:
        download.write(chunk)
        self.bytes_up += len(chunk)
        self.peer.bytes_up += len(chunk)
        self.progress.moved = download.held

    def _fail(self, failure: Exception) -> None:
        self._failure = failure
        self.news.set()
