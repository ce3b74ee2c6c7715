"""Many miners in one process, which compute nothing: the gradient is the state that was given, but for one value.

python -m bench.crowd 0 32 0.2      # miners 0 to 31, that work 0.2 s at each order; their ports on stdout, as JSON
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time

from bittensor.sp_core import Keypair
from typing_extensions import Buffer

from pilot.interfaces import Refused
from pilot.transport.auth import Guard
from pilot.transport.server.axon import Axon
from protocol import BlobRef, Digest, Health, Hello, Hotkey, Order, Receipt, Reply, Signed, Status, Stop, digest


def miner_key(index: int) -> Keypair:
    return Keypair.create_from_uri(f"//Miner{index}")


class Parrot:
    """A miner (transport.Service). It asks for every order's state, and sends it back `work_s` after it has begun."""

    def __init__(self, hotkey: Hotkey, task: str, work_s: float) -> None:
        self.hotkey, self.task, self.work_s = hotkey, task, work_s
        self.state: State | None = None
        self.orders: dict[Digest, tuple[Order, float]] = {}
        self.receipts = 0

    def hello(self, nonce: str) -> Hello:
        return Hello(
            hotkey=self.hotkey, nonce=nonce, tasks=(self.task,), codecs=(), version=None, time_ns=time.time_ns()
        )

    def status(self) -> Status:
        return Status(
            hotkey=self.hotkey, state="idle", order=None, run=None, round=None, version=None, batches_done=0, time_ns=0
        )

    def health(self) -> Health:
        raise Refused(404, "a bench")

    def accept_order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
        if self.state is None or not self.state.whole or self.state.ref != order.update.refs[0]:
            raise Refused(409, "send it", missing=[order.update.refs[0]])
        self.orders = {digest: (order, asyncio.get_running_loop().time())}
        return self.status()

    def open_blob(self, caller: Hotkey, ref: BlobRef, offset: int) -> State:
        self.state = State(ref)
        return self.state

    async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        if order not in self.orders:
            raise Refused(404, "no such order")
        asked, began = self.orders[order]
        left_s = began + self.work_s - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, min(left_s, wait_s)))
        if left_s > wait_s:
            return None
        payload = self.read_payload(caller, order)
        payload[-4:] = struct.pack("<f", 1.0)  # so that there is a step, and the next state is another one
        return Reply(
            run=asked.run, round=asked.round, hotkey=self.hotkey, order=order, version=asked.version, done=asked.ranges,
            loss=1.0, seconds=self.work_s, codec=asked.codec_up, payload_digest=digest("payload", payload),
            payload_bytes=len(payload), residual_before=None, residual_after=None,
        )  # fmt: skip

    def read_payload(self, caller: Hotkey, order: Digest) -> bytearray:
        if self.state is None:
            raise Refused(404, "no such order")
        return self.state.data

    def mark_delivered(self, caller: Hotkey, order: Digest) -> None:
        pass

    def stop_order(self, caller: Hotkey, stop: Stop) -> Status:
        return self.status()

    def accept_receipt(self, caller: Hotkey, receipt: Receipt, signed: Signed) -> Status:
        self.receipts += receipt.verdict == "ACCEPTED"
        return self.status()


class State:
    """A state on its way into memory, and there (pilot.interfaces.BlobWriter)."""

    def __init__(self, ref: BlobRef) -> None:
        self.ref, self.data, self.whole = ref, bytearray(), False

    @property
    def held(self) -> int:
        return len(self.data)

    def write(self, chunk: Buffer) -> None:
        self.data += chunk

    def commit(self) -> None:
        self.whole = self.held == self.ref.bytes

    def abort(self) -> None: ...


async def serve(first: int, count: int, work_s: float) -> None:
    axons = []
    for index in range(first, first + count):
        keypair = miner_key(index)
        service = Parrot(keypair.ss58_address, "quadratic", work_s)
        axons.append(Axon(service, keypair, Guard(frozenset(), None, lambda _: None), "127.0.0.1", 0))
    print(json.dumps([await axon.start() for axon in axons]), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
