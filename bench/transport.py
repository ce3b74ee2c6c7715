"""How fast bulk goes between two processes of this machine: 500 MB, signed, blake3 at both ends, streamed.

    python -m bench.transport

Push: `Dendrite.exchange` of an order whose state is 500 MB and whose gradient is a few bytes, the state's hash at the
sender included; fetch: the other way round, with the miner's hash, into a new file. Beside them, in turns: a raw socket
without any hash, an aiohttp POST of a `bytes` body, and one of a file. Medians. Extra memory is the peak above what the
process held before, buffers of the state and the gradient included in that.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web
from bittensor.sp_core import Keypair

from bench import Figure
from pilot.interfaces import Refused
from pilot.transport.auth import Guard
from pilot.transport.client.dendrite import Dendrite, Endpoint
from pilot.transport.server.axon import Axon
from pilot.worker.blob_inbox import BufferWriter
from protocol import (
    BlobRef,
    DataSpec,
    Digest,
    Health,
    Hello,
    Hotkey,
    Order,
    Range,
    Receipt,
    Reply,
    Signed,
    Status,
    Stop,
    TaskSpec,
    Update,
    VersionStep,
    digest,
    next_version,
)

SIZE = 500_000_000  # bytes
TURNS = 7
SMALL = 64
VALIDATOR = Keypair.create_from_uri("//Validator")
MINERS = [Keypair.create_from_uri(f"//Miner{i}") for i in range(2)]


class Bulk:
    """A miner that takes states into memory used again, and answers with the gradient whose length the order tells."""

    def __init__(self, hotkey: Hotkey) -> None:
        self.hotkey = hotkey
        self.buffer = np.zeros(SIZE, np.uint8).data
        self.gradient = np.ones(SIZE, np.uint8).data
        self.writer: BufferWriter | None = None
        self.orders: dict[Digest, Order] = {}

    def hello(self, nonce: str) -> Hello:
        return Hello(hotkey=self.hotkey, nonce=nonce, tasks=("bulk",), codecs=(), version=None, time_ns=time.time_ns())

    def status(self) -> Status:
        return Status(
            hotkey=self.hotkey, state="idle", order=None, run=None, round=None, version=None, batches_done=0, time_ns=0
        )

    def health(self) -> Health:
        raise Refused(404, "a bench")

    def accept_order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
        if self.writer is None or not self.writer.complete or self.writer.ref != order.update.refs[0]:
            raise Refused(409, "send it", missing=[order.update.refs[0]])
        self.orders = {digest: order}
        return self.status()

    def open_blob(self, caller: Hotkey, ref: BlobRef, offset: int) -> BufferWriter:
        self.writer = BufferWriter(ref, self.buffer[: ref.bytes])
        return self.writer

    async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        asked = self.orders[order]
        payload = self.read_payload(caller, order)
        payload_digest = await asyncio.to_thread(digest, "payload", payload)
        return Reply(
            run=asked.run, round=asked.round, hotkey=self.hotkey, order=order, version=asked.version, done=asked.ranges,
            loss=0.0, seconds=0.0, codec="fp32", payload_digest=payload_digest, payload_bytes=len(payload),
            residual_before=None, residual_after=None,
        )  # fmt: skip

    def read_payload(self, caller: Hotkey, order: Digest) -> memoryview:
        return self.gradient[: self.orders[order].ranges[0].stop]

    def mark_delivered(self, caller: Hotkey, order: Digest) -> None:
        pass

    def stop_order(self, caller: Hotkey, stop: Stop) -> Status:
        raise Refused(404, "a bench")

    def accept_receipt(self, caller: Hotkey, receipt: Receipt, signed: Signed) -> Status:
        raise Refused(404, "a bench")


# --- the miner's process ----------------------------------------------------------------------------------------------


def memory(name: str) -> int:
    """VmRSS or VmHWM (the peak) of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def forget_peak() -> int:
    """From now on the peak is counted anew. What is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def raw_server(listener: socket.socket, buffer: memoryview) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            left = SIZE
            while left:
                left -= connection.recv_into(buffer[:left])
            connection.sendall(b"!")


async def serve(keypair: Keypair) -> None:
    """Three ports on stdout: the axon's, plain aiohttp's, the raw socket's."""
    bulk = Bulk(keypair.ss58_address)
    axon = Axon(bulk, keypair, Guard(frozenset(), None, lambda _: None), "127.0.0.1", 0)
    before = 0

    async def post(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    async def peak(request: web.Request) -> web.Response:
        nonlocal before
        answer = memory("VmHWM") - before
        before = forget_peak()
        return web.Response(text=str(answer))

    app = web.Application(client_max_size=2 * SIZE)
    app.add_routes([web.post("/", post), web.get("/peak", peak)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=raw_server, args=(listener, bulk.buffer), daemon=True).start()
    print(json.dumps([await axon.start(), runner.addresses[0][1], listener.getsockname()[1]]), flush=True)
    await asyncio.Event().wait()


# --- the validator's process ------------------------------------------------------------------------------------------


class Bench:
    """The validator's end, with the two miners' ports."""

    def __init__(self, network: Dendrite, session: aiohttp.ClientSession, ports: list[list[int]], folder: Path) -> None:
        self.network, self.session, self.ports, self.folder = network, session, ports, folder
        self.state = np.random.default_rng(0).integers(0, 255, SIZE, np.uint8).data
        self.round = 0

    def order(self, miner: int, blob: BlobRef, answer: int) -> Order:
        self.round += 1
        return Order(
            run="bench", round=self.round, hotkey=MINERS[miner].ss58_address, version=next_version(None, blob.digest),
            update=Update(
                base=None, steps=(VersionStep(kind="state", codec="fp32", digest=blob.digest, bytes=blob.bytes),)
            ),
            state_digest=None,
            task=TaskSpec(name="bulk", parameters={}),
            data=DataSpec(blobs={"tokens": blob}), ranges=(Range(0, answer),),
            deadline_s=120.0, staleness=0, codec_up="fp32", codec_down="fp32",
        )  # fmt: skip

    async def exchange(self, miner: int, size: int, answer: int) -> None:
        self.state[:8] = os.urandom(8)  # another state each time: nobody has it yet
        state = self.state[:size]
        ref = BlobRef(kind="state", digest=await asyncio.to_thread(digest, "state", state), bytes=size)
        await self.send(miner, ref, state, answer)

    async def send(self, miner: int, ref: BlobRef, state: memoryview, answer: int) -> None:
        order = self.order(miner, ref, answer)
        path = self.folder / f"payload{miner}"
        await self.network.exchange(order, self.network.sign(order), {ref.digest: state}, path)
        assert path.stat().st_size == answer

    async def push(self) -> None:
        await self.exchange(0, SIZE, SMALL)

    async def fetch(self) -> None:
        await self.exchange(0, SMALL, SIZE)

    async def both(self) -> None:
        """One state, one hash, one buffer, two miners."""
        self.state[:8] = os.urandom(8)
        ref = BlobRef(kind="state", digest=await asyncio.to_thread(digest, "state", self.state), bytes=SIZE)
        await asyncio.gather(*(self.send(miner, ref, self.state, SMALL) for miner in range(2)))

    async def raw(self) -> None:
        await asyncio.to_thread(self._raw)

    def _raw(self) -> None:
        with socket.create_connection(("127.0.0.1", self.ports[0][2])) as connection:
            connection.sendall(self.state)
            assert connection.recv(1) == b"!"

    async def post(self, body: Any) -> None:
        async with self.session.post(f"http://127.0.0.1:{self.ports[0][1]}/", data=body) as response:
            assert int(await response.text()) == SIZE

    async def post_bytes(self) -> None:
        await self.post(bytes(self.state))

    async def post_file(self) -> None:
        with (self.folder / "file").open("rb") as file:
            await self.post(file)

    async def miners_peak(self) -> int:
        async with self.session.get(f"http://127.0.0.1:{self.ports[0][1]}/peak") as response:
            return int(await response.text())

    async def seconds(self, play: Callable[[], Awaitable[None]]) -> float:
        for leftover in self.folder.glob("payload*"):
            leftover.unlink()
        began = time.perf_counter()
        await play()
        return time.perf_counter() - began

    async def extra(self, play: Callable[[], Awaitable[None]]) -> float:
        """Extra memory at the worse of the two ends, in MB."""
        await self.miners_peak()
        before = forget_peak()
        await self.seconds(play)
        return max(memory("VmHWM") - before, await self.miners_peak()) / 1e6


async def measure(ports: list[list[int]], folder: Path) -> None:
    endpoints = [Endpoint("127.0.0.1", port[0]) for port in ports]
    network = Dendrite(VALIDATOR, endpoints, {}, lambda _: None, "bulk", print)
    await network.start()
    async with aiohttp.ClientSession() as session:
        assert await network.wait_for_peers(2, 20) == 2
        bench = Bench(network, session, ports, folder)
        (folder / "file").write_bytes(bench.state)
        plays = (bench.raw, bench.push, bench.post_bytes, bench.fetch, bench.post_file, bench.both)
        times: dict[str, list[float]] = {play.__name__: [] for play in plays}
        for turn in range(TURNS + 1):
            for play in plays:
                elapsed = await bench.seconds(play)
                if turn:  # the first is a warm-up
                    times[play.__name__].append(elapsed)
        speed = {name: SIZE / 1e9 / median(values) for name, values in times.items()}
        extra = max([await bench.extra(play) for play in (bench.push, bench.fetch, bench.both)])
        extra_post = await bench.extra(bench.post_bytes)
    await network.close()
    Figure("transport.push_gb_s", speed["push"], "GB/s", "raw socket", speed["raw"], speed["push"] / speed["raw"])
    for name, peer in (("bytes", "aiohttp POST of bytes"), ("file", "aiohttp POST of a file")):
        ratio = speed["push"] / speed[f"post_{name}"]
        Figure(f"transport.push_vs_{name}_post", speed["push"], "GB/s", peer, speed[f"post_{name}"], ratio)
    Figure("transport.fetch_gb_s", speed["fetch"], "GB/s", "raw socket", speed["raw"], speed["fetch"] / speed["raw"])
    two = 2 * speed["both"]
    Figure("transport.two_miners_gb_s", two, "GB/s", "raw socket, one", speed["raw"], two / speed["raw"])
    Figure("transport.extra_mb", extra, "MB", "aiohttp POST of bytes", extra_post, extra / extra_post)


def main() -> None:
    if len(sys.argv) > 1:
        asyncio.run(serve(MINERS[int(sys.argv[1])]))
        return
    command = [sys.executable, "-m", "bench.transport"]
    miners = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)]
    try:
        ports = [json.loads(miner.stdout.readline()) for miner in miners if miner.stdout]
        with tempfile.TemporaryDirectory(prefix="pilot-bench-", dir=os.environ.get("PILOT_BENCH_DIR")) as folder:
            asyncio.run(measure(ports, Path(folder)))
    finally:
        for miner in miners:
            miner.kill()


if __name__ == "__main__":
    main()
