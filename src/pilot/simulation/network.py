"""The network of an emulation: miners in this process behind emulated links, under a clock that jumps.

The exchange is the real one (`transport.client.exchange.Push`). `EmulatedMiner` makes its requests of a `MinerService`
directly: each travels down the miner's link (`simulation.link_model`) with its bytes, and the answer travels up.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from pilot.common.limits import Limits
from pilot.interfaces import Blobs, Faulted, MinerService, MinerState, ReceivedReply, Refused
from pilot.simulation.link_model import EmulatedLink, LinkSpec
from pilot.transport.auth import Keypair, sign_message, verify_message
from pilot.transport.client.exchange import Push
from pilot.transport.client.remote_miner import MinerChannel
from protocol import BlobRef, Digest, Fault, Hotkey, Message, Order, ProtocolError, Receipt, Signed, Stop

CHUNK = 1 << 20
POLL_S = 20.0
NO_NONCE = "0" * 32

T = TypeVar("T")


class EmulatedMiner(MinerChannel):
    """A service in this process, as its validator reaches it over a link. It signs with its own keypair."""

    def __init__(
        self,
        service: MinerService,
        keypair: Keypair,
        caller: Hotkey,
        link: EmulatedLink,
        jitter: Random,
        scale: tuple[float, float],
    ) -> None:
        """`scale`: how many times its bytes a payload counts for on its way up, and a state or delta down."""
        super().__init__("emulated", keypair.ss58_address)
        self.service, self.link, self.jitter = service, link, jitter
        self._keypair, self._caller = keypair, caller
        self._scale_up, self._scale_down = scale

    def wire_bytes(self, kind: str, size: int) -> int:
        if kind in ("state", "delta"):
            return round(size * self._scale_down)
        return round(size * self._scale_up) if kind == "payload" else size

    async def post_order(self, signed: Signed) -> bytes:
        await self.link.travel("down", len(signed.body))
        try:
            order = verify_message(signed, Order, self._caller)
            status = self.service.accept_order(self._caller, order, signed.digest)
        except Refused:
            await self.link.travel("up", 0)
            raise
        await self.link.travel("up", 0)
        return self._seal(status)

    async def put_blob(self, ref: BlobRef, rest: memoryview, passed: Callable[[int], object]) -> bytes:
        offset = ref.bytes - len(rest)
        try:  # as in HTTP, where the sender waits for a 100 Continue before the first byte
            self.service.open_blob(self._caller, ref, offset)
        except Refused:
            await self.link.travel("down", 0)
            await self.link.travel("up", 0)
            raise
        size, began = self.wire_bytes(ref.kind, len(rest)), _now()
        await self.link.travel("down", size)
        passed(len(rest))
        self.down.add(size, _now() - began)
        writer = self.service.open_blob(self._caller, ref, offset)  # as it is now: another exchange may have sent some
        for start in range(0, len(rest), CHUNK):
            writer.write(rest[start : start + CHUNK])
        writer.commit()
        await self.link.travel("up", 0)
        return self._seal(self.service.status())

    async def poll_reply(self, signed: Signed) -> tuple[int, bytes]:
        await self.link.travel("down", 0)
        reply = await self.service.wait_for_reply(self._caller, signed.digest, POLL_S)
        if reply is None:
            await self.link.travel("up", 0)
            return 202, self._seal(self.service.status())
        answer = sign_message(self._keypair, reply)
        await self.link.travel("up", len(answer.body))
        return 200, answer.model_dump_json().encode()

    async def read_payload(self, order: Digest, offset: int, size: int, write: Callable[[bytes], object]) -> None:
        await self.link.travel("down", 0)
        payload = memoryview(self.service.read_payload(self._caller, order)).cast("B")
        if len(payload) != size:
            raise ProtocolError(f"payload: {len(payload)} bytes, {size} signed")
        wire, began = self.wire_bytes("payload", size - offset), _now()
        await self.link.travel("up", wire)
        self.up.add(wire, _now() - began)
        for start in range(offset, size, CHUNK):
            write(bytes(payload[start : start + CHUNK]))
        self.service.mark_delivered(self._caller, order)

    async def deliver(self, signed: Signed) -> bool:
        await self.link.travel("down", len(signed.body))
        try:
            if signed.kind == Stop.kind:
                self.service.stop_order(self._caller, verify_message(signed, Stop, self._caller))
            else:
                self.service.accept_receipt(self._caller, verify_message(signed, Receipt, self._caller), signed)
        except Refused:
            return False
        await self.link.travel("up", 0)
        return True

    def _seal(self, message: Message) -> bytes:
        return sign_message(self._keypair, message).model_dump_json().encode()


class EmulatedNetwork:
    """The validator's `Network` over services in this process, each behind a link of its own."""

    def __init__(
        self,
        keypair: Keypair,
        services: Mapping[Hotkey, MinerService],
        keypairs: Mapping[Hotkey, Keypair],
        latency_s: float = 0.0,
        bandwidth_bps: float = math.inf,
        *,
        links: Mapping[Hotkey, LinkSpec] | None = None,
        seed: int = 0,
        scale: float | tuple[float, float] = 1.0,
    ) -> None:
        """Miners without a link among `links` get one of this latency and bandwidth (bits per second).

        `seed` is for the links' randomness. States and payloads count for `scale` times their bytes, in time and in
        figures, so that a small model can stand for a large one; a pair gives the factors up and down, because codecs
        differ in what shapes cost them.
        """
        self._keypair, self._keypairs = keypair, dict(keypairs)
        self._seed = seed
        self._scale = scale if isinstance(scale, tuple) else (scale, scale)
        plain = LinkSpec(up_bps=bandwidth_bps, down_bps=bandwidth_bps, latency_s=latency_s)
        self._links = {hotkey: (links or {}).get(hotkey, plain) for hotkey in self._keypairs}
        self._miners = {hotkey: self._miner(hotkey, service) for hotkey, service in services.items()}
        self._away: set[Hotkey] = set()
        self._change = asyncio.Event()  # set, and replaced, whenever a miner goes or comes

    def _miner(self, hotkey: Hotkey, service: MinerService) -> EmulatedMiner:
        link = EmulatedLink(self._links[hotkey], self._seed, hotkey)
        jitter = Random(f"{self._seed}/{hotkey}/pauses")
        return EmulatedMiner(service, self._keypairs[hotkey], self._keypair.ss58_address, link, jitter, self._scale)

    def drop(self, hotkey: Hotkey) -> None:
        """Take a miner away: exchanges under way with it end as SILENT. Its owner ends what it works on."""
        self._away.add(hotkey)
        self._changed()

    def restore(self, hotkey: Hotkey, service: MinerService | None = None, link: LinkSpec | None = None) -> None:
        """Bring a miner back; with `service` as another process, with `link` behind another link."""
        self._away.discard(hotkey)
        miner = self._miners.get(hotkey)
        if link is not None and link != self._links[hotkey]:
            self._links[hotkey] = link
            if miner is not None:
                miner.link = EmulatedLink(link, self._seed, hotkey)
        if miner is None:
            assert service is not None
            self._miners[hotkey] = self._miner(hotkey, service)
        elif service is not None and service is not miner.service:
            miner.service, miner.version = service, None
        self._changed()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    # --- Network ------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return _now()

    def sign(self, message: Message) -> Signed:
        return sign_message(self._keypair, message)

    def peers(self) -> tuple[Hotkey, ...]:
        return tuple(sorted(self._miners.keys() - self._away))

    def miner_states(self) -> tuple[MinerState, ...]:
        """Return the miners that are there, with what the links carry; their progress is left out."""
        found = []
        for hotkey in self.peers():
            miner = self._miners[hotkey]
            latency_s = 2 * miner.link.spec.latency_s
            found.append(MinerState(miner.name, hotkey, "idle", 0, 0, latency_s, 0, 0, miner.up.bps, miner.down.bps))
        return tuple(found)

    def known_codecs(self, hotkey: Hotkey) -> tuple[str, ...] | None:
        return self._miners[hotkey].service.hello(NO_NONCE).codecs if hotkey in self._miners else None

    async def wait_for_peer(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while not self.peers():
                    await self.wait_for_change()
        except TimeoutError:
            return False
        return True

    async def wait_for_change(self) -> None:
        """Wait until a miner comes or goes."""
        await self._change.wait()

    async def exchange(
        self,
        order: Order,
        signed: Signed,
        blobs: Blobs,
        path: Path,
        largest: int | None = None,
        accepted: Callable[[], object] | None = None,
    ) -> ReceivedReply:
        """Run an exchange. Raises Faulted: SILENT if the miner is or goes away, LATE, or the exchange's own fault."""
        if order.hotkey not in self.peers():
            raise Faulted(Fault.SILENT, "away")
        miner, limits = self._miners[order.hotkey], Limits()
        service = miner.service
        push = Push(miner, order, signed, blobs, path, largest, limits, lambda path, size: None, None)
        push.on_accepted = accepted or push.on_accepted
        try:
            received = await self._while_there(order.hotkey, push.run(), order.deadline_s)
            if received is not None:
                return received
            faulted = Faulted(Fault.LATE, f"no reply within {order.deadline_s:g} s")
        except ProtocolError as error:
            faulted = Faulted(error.fault, str(error))
        except Faulted as error:  # the answer of a process that was killed never arrives
            killed = order.hotkey in self._away or miner.service is not service
            faulted = Faulted(Fault.SILENT, "went away") if killed else error
        except _Gone:
            faulted = Faulted(Fault.SILENT, "went away")
        path.unlink(missing_ok=True)
        raise faulted

    async def await_late_reply(self, order: Order, signed: Signed, timeout_s: float) -> Signed | None:
        """Wait for the reply to an order whose round is closed; its payload is never fetched."""
        if order.hotkey not in self.peers():
            return None
        waiting = self._miners[order.hotkey].await_late_reply(order, signed)
        try:
            return await self._while_there(order.hotkey, waiting, timeout_s)
        except _Gone:
            return None

    async def deliver(self, hotkey: Hotkey, signed: Signed) -> bool:
        return hotkey in self.peers() and await self._miners[hotkey].deliver(signed)

    async def _while_there(self, hotkey: Hotkey, work: Coroutine[Any, Any, T], timeout_s: float) -> T | None:
        """Return its result, or None if that takes longer. Raises _Gone if the miner goes or is restarted before."""
        doing = asyncio.create_task(work)
        gone = asyncio.create_task(self._until_gone(hotkey))
        try:
            await asyncio.wait({doing, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            if gone.done():
                raise _Gone
            return None
        finally:
            gone.cancel()
            while not doing.done():  # more than once: wait_for swallows a cancellation that comes as its wait ends
                doing.cancel()
                await asyncio.sleep(0)

    async def _until_gone(self, hotkey: Hotkey) -> None:
        service = self._miners[hotkey].service
        while hotkey not in self._away and self._miners[hotkey].service is service:
            await self.wait_for_change()


class _Gone(Exception):
    """The miner went away, or was restarted."""


def _now() -> float:
    return asyncio.get_running_loop().time()
