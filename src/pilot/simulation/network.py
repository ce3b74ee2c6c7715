"""The network inside one process: services called directly, under a clock that jumps. For tests and simulations.

    run(simulation())        # days of virtual time pass at once, in the same order each time

What a run does depends only on its inputs: no sockets, no threads, no waiting. (Signatures are the one exception:
sr25519 salts them, so envelopes differ from run to run while their bodies and digests do not.)

Each miner is behind a link of its own (`pilot.simulation.link_model`). A request takes the way there, with its bytes, and the way
back, with the answer's. A transfer that is broken off begins anew.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pilot.interfaces import Blobs, Faulted, MinerService, MinerState, ReceivedReply, Refused
from pilot.simulation.link_model import EmulatedLink, LinkSpec
from pilot.transport.auth import Keypair, open_reply, sign_message, verify_message
from pilot.transport.client.remote_miner import Meter
from protocol import BlobRef, Fault, Hotkey, Message, Order, ProtocolError, Receipt, Reply, Signed, Stop, digest

CHUNK = 1 << 20
POLL_S = 20.0
NO_NONCE = "0" * 32
TIMES = 2  # that a blob is sent for an order: the second time heals a model

T = TypeVar("T")


class _Jump(selectors.DefaultSelector):
    """Where an event loop would sleep until its next timer, time jumps there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            raise RuntimeError("deadlock: every task waits, and no timer is set")
        self.now = max(self.now + timeout, math.nextafter(self.now, math.inf))  # always some progress
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` starts at 0 and passes only when nothing is left to do before the next timer.

    `run_in_executor` (so `asyncio.to_thread` too) runs the function on the loop itself, in its turn. Real threads and
    sockets do not belong here: while they work, nothing is ready. Raises RuntimeError instead of waiting for ever.
    """

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)
        # The loop fires timers up to time() + this. At its own 1e-9 s that sum is time() itself from 194 days on, where
        # doubles are coarser, and a timer that is due would never fire.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self._jump.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        async def call() -> T:
            return func(*args)

        return self.create_task(call())


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` under virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class Loopback:
    """The validator's `Network` over services in this process; each miner signs with its own keypair."""

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
        """Miners without one among the `links` have one with this latency and bandwidth (bits per second).

        `seed` is of what is random about links. States and payloads count for `scale` times their bytes, in time and in
        the figures: a small model stands for a large one. Two are up and down: codecs differ in what shapes cost.
        """
        self._keypair = keypair
        self._caller: Hotkey = keypair.ss58_address
        self._services = dict(services)
        self._keypairs = dict(keypairs)
        self._seed = seed
        self._scale_up, self._scale_down = scale if isinstance(scale, tuple) else (scale, scale)
        plain = LinkSpec(up_bps=bandwidth_bps, down_bps=bandwidth_bps, latency_s=latency_s)
        specs = {hotkey: (links or {}).get(hotkey, plain) for hotkey in self._keypairs}
        self._links = {hotkey: EmulatedLink(spec, seed, hotkey) for hotkey, spec in specs.items()}
        self._meters = {hotkey: (Meter(), Meter()) for hotkey in self._keypairs}  # up, down
        self._away: set[Hotkey] = set()
        self._change = asyncio.Event()  # set, and replaced, whenever a miner goes or comes

    def drop(self, hotkey: Hotkey) -> None:
        """The miner goes: exchanges under way with it end as SILENT. What it works on is its owner's to end."""
        self._away.add(hotkey)
        self._changed()

    def restore(self, hotkey: Hotkey, service: MinerService | None = None, link: LinkSpec | None = None) -> None:
        """The miner is there again; with a `service`, as another process, behind another link where one is given."""
        self._away.discard(hotkey)
        self._services[hotkey] = service or self._services[hotkey]
        if link is not None and link != self._links[hotkey].spec:
            self._links[hotkey] = EmulatedLink(link, self._seed, hotkey)
        self._changed()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    # --- Network ------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def sign(self, message: Message) -> Signed:
        return sign_message(self._keypair, message)

    def peers(self) -> tuple[Hotkey, ...]:
        return tuple(sorted(self._services.keys() - self._away))

    def miner_states(self) -> tuple[MinerState, ...]:
        """As the dendrite's, but for the display's part."""
        found = []
        for hotkey in self.peers():
            up, down = self._meters[hotkey]
            latency_s = 2 * self._links[hotkey].spec.latency_s
            found.append(MinerState("loopback", hotkey, "idle", 0, 0, latency_s, 0, 0, up.bps, down.bps))
        return tuple(found)

    def known_codecs(self, hotkey: Hotkey) -> tuple[str, ...] | None:
        return self._services[hotkey].hello(NO_NONCE).codecs if hotkey in self._services else None

    async def wait_for_peer(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while not self.peers():
                    await self.wait_for_change()
        except TimeoutError:
            return False
        return True

    async def wait_for_change(self) -> None:
        """Until somebody comes or goes."""
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
        """As the dendrite's: raises Faulted SILENT, LATE, or what the miner refused with."""
        if order.hotkey not in self.peers():
            raise Faulted(Fault.SILENT, "away")
        whole = self._exchange(order, signed, blobs, path, largest, accepted or (lambda: None))
        try:
            received = await self._while_there(order.hotkey, whole, order.deadline_s)
        except ProtocolError as error:
            raise Faulted(error.fault, str(error)) from None
        except Refused as refused:
            if order.hotkey in self._away:  # the answer of a process that was killed never arrives
                raise Faulted(Fault.SILENT, "went away") from None
            raise Faulted(refused.fault or Fault.SILENT, f"refused with {refused.status}: {refused.reason}") from None
        except _Gone:
            raise Faulted(Fault.SILENT, "went away") from None
        if received is None:
            raise Faulted(Fault.LATE, f"no reply within {order.deadline_s:g} s")
        return received

    async def await_late_reply(self, order: Order, signed: Signed, timeout_s: float) -> Signed | None:
        """The reply to an order whose round is closed, if it comes in time; never its payload."""
        if order.hotkey not in self.peers():
            return None
        try:
            answer = await self._while_there(order.hotkey, self._answer(order, signed), timeout_s)
        except (ProtocolError, Refused, _Gone):
            return None
        return None if answer is None else answer[1]

    async def deliver(self, hotkey: Hotkey, signed: Signed) -> bool:
        await self._links[hotkey].travel("down", len(signed.body))
        if hotkey not in self.peers():
            return False
        service = self._services[hotkey]
        try:
            if signed.kind == Stop.kind:
                service.stop_order(self._caller, verify_message(signed, Stop, self._caller))
            else:
                service.accept_receipt(self._caller, verify_message(signed, Receipt, self._caller), signed)
        except Refused:
            return False
        await self._links[hotkey].travel("up", 0)
        return True

    # --- an exchange --------------------------------------------------------------------------------------------------

    async def _while_there(self, hotkey: Hotkey, work: Coroutine[Any, Any, T], timeout_s: float) -> T | None:
        """Its result; None where that takes longer. Raises _Gone where the miner goes, or begins anew, before."""
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
        service = self._services[hotkey]
        while hotkey not in self._away and self._services[hotkey] is service:
            await self.wait_for_change()

    async def _exchange(
        self,
        order: Order,
        signed: Signed,
        blobs: Blobs,
        path: Path,
        largest: int | None,
        accepted: Callable[[], object],
    ) -> ReceivedReply:
        began = self.now()
        service, link = self._services[order.hotkey], self._links[order.hotkey]
        bytes_down, times, answered = 0, Counter[str](), None
        while answered is None:
            bytes_down += await self._offer(service, link, self._meters[order.hotkey][1], signed, blobs, times)
            accepted()
            try:
                answered = await self._answer(order, signed)
            except Refused as refused:  # what it has does not lead to the order's version
                if not refused.missing:
                    raise
        reply, answer = answered
        if largest is not None and reply.payload_bytes > largest:
            raise ProtocolError(f"payload: {reply.payload_bytes} bytes, at most {largest}")
        await link.travel("down", 0)
        payload = service.read_payload(self._caller, signed.digest)
        if (memoryview(payload).nbytes, digest("payload", payload)) != (reply.payload_bytes, reply.payload_digest):
            raise ProtocolError("payload: not the bytes that the reply's digest names")
        scaled = round(reply.payload_bytes * self._scale_up)
        sent = self.now()
        await link.travel("up", scaled)
        self._meters[order.hotkey][0].add(scaled, self.now() - sent)
        path.write_bytes(payload)
        service.mark_delivered(self._caller, signed.digest)
        return ReceivedReply(reply, answer, len(answer.body) + scaled, bytes_down, self.now() - began)

    async def _answer(self, order: Order, signed: Signed) -> tuple[Reply, Signed]:
        """Long polls until the reply is there."""
        service, link = self._services[order.hotkey], self._links[order.hotkey]
        while True:
            await link.travel("down", 0)
            reply = await service.wait_for_reply(self._caller, signed.digest, POLL_S)
            answer = None if reply is None else sign_message(self._keypairs[order.hotkey], reply)
            await link.travel("up", len(answer.body) if answer else 0)
            if answer is not None:
                return open_reply(answer, order, signed.digest), answer

    async def _offer(
        self, service: MinerService, link: EmulatedLink, meter: Meter, signed: Signed, blobs: Blobs, times: Counter[str]
    ) -> int:
        """Until the order is accepted, with the blobs that it lacks; `times` each was sent. Returns the bytes sent."""
        bytes_down = 0
        while True:
            await link.travel("down", len(signed.body))
            bytes_down += len(signed.body)
            missing = self._order(service, signed)
            await link.travel("up", 0)
            if not missing:
                return bytes_down
            for ref in missing:
                if ref.kind in ("state", "delta") and ref.digest not in blobs and ref.digest in signed.body:
                    raise Faulted(Fault.VALIDATOR_FAILED, "the validator was restarted and no longer has that version")
                if times[ref.digest] == TIMES or ref.digest not in blobs:
                    raise Faulted(Fault.MALFORMED, f"asks for a {ref.kind} that is not of this order, or asks again")
                times[ref.digest] += 1
                data = memoryview(blobs[ref.digest]).cast("B")
                size = round(len(data) * self._scale_down) if ref.kind in ("state", "delta") else len(data)
                began = self.now()
                await link.travel("down", size)
                meter.add(size, self.now() - began)
                bytes_down += size
                writer = service.open_blob(self._caller, ref, 0)
                for start in range(0, len(data), CHUNK):
                    writer.write(data[start : start + CHUNK])
                writer.commit()
                await link.travel("up", 0)

    def _order(self, service: MinerService, signed: Signed) -> tuple[BlobRef, ...]:
        """The blobs that are missing, if any: else it is accepted. Raises Refused."""
        try:
            service.accept_order(self._caller, verify_message(signed, Order, self._caller), signed.digest)
        except Refused as refused:
            if not refused.missing:
                raise
            return refused.missing
        return ()


class _Gone(Exception):
    """The miner went away."""
