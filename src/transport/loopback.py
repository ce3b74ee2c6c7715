"""The network inside one process: services called directly, under a clock that jumps. For tests and simulations.

    run(simulation())        # days of virtual time pass at once, in the same order each time

What a run does depends only on its inputs: no sockets, no threads, no waiting. (Signatures are the one exception:
sr25519 salts them, so envelopes differ from run to run while their bodies and digests do not.)
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from protocol import Fault, Hotkey, Message, Order, ProtocolError, Receipt, Signed, Stop, digest
from transport import Service
from transport.auth import Keypair, open_reply, seal, unseal
from values import Blobs, Faulted, Received, Refused

CHUNK = 1 << 20
POLL_S = 20.0

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
    """The validator's `Network` over services in this process; each miner signs with its own keypair.

    A request takes `latency_s`, and its bytes `bandwidth_bps` (bits per second), of the running loop's time.
    """

    def __init__(
        self,
        keypair: Keypair,
        services: Mapping[Hotkey, Service],
        keypairs: Mapping[Hotkey, Keypair],
        latency_s: float = 0.0,
        bandwidth_bps: float = math.inf,
    ) -> None:
        self._keypair = keypair
        self._caller: Hotkey = keypair.ss58_address
        self._services = dict(services)
        self._keypairs = dict(keypairs)
        self._latency_s = latency_s
        self._bandwidth_bps = bandwidth_bps
        self._away: set[Hotkey] = set()
        self._change = asyncio.Event()  # set, and replaced, whenever a miner goes or comes

    def drop(self, hotkey: Hotkey) -> None:
        """The miner goes: exchanges under way with it end as SILENT."""
        self._away.add(hotkey)
        self._changed()

    def restore(self, hotkey: Hotkey) -> None:
        self._away.discard(hotkey)
        self._changed()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    # --- Network ------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def seal(self, message: Message) -> Signed:
        return seal(self._keypair, message)

    def peers(self) -> tuple[Hotkey, ...]:
        return tuple(sorted(self._services.keys() - self._away))

    async def wait_for_peer(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while not self.peers():
                    await self._change.wait()
        except TimeoutError:
            return False
        return True

    async def exchange(
        self, order: Order, signed: Signed, blobs: Blobs, path: Path, largest: int | None = None
    ) -> Received:
        """As the dendrite's: raises Faulted SILENT, LATE, or what the miner refused with."""
        if order.hotkey not in self.peers():
            raise Faulted(Fault.SILENT, "away")
        work = asyncio.create_task(self._exchange(order, signed, blobs, path, largest))
        gone = asyncio.create_task(self._until_gone(order.hotkey))
        try:
            await asyncio.wait({work, gone}, timeout=order.deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if gone.done():
                raise Faulted(Fault.SILENT, "went away")
            raise Faulted(Fault.LATE, f"no reply within {order.deadline_s:g} s")
        except ProtocolError as error:
            raise Faulted(error.fault, str(error)) from None
        except Refused as refused:
            raise Faulted(refused.fault or Fault.SILENT, f"refused with {refused.status}: {refused.reason}") from None
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def tell(self, hotkey: Hotkey, signed: Signed) -> bool:
        await self._travel(len(signed.body))
        if hotkey not in self.peers():
            return False
        service = self._services[hotkey]
        try:
            if signed.kind == Stop.kind:
                service.stop(self._caller, unseal(signed, Stop, self._caller))
            else:
                service.receipt(self._caller, unseal(signed, Receipt, self._caller), signed)
        except Refused:
            return False
        return True

    # --- an exchange --------------------------------------------------------------------------------------------------

    async def _until_gone(self, hotkey: Hotkey) -> None:
        while hotkey not in self._away:
            await self._change.wait()

    async def _exchange(self, order: Order, signed: Signed, blobs: Blobs, path: Path, largest: int | None) -> Received:
        service = self._services[order.hotkey]
        bytes_down = await self._offer(service, signed, blobs)
        reply = None
        while reply is None:
            await self._travel(0)
            reply = await service.reply(self._caller, signed.digest, POLL_S)
        answer = seal(self._keypairs[order.hotkey], reply)
        open_reply(answer, order, signed.digest)
        if largest is not None and reply.payload_bytes > largest:
            raise ProtocolError(f"payload: {reply.payload_bytes} bytes, at most {largest}")
        payload = service.payload(self._caller, signed.digest)
        if (memoryview(payload).nbytes, digest("payload", payload)) != (reply.payload_bytes, reply.payload_digest):
            raise ProtocolError("payload: not the bytes that the reply's digest names")
        bytes_up = len(answer.body) + reply.payload_bytes
        await self._travel(bytes_up)
        path.write_bytes(payload)
        service.delivered(self._caller, signed.digest)
        return Received(reply, answer, bytes_up, bytes_down)

    async def _offer(self, service: Service, signed: Signed, blobs: Blobs) -> int:
        """Until the order is accepted, with the blobs that it lacks, each once. Returns the bytes sent."""
        bytes_down = 0
        sent: set[str] = set()
        while True:
            await self._travel(len(signed.body))
            bytes_down += len(signed.body)
            try:
                service.order(self._caller, unseal(signed, Order, self._caller), signed.digest)
                return bytes_down
            except Refused as refused:
                if not refused.missing:
                    raise
                missing = refused.missing
            for ref in missing:
                if ref.digest in sent or ref.digest not in blobs:
                    raise Faulted(Fault.MALFORMED, f"asks for a {ref.kind} that is not of this order, or asks again")
                sent.add(ref.digest)
                data = memoryview(blobs[ref.digest]).cast("B")
                await self._travel(len(data))
                bytes_down += len(data)
                writer = service.receive(self._caller, ref, 0)
                for start in range(0, len(data), CHUNK):
                    writer.write(data[start : start + CHUNK])
                writer.commit()

    async def _travel(self, size: int) -> None:
        await asyncio.sleep(self._latency_s + 8 * size / self._bandwidth_bps)
