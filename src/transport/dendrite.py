"""The validator's client: finds its miners, gives orders, fetches replies and payloads. `market.round`'s `Network`.

A miner is whoever signs hello's nonce with the hotkey that its endpoint is pinned to. Connections may fail at any point
of an exchange: every step can be repeated, and a miner that was restarted simply gets its order again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from typing_extensions import Buffer

from protocol import (
    MAX_BLOB_BYTES,
    BlobRef,
    Blobs,
    Fault,
    Faulted,
    Hasher,
    Hello,
    Hotkey,
    Message,
    Order,
    ProtocolError,
    Received,
    Refused,
    Reply,
    Signed,
    new_nonce,
    one_line,
)
from transport.auth import Keypair, open_reply, seal, unseal
from transport.peer import Endpoint, Lost, Peer, open_session, parse_endpoint, receive

__all__ = ["Dendrite", "Endpoint", "Peer", "parse_endpoint"]

POLL_S = 20  # of a long poll
CALL_S = 10  # for an answer to a message

T = TypeVar("T")


class Dendrite:
    """The miners at `endpoints`, over HTTP.

    `pins` are hotkeys by "host:port", from earlier runs; `save_pins` keeps them when a first contact on loopback adds
    one. `say` gets a line, once, about an endpoint that cannot be used. A miner counts as SILENT after `grace_s` away.
    """

    def __init__(
        self,
        keypair: Keypair,
        endpoints: Sequence[Endpoint],
        pins: Mapping[str, Hotkey],
        save_pins: Callable[[dict[str, Hotkey]], None],
        task: str,
        say: Callable[[str], None],
        grace_s: float = 5.0,
        hello_interval_s: float = 1.0,
    ) -> None:
        self._keypair = keypair
        self._endpoints = tuple(endpoints)
        self._pins = dict(pins)
        self._save_pins = save_pins
        self._task = task
        self._say = say
        self._grace_s = grace_s
        self._hello_interval_s = hello_interval_s
        self._peers: tuple[Peer, ...] = ()

    async def start(self) -> None:
        """Opens the session, and says hello to whoever is not there yet from now on."""
        self._session = open_session()
        self._peers = tuple(
            Peer(e, e.hotkey or self._pins.get(str(e)), self._keypair, self._session) for e in self._endpoints
        )
        self._change = asyncio.get_running_loop().create_future()  # done when `peers()` has grown, or tending has died
        self._tending = asyncio.create_task(self._tend_all())
        self._tending.add_done_callback(lambda _: self._changed())

    async def close(self) -> None:
        self._tending.cancel()
        await asyncio.gather(self._tending, return_exceptions=True)
        await self._session.close()

    # --- Network ------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return time.monotonic()

    def seal(self, message: Message) -> Signed:
        return seal(self._keypair, message)

    def peers(self) -> tuple[Hotkey, ...]:
        """Those that answered hello, were not lost since, and do the task; sorted."""
        return tuple(sorted(p.hotkey for p in self._peers if p.reachable and p.hotkey))

    async def wait_for_peer(self, timeout_s: float) -> bool:
        return await self.wait_for_peers(1, timeout_s) >= 1

    async def wait_for_peers(self, count: int, timeout_s: float) -> int:
        """Until `count` are there or the time is over: how many are."""
        deadline = self.now() + timeout_s
        while True:
            self._raise_if_dead()
            left_s = deadline - self.now()
            if len(self.peers()) >= count or left_s <= 0:
                return len(self.peers())
            await asyncio.wait({self._change}, timeout=left_s)

    async def exchange(self, order: Order, signed: Signed, blobs: Blobs, path: Path) -> Received:
        """Order out; reply in; its payload, with the right digest, in the file `path`. Raises Faulted."""
        self._raise_if_dead()
        peer = self._find(order.hotkey)
        if peer is None:
            raise Faulted(Fault.SILENT, "no endpoint has answered with this hotkey")
        exchange = _Exchange(peer, order, signed, blobs, path, self._grace_s)
        try:
            async with asyncio.timeout(order.deadline_s) as deadline:
                return await exchange.run()
        except TimeoutError:
            if not deadline.expired():
                raise
            if exchange.accepted:
                raise Faulted(Fault.LATE, f"no reply within {order.deadline_s:g} s") from None
            peer.reachable = False
            raise Faulted(Fault.SILENT, f"did not take the order within {order.deadline_s:g} s") from None
        except ProtocolError as error:
            raise Faulted(error.fault, str(error)) from None

    async def tell(self, hotkey: Hotkey, signed: Signed) -> bool:
        """Delivers a receipt or a stop; False where the miner is away or refuses it."""
        peer = self._find(hotkey)
        if peer is None:
            return False
        body = signed.model_dump_json().encode()
        for _ in range(2):  # an idle connection may have been closed under us
            try:
                await peer.call("POST", f"/v1/{signed.kind}", self._grace_s, body=body)
                return True
            except Lost:
                continue
            except (Refused, ProtocolError):
                return False
        return False

    def _find(self, hotkey: Hotkey) -> Peer | None:
        known = [p for p in self._peers if p.hotkey == hotkey]
        return next((p for p in known if p.reachable), known[0] if known else None)

    # --- hello --------------------------------------------------------------------------------------------------------

    async def _tend_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for peer in self._peers:
                    group.create_task(self._tend(peer))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _tend(self, peer: Peer) -> None:
        while True:
            if not peer.reachable:
                await self._greet(peer)
            await asyncio.sleep(self._hello_interval_s)

    async def _greet(self, peer: Peer) -> None:
        nonce = new_nonce()
        try:
            signed = Signed.parse(await peer.hello(nonce, CALL_S))
            hello = unseal(signed, Hello, signed.signer)
        except Lost:
            return
        except (Refused, ProtocolError) as error:
            self._complain(peer, f"no valid hello ({one_line(str(error))}); not used")
            return
        if objection := self._objection(peer, nonce, signed.signer, hello):
            self._complain(peer, objection)
            return
        if peer.hotkey is None:
            self._pins[str(peer.endpoint)] = signed.signer
            self._save_pins(dict(self._pins))
            peer.hotkey = signed.signer
        peer.reachable, peer.complaint = True, ""
        self._changed()

    def _objection(self, peer: Peer, nonce: str, signer: Hotkey, hello: Hello) -> str | None:
        if hello.nonce != nonce or hello.hotkey != signer:
            return "its hello is not an answer to ours; not used"
        if peer.hotkey not in (None, signer):
            return f"answers as {signer}, but is pinned to {peer.hotkey}; not used, until the pin is removed"
        twin = self._find(signer)
        if twin is not None and twin is not peer and twin.reachable:
            return f"the same miner ({signer}) as at {twin.endpoint}; not used twice"
        if self._task not in hello.tasks:
            does = one_line(", ".join(hello.tasks)) or "none"
            return f"does not do task {self._task} (it does: {does}); start that miner with --tasks {self._task}"
        return None

    def _complain(self, peer: Peer, text: str) -> None:
        if text != peer.complaint:
            peer.complaint = text
            self._say(f"--axons {peer.endpoint}: {text}")

    def _changed(self) -> None:
        self._change.set_result(None)
        self._change = asyncio.get_running_loop().create_future()

    def _raise_if_dead(self) -> None:
        """Tending never ends by itself: its failure is ours."""
        if self._tending.done():
            self._tending.result()


class _Exchange:
    """One order's way to one miner and back. Cancelled by its caller at the deadline."""

    def __init__(self, peer: Peer, order: Order, signed: Signed, blobs: Blobs, path: Path, grace_s: float) -> None:
        self.peer, self.order, self.signed, self.blobs, self.path = peer, order, signed, blobs, path
        self.grace_s = grace_s
        self.accepted = False
        self.bytes_up = 0
        self.bytes_down = 0

    async def run(self) -> Received:
        restarts = 0
        while True:
            await self._offer()
            self.accepted = True
            try:
                signed, reply = await self._await_reply()
                await self._persist(partial(self._fetch, reply))
                return Received(reply, signed, self.bytes_up, self.bytes_down)
            except Refused as refused:
                if refused.status != 404 and not refused.missing:
                    raise _faulted(refused) from None
            await asyncio.sleep(_pause(restarts))  # it was restarted and knows nothing: it gets the order again
            restarts += 1

    async def _offer(self) -> None:
        """Until the order is accepted, with the blobs that the miner lacks, each sent once."""
        body = self.signed.model_dump_json().encode()
        sent: set[BlobRef] = set()
        while True:
            try:
                await self._persist(partial(self._call, "POST", "/v1/order", CALL_S, body=body))
                return
            except Refused as refused:
                missing = refused.missing
                if not missing:
                    raise _faulted(refused) from None
            for ref in missing:
                if ref in sent:
                    raise Faulted(Fault.MALFORMED, f"asks again for the {ref.kind} that it has taken")
                sent.add(ref)
                await self._push(ref)

    async def _push(self, ref: BlobRef) -> None:
        blob = self.blobs.get(ref.digest)
        if blob is None or memoryview(blob).nbytes != ref.bytes:
            raise Faulted(Fault.MALFORMED, f"asks for a {ref.kind} that is not of this order")
        target = f"/v1/blob?kind={ref.kind}&digest={ref.digest}&bytes={ref.bytes}"
        try:
            await self._persist(partial(self._call, "PUT", target, None, blob=blob))
        except Refused as refused:
            raise _faulted(refused) from None
        self.bytes_down += ref.bytes

    async def _await_reply(self) -> tuple[Signed, Reply]:
        target = f"/v1/reply?order={self.signed.digest}&wait={POLL_S}"
        while True:
            status, body = await self._persist(partial(self._call, "GET", target, POLL_S + CALL_S))
            if status == 200:
                signed = Signed.parse(body)
                return signed, open_reply(signed, self.order, self.signed.digest)
            await asyncio.sleep(0.05)  # it is still working; one that does not wait shall not keep us busy

    async def _fetch(self, reply: Reply) -> None:
        """The payload into the file, hashed as it comes; anything but the signed length and digest is MALFORMED."""
        if reply.payload_bytes > MAX_BLOB_BYTES:
            raise ProtocolError(f"payload: {reply.payload_bytes} bytes, at most {MAX_BLOB_BYTES}")
        hasher, size = Hasher("payload"), 0
        async with self.peer.open("GET", f"/v1/payload?order={self.signed.digest}", None) as response:
            if response.content_length != reply.payload_bytes:
                raise ProtocolError(f"payload: {response.content_length} bytes, signed were {reply.payload_bytes}")
            with self.path.open("wb") as file:
                while piece := await receive(response):
                    hasher.update(piece)
                    file.write(piece)
                    size += len(piece)
        if size != reply.payload_bytes or hasher.hexdigest() != reply.payload_digest:
            raise ProtocolError("payload: not the bytes that the reply's digest names")
        self.bytes_up += size

    async def _call(
        self, method: str, target: str, timeout_s: float | None, body: bytes = b"", blob: Buffer | None = None
    ) -> tuple[int, bytes]:
        status, answer = await self.peer.call(method, target, timeout_s, body=body, blob=blob)
        self.bytes_down += len(body)
        self.bytes_up += len(answer)
        return status, answer

    async def _persist(self, step: Callable[[], Awaitable[T]]) -> T:
        """Repeats a step while the miner is away, for `grace_s` at most. Raises Faulted SILENT."""
        attempt, lost_since = 0, float("inf")
        while True:
            try:
                return await step()
            except Lost as lost:
                lost_since = min(lost_since, time.monotonic())
                away = time.monotonic() - lost_since >= self.grace_s
                if attempt or away:  # the first failure may be an idle connection that was closed under us
                    self.peer.reachable = False
                if away:
                    raise Faulted(Fault.SILENT, str(lost)) from None
            await asyncio.sleep(_pause(attempt))
            attempt += 1


def _pause(attempt: int) -> float:
    """Seconds before another attempt: doubling from 0.05 to 1, with jitter so that many do not come at once."""
    return min(1.0, 0.05 * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1.5)


def _faulted(refused: Refused) -> Faulted:
    return Faulted(refused.fault or Fault.SILENT, f"refused with {refused.status}: {refused.reason}")
