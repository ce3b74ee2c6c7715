"""One order's whole way to one miner and back. Connections may fail at any point of it.

Every step can be repeated. What was sent or fetched is not sent or fetched again: a blob goes on from where the miner
says that it holds it, a payload from where the file ends, and both are verified as a whole. `Push` calls the miner;
where the miner calls, it is `mailbox.Pull`.

A verdict rests on what the miner has signed. Whatever comes unsigned or damaged, a relay may have changed: it is asked
for again, and SILENT is all that becomes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

from pilot.common.files import NO_SPACE
from pilot.common.limits import Limits
from pilot.interfaces import Blobs, Faulted, ReceivedReply, Refused
from pilot.transport.auth import open_reply, verify_message
from pilot.transport.client.download import Download
from pilot.transport.client.remote_miner import Lost, MinerChannel, Progress, RemoteMiner, Unproven, open_answer, pause
from pilot.transport.streaming import CHUNK, wait_for_threads
from protocol import (
    MAX_BLOB_BYTES,
    REFUSAL_FAULTS,
    BlobRef,
    Digest,
    Fault,
    Order,
    ProtocolError,
    Reply,
    Signed,
    Status,
    one_line,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

HEALED = 2  # times that a miner may find, for one order, that what it has does not lead to the order's version
RESENT = 8  # times its size that a blob is sent at most, and times that a payload is fetched

Room = Callable[[Path, int], None]  # raises Faulted where a file of so many bytes may not be written


class Exchange(ABC):
    """Cancelled by its caller at the deadline; `accepted` tells how far it came."""

    def __init__(
        self,
        peer: RemoteMiner,
        order: Order,
        signed: Signed,
        blobs: Blobs,
        path: Path,
        largest: int | None,  # bytes of the payload, where that is known
        limits: Limits,
        room: Room,
        background: Executor | None,  # for what is not urgent; None: the loop's own
    ) -> None:
        self.peer, self.order, self.signed, self.blobs, self.path = peer, order, signed, blobs, path
        self.largest, self.limits, self.room, self.background = largest, limits, room, background
        self.accepted = False
        self.on_accepted: Callable[[], object] = lambda: None
        self.bytes_up = 0
        self.bytes_down = 0
        self.sent: Counter[Digest] = Counter()  # bytes of each blob; an attempt counts as a CHUNK at least
        self.progress = Progress(batches=sum(stop - start for start, stop in order.ranges))

    @property
    def jitter(self) -> Random | None:
        return self.peer.jitter if isinstance(self.peer, MinerChannel) else None

    async def run(self) -> ReceivedReply:
        """Raises Faulted, ProtocolError."""
        began, restarts, healed = _now(), 0, 0
        download: Download | None = None
        job: asyncio.Future[None] | None = None
        try:
            self.room(self.path, self.largest or 0)
            download = Download(self.path)
            to_prepare = download.wants_preparing(self.largest or 0)
            while True:
                self.progress.doing = "ordering"
                await self._offer()
                self.accepted = True
                self.on_accepted()
                self.progress.doing = "working"
                if to_prepare:
                    loop, to_prepare = asyncio.get_running_loop(), False
                    job = loop.run_in_executor(self.background, download.prepare, self.largest or 0)
                try:
                    signed, reply = await self._await_reply()
                    if job is not None:
                        await asyncio.shield(job)
                    await self._fetch(download, reply)
                    self.progress.doing, self.progress.batches_done = "done", self.progress.batches
                    return ReceivedReply(reply, signed, self.bytes_up, self.bytes_down, _now() - began)
                except Refused as refused:
                    healed += bool(refused.missing)
                    if (refused.status != 404 and not refused.missing) or healed > HEALED:
                        raise faulted(refused) from None
                await asyncio.sleep(
                    pause(restarts, jitter=self.jitter)
                )  # it was restarted, or lacks more: the order again
                restarts += 1
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise Faulted(
                Fault.VALIDATOR_FAILED, "the validator's disk is full; delete old runs or other files"
            ) from error
        finally:
            if self.progress.doing != "done":
                self.progress.doing = "idle"
            if download is not None:
                download.ended = True
                try:
                    if job is not None:
                        await wait_for_threads([job])
                finally:
                    download.close()

    @abstractmethod
    async def _offer(self) -> None:
        """Until the order is accepted, with the blobs that the miner lacks. Raises Faulted."""

    @abstractmethod
    async def _await_reply(self) -> tuple[Signed, Reply]:
        """Raises Refused 404 where the miner knows nothing of the order any more, Faulted, ProtocolError."""

    @abstractmethod
    async def _bring(self, download: Download, size: int) -> None:
        """Until all `size` bytes of the payload are held. Raises as `_await_reply` does."""

    async def _fetch(self, download: Download, reply: Reply) -> None:
        """The payload into the file, whose length and digest are signed; again if it is damaged. Raises Faulted."""
        size, most = reply.payload_bytes, min(self.largest or MAX_BLOB_BYTES, self.limits.payload_bytes)
        if size > most:
            raise ProtocolError(f"payload: {size} bytes, at most {most}")
        download.expect(reply.payload_digest, size)
        began, damaged = _now(), 0
        while True:
            await self._bring(download, size)
            if download.finish():
                return
            damaged += not download.found
            if damaged >= RESENT and _now() - began >= self.limits.away_s:
                raise Faulted(Fault.SILENT, f"payload: came {damaged} times, never as the reply's digest names it")
            download.restart()
            await asyncio.sleep(pause(damaged, jitter=self.jitter))

    def _blob(self, ref_digest: Digest, size: int, kind: str, offset: int) -> memoryview:
        """What is left of a blob, to be sent. Raises Faulted for one that the order does not name, or too often."""
        blob = self.blobs.get(ref_digest)
        if blob is None and (ref_digest, size) in {(ref.digest, ref.bytes) for ref in self.order.update.refs}:
            raise Faulted(Fault.VALIDATOR_FAILED, "the validator was restarted and no longer has that version")
        if blob is None or memoryview(blob).nbytes != size:
            raise Faulted(Fault.MALFORMED, f"asks for a {kind} that is not of this order")
        if offset > size:
            raise Faulted(Fault.MALFORMED, f"holds {offset} of the {size} bytes of the {kind}, and asks for it")
        if self.sent[ref_digest] > RESENT * (size + 4 * CHUNK):
            raise Faulted(Fault.SILENT, f"was sent the {kind} {RESENT} times over, and still lacks it")
        return memoryview(blob).cast("B")[offset:]

    def _log(self, what: str, size: int, began: float) -> None:
        seconds = _now() - began
        logger.debug("round %d: %s: %s, %d bytes, %.3f s", self.order.round, self.peer.name, what, size, seconds)


class Push(Exchange):
    """The miner serves, and is called."""

    peer: MinerChannel

    async def run(self) -> ReceivedReply:
        try:
            received = await super().run()
        except BaseException:
            self.peer.version = None  # it may have any version now
            raise
        self.peer.reachable = True  # whatever broke on the way
        return received

    # --- out ----------------------------------------------------------------------------------------------------------

    async def _offer(self) -> None:
        """Send the order until it is accepted, and each blob that the miner lacks once.

        The newest step goes before the order, unasked, to a miner that is known to have the version before it: then
        one request does. Whatever comes of that, the miner says with the order what it lacks.
        """
        newest = self.order.update.steps[-1]
        if newest.kind == "delta" and newest.digest in self.blobs and self._has_all_but_newest():
            with contextlib.suppress(Lost, Refused):
                await self._put(newest.ref, 0)
        while not await self._persist(self._offer_once):
            pass
        self.peer.version = self.order.version

    def _has_all_but_newest(self) -> bool:
        before = self.order.update.versions[-2]
        return before is not None and self.peer.version == before

    async def _offer_once(self) -> bool:
        """True where the order is accepted; else the miner has got some of what it lacks."""
        try:
            text = await self.peer.post_order(self.signed)
            self.bytes_down += len(self.signed.body)
            self._check_status(text)
            return True
        except Refused as refused:
            if not refused.missing:
                raise faulted(refused) from None
            missing, held = refused.missing, refused.held
        self.peer.version = None
        for ref in missing:
            await self._push(ref, held.get(ref.digest, 0))
        return False

    async def _push(self, ref: BlobRef, offset: int) -> None:
        """The rest of a blob. A miner that holds another part of it, or got it damaged, says so with the order."""
        if offset == ref.bytes:  # it is about to find out that it has all of it
            self._blob(ref.digest, ref.bytes, ref.kind, offset)
            self.sent[ref.digest] += CHUNK
        else:
            try:
                await self._put(ref, offset)
                return
            except Refused as refused:
                if not refused.missing:
                    raise faulted(refused) from None
        await asyncio.sleep(pause(self.sent[ref.digest] // (ref.bytes + CHUNK), most=0.25, jitter=self.jitter))

    async def _put(self, ref: BlobRef, offset: int) -> None:
        """Send a blob from `offset` on. Raises Lost, Refused, Faulted."""
        rest = self._blob(ref.digest, ref.bytes, ref.kind, offset)
        self.progress.move(f"sending {ref.kind}", ref.bytes, offset)
        began, sent = _now(), 0

        def passed(size: int) -> None:
            nonlocal sent
            sent += size
            self.bytes_down += self.peer.wire_bytes(ref.kind, size)
            self.progress.moved += size

        try:
            self._check_status(await self.peer.put_blob(ref, rest, passed))
        finally:
            self.sent[ref.digest] += max(sent, CHUNK)
            self.progress.rest("ordering")
        self._log(f"{ref.kind} sent", ref.bytes - offset, began)

    def _check_status(self, text: bytes) -> Status:
        self.bytes_up += len(text)
        return open_answer(text, lambda signed: verify_message(signed, Status, self.order.hotkey))

    # --- back ---------------------------------------------------------------------------------------------------------

    async def _await_reply(self) -> tuple[Signed, Reply]:
        while (found := await self._persist(self._poll_once)) is None:
            await asyncio.sleep(0.05)  # still working; a miner that answers at once must not keep us busy
        return found

    async def _poll_once(self) -> tuple[Signed, Reply] | None:
        """Return the reply; None while the miner works."""
        status, body = await self.peer.poll_reply(self.signed)
        if status == 200:
            self.bytes_up += len(body)
            return open_answer(body, lambda signed: (signed, open_reply(signed, self.order, self.signed.digest)))
        self.progress.batches_done = self._check_status(body).batches_done
        return None

    async def _bring(self, download: Download, size: int) -> None:
        await self._persist(partial(self._fetch_rest, download, size))

    async def _fetch_rest(self, download: Download, size: int) -> None:
        before, began = download.held, _now()

        def take(chunk: bytes) -> None:
            download.write(chunk)
            self.progress.moved = download.held

        self.progress.move("fetching", size, before)
        try:
            await self.peer.read_payload(self.signed.digest, before, size, take)
        finally:
            self.bytes_up += self.peer.wire_bytes("payload", download.held - before)
            self.peer.bytes_up += download.held - before
            self.progress.rest("working")
        if download.held != size:
            raise Lost(f"{self.peer.name}: the payload broke off")
        self._log("payload fetched", size - before, began)

    # --- both ---------------------------------------------------------------------------------------------------------

    async def _persist(self, step: Callable[[], Awaitable[T]]) -> T:
        """Repeats a step until the miner has been away for `away_s`, or came and moved nothing in that time.

        Raises Faulted SILENT. The deadline is the caller's.
        """
        quota = self.limits.min_rate * self.limits.rate_s
        attempt, lost_since, moved = 0, float("inf"), self._moved
        while True:
            try:
                return await step()
            except Lost as lost:
                if isinstance(lost, Unproven):
                    moved = self._moved  # what came was of no use
                elif self._moved - moved >= quota:
                    attempt, lost_since, moved = 0, float("inf"), self._moved
                lost_since = min(lost_since, _now())
                away = _now() - lost_since >= self.limits.away_s
                if attempt or away:  # the first failure may be an idle connection that was closed under us
                    self.peer.reachable, self.peer.lost_because = False, one_line(str(lost))
                if away:
                    raise Faulted(Fault.SILENT, str(lost)) from None
            await asyncio.sleep(pause(attempt, jitter=self.jitter))
            attempt += 1

    @property
    def _moved(self) -> int:
        return self.bytes_up + self.bytes_down


def _now() -> float:
    """Return the running loop's time, which is virtual in an emulation."""
    return asyncio.get_running_loop().time()


def faulted(refused: Refused) -> Faulted:
    """Return what becomes of an order that the miner refuses. It may choose among REFUSAL_FAULTS only."""
    chosen = refused.fault
    fault = chosen if chosen is not None and chosen in REFUSAL_FAULTS else Fault.REFUSED
    return Faulted(fault, f"refused with {refused.status}: {refused.reason}")
