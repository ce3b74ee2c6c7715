"""A miner without an open port: it fetches what waits for it at its validator, and brings what it did.

The same messages reach the same `MinerService` as an axon's. A message that comes again (the validator was restarted,
or gave the order again) starts the order again; what was computed or sent before is not lost by that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import aiohttp
from typing_extensions import Buffer

from pilot.common.files import NO_SPACE
from pilot.common.limits import Limits
from pilot.interfaces import MinerService, Refused
from pilot.transport.auth import Keypair, sign_message, verify_message
from pilot.transport.client.heartbeat import Heartbeat
from pilot.transport.client.peer import Peer, RefusedAt
from pilot.transport.client.remote_miner import Lost, pause
from pilot.transport.streaming import stream_body, to_the_end
from protocol import (
    BlobRef,
    Digest,
    Fault,
    Order,
    ProtocolError,
    Receipt,
    Refusal,
    Reply,
    Signed,
    Status,
    Stop,
    one_line,
)

ORDERS = 4  # whose way goes on side by side, at most: one computing, one going up, and those that nobody wants any more
NOTHING = "0" * 64

M = TypeVar("M", Order, Stop, Receipt)
T = TypeVar("T")

logger = logging.getLogger(__name__)


class _Over(Exception):
    """The validator does not want any more of this order."""


class PullClient:
    """Feeds `service` from the queue at `validator`, as the process that `heartbeat` announces."""

    def __init__(
        self,
        service: MinerService,
        keypair: Keypair,
        validator: Peer,
        heartbeat: Heartbeat,
        limits: Limits,
        say: Callable[[str], None],
    ) -> None:
        self._service, self._keypair, self._validator, self._heartbeat = service, keypair, validator, heartbeat
        self._limits, self._say = limits, say
        self._hotkey = validator.hotkey or ""
        self._process = f"session={heartbeat.session}"  # of every request
        self._orders: dict[Digest, asyncio.Task[None]] = {}
        self._reported = ""

    async def run(self) -> None:
        """For ever. Raises only what is our own failure."""
        try:
            async with asyncio.TaskGroup() as group:
                await self._poll(group)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def finish(self, timeout_s: float) -> None:
        """What was handed over may still need its last answers."""
        if self._orders:
            await asyncio.wait(self._orders.values(), timeout=timeout_s)

    # --- in -----------------------------------------------------------------------------------------------------------

    async def _poll(self, group: asyncio.TaskGroup) -> None:
        taken, attempt, wait_s = NOTHING, 0, self._limits.poll_s
        while True:
            await self._heartbeat.registered.wait()
            target = f"/v1/next?{self._process}&taken={taken}&wait={max(1, round(wait_s))}"
            try:
                status, text = await self._validator.call("GET", target, Order.kind, wait_s=wait_s)
                if status == 200:
                    taken = await self._take(Signed.parse(text), group)
                attempt = 0
            except Lost:
                await asyncio.sleep(pause(attempt))
                attempt += 1
            except Refused as refused:
                taken = NOTHING  # it does not know us: nothing of what we have is from it
                logger.debug("nothing to fetch: %s", refused.reason)
                self._heartbeat.announce_now()
                await asyncio.sleep(pause(attempt))
                attempt += 1
            except ProtocolError as error:
                self._report(f"what it sends is no message of ours: {error}")
                await asyncio.sleep(pause(attempt))
                attempt += 1

    async def _take(self, signed: Signed, group: asyncio.TaskGroup) -> Digest:
        """Returns what the validator is told to have been taken."""
        try:
            if signed.kind == Order.kind:
                order = self._addressed(signed, Order)
                self._begin(order, signed.digest, group)
            elif signed.kind == Stop.kind:
                self._service.stop_order(self._hotkey, self._addressed(signed, Stop))
            else:
                receipt = self._addressed(signed, Receipt)
                await asyncio.to_thread(self._service.accept_receipt, self._hotkey, receipt, signed)
        except Refused as refused:
            logger.debug("%s: %s", signed.kind, refused.reason)
        except OSError as error:  # a receipt that cannot be kept
            self._check_full(error)
        return signed.digest

    def _check_full(self, error: OSError) -> None:
        """Say that the disk is full; raise any other error."""
        if error.errno not in NO_SPACE:
            raise error
        self._report("this miner's disk is full; delete old files, in its --cache for example")

    def _addressed(self, signed: Signed, cls: type[M]) -> M:
        message = verify_message(signed, cls, self._hotkey)
        if message.hotkey != self._service.hotkey:
            raise ProtocolError(f"{cls.kind}: for {message.hotkey}, this is {self._service.hotkey}")
        return message

    def _begin(self, order: Order, digest: Digest, group: asyncio.TaskGroup) -> None:
        before = self._orders.pop(digest, None)
        self._orders[digest] = task = group.create_task(self._serve(order, digest, before))
        task.add_done_callback(lambda ended: self._orders.get(digest) is ended and self._orders.pop(digest))
        while len(self._orders) > ORDERS:
            self._orders.pop(next(iter(self._orders))).cancel()

    # --- an order's way -----------------------------------------------------------------------------------------------

    async def _serve(self, order: Order, digest: Digest, before: asyncio.Task[None] | None) -> None:
        """In place of `before`, whose thread may still be writing."""
        if before is not None:
            before.cancel()
            await asyncio.wait({before})
        try:
            try:
                reply = await self._work(order, digest)
                payload = self._service.read_payload(self._hotkey, digest)
            except Refused as refused:
                reason = Refusal(reason=one_line(refused.reason), fault=refused.fault)
                await self._post(f"/v1/refusal?{self._process}&order={digest}", reason.text().encode())
                return
            await self._post(f"/v1/reply?{self._process}&order={digest}", self._sealed(reply))
            await self._bring(digest, reply, payload)
            self._service.mark_delivered(self._hotkey, digest)
        except _Over as over:
            logger.debug("round %d: %s", order.round, over)
        except ProtocolError as error:
            self._report(str(error))

    async def _work(self, order: Order, digest: Digest) -> Reply:
        """Raises what the service refuses with; _Over."""
        while True:
            await self._accept(order, digest)
            try:
                while True:
                    status = self._service.status()
                    await self._post(f"/v1/working?{self._process}&order={digest}", self._sealed(status), over=False)
                    reply = await self._service.wait_for_reply(self._hotkey, digest, self._limits.poll_s)
                    if reply is not None:
                        return reply
            except Refused as refused:
                if refused.status != 404 and not refused.missing:
                    raise
            await asyncio.sleep(pause(0))  # it was forgotten, or the state was: the order again

    async def _accept(self, order: Order, digest: Digest) -> None:
        """With the blobs that are missing."""
        damaged = 0
        while True:
            try:
                self._service.accept_order(self._hotkey, order, digest)
                return
            except Refused as refused:
                if not refused.missing:
                    raise
                missing, held = refused.missing, refused.held
            for ref in missing:
                largest = self._limits.blob(ref.kind)
                if ref.bytes > largest:
                    said = f"a {ref.kind} of {ref.bytes} bytes; this miner takes {largest}"
                    raise Refused(413, said, Fault.MALFORMED)
                try:
                    await self._insist(partial(self._fetch, digest, ref, held))
                except Refused as refused:  # another part is held than was said
                    if not refused.missing:
                        raise
                    await asyncio.sleep(pause(0))
                except ProtocolError as error:  # the validator says when it has sent it too often
                    logger.debug("%s", error)
                    await asyncio.sleep(pause(damaged))
                    damaged += 1

    async def _fetch(self, order: Digest, ref: BlobRef, held: dict[Digest, int]) -> None:
        """The rest of a blob; `held` says where it begins, and is kept up to date. Raises Lost, ProtocolError."""
        offset = held.get(ref.digest, 0)
        try:
            writer = self._service.open_blob(self._hotkey, ref, offset)
        except OSError as error:
            self._check_full(error)
            raise Refused(507, "this miner's disk is full") from None
        if offset == ref.bytes:  # the connection broke behind the last byte
            await to_the_end(writer.commit)
            return
        target = f"/v1/blob?{self._process}&order={order}&digest={ref.digest}&offset={offset}"
        try:
            async with self._validator.open("GET", target) as response:
                if response.content_length != ref.bytes - offset:
                    raise Lost(f"{ref.kind}: {response.content_length} bytes, {ref.bytes - offset} are left")
                await stream_body(response.content, writer.write, self._limits)
            if writer.held == ref.bytes:
                await to_the_end(writer.commit)
                return
            raise Lost(f"{self._validator.endpoint}: the {ref.kind} broke off")
        except TimeoutError:
            raise Lost(f"{self._validator.endpoint}: fewer than {self._limits.min_rate:g} bytes a second") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Lost(f"{self._validator.endpoint}: {str(error) or type(error).__name__}") from error
        except OSError as error:
            self._check_full(error)
            raise Refused(507, "this miner's disk is full") from None
        finally:
            held[ref.digest] = writer.held

    async def _bring(self, order: Digest, reply: Reply, payload: Buffer) -> None:
        """The payload, from where the validator says that it holds it."""
        data, offset, attempt = memoryview(payload).cast("B"), 0, 0
        size, name = reply.payload_bytes, reply.payload_digest
        while True:
            target = f"/v1/payload?{self._process}&order={order}&digest={name}&bytes={size}&offset={offset}"
            try:
                await self._validator.call("PUT", target, Refusal.kind, blob=data[offset:])
                return
            except Lost as lost:
                logger.debug("payload: %s", lost)
            except RefusedAt as refused:
                held = refused.held.get(name)
                if held is None or held > size:
                    raise _Over(refused.reason) from None
                attempt = 0 if held > offset else attempt
                offset = held
            await asyncio.sleep(pause(attempt))
            attempt += 1

    # --- out ----------------------------------------------------------------------------------------------------------

    async def _post(self, target: str, body: bytes, over: bool = True) -> None:
        """Raises _Over where the validator refuses it, unless it does not matter."""
        try:
            await self._insist(partial(self._validator.call, "POST", target, Refusal.kind, body=body))
        except _Over:
            if over:
                raise

    async def _insist(self, step: Callable[[], Awaitable[T]]) -> T:
        """Repeats a request until the validator is there. Raises _Over where it refuses."""
        attempt = 0
        while True:
            try:
                return await step()
            except Lost as lost:
                logger.debug("%s", lost)
            except RefusedAt as refused:
                raise _Over(refused.reason) from None
            await asyncio.sleep(pause(attempt))
            attempt += 1

    def _sealed(self, message: Reply | Status) -> bytes:
        return sign_message(self._keypair, message).model_dump_json().encode()

    def _report(self, text: str) -> None:
        if text != self._reported:
            self._reported = text
            self._say(f"--validator {self._validator.endpoint}: {one_line(text)}")
