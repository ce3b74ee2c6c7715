"""A small real miner for the transport's tests, whose gradient is the state that it was given, and its validator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from bittensor.sp_core import Keypair
from typing_extensions import Buffer

from pilot.common.limits import Limits
from pilot.interfaces import Refused
from pilot.transport.auth import Guard
from pilot.transport.client.dendrite import Dendrite, Endpoint
from pilot.transport.client.peer import Peer, open_session
from pilot.transport.client.registration import Registration
from pilot.transport.server.admission import Admission
from pilot.transport.server.axon import Axon
from pilot.transport.server.gateway import Gateway
from protocol import (
    BlobRef,
    DataSpec,
    Digest,
    Health,
    Hello,
    Hotkey,
    Order,
    ProtocolError,
    Range,
    Receipt,
    Reply,
    Signed,
    Status,
    Stop,
    TaskSpec,
    digest,
    next_version,
)
from tests.updates import whole_state

VALIDATOR = Keypair.create_from_uri("//Validator")
MINER = Keypair.create_from_uri("//Miner")
MALLORY = Keypair.create_from_uri("//Mallory")
STATE = bytes(range(256)) * 64
TOKENS = b"tokens" * 100


class Writer:
    def __init__(self, service: Echo, ref: BlobRef) -> None:
        self.service, self.ref = service, ref
        self.data = bytearray()

    @property
    def held(self) -> int:
        return len(self.data)

    def write(self, chunk: Buffer) -> None:
        if self.held + len(memoryview(chunk)) > self.ref.bytes:
            raise ProtocolError(f"{self.ref.kind}: more than {self.ref.bytes} bytes")
        self.data += chunk

    def commit(self) -> None:
        if self.held != self.ref.bytes or digest(self.ref.kind, self.data) != self.ref.digest:
            self.data.clear()
            raise ProtocolError(f"{self.ref.kind}: not the bytes of this digest")
        self.service.blobs[self.ref.digest] = bytes(self.data)
        del self.service.writers[self.ref]


class Echo:
    """Replies with the order's state after `work_s`; `held` keeps every reply back until it is set."""

    def __init__(self, hotkey: Hotkey = MINER.ss58_address, tasks: tuple[str, ...] = ("echo",), work_s: float = 0.0):
        self.hotkey, self.tasks, self.work_s = hotkey, tasks, work_s
        self.blobs: dict[Digest, bytes] = {}
        self.orders: dict[Digest, Order] = {}
        self.receipts: list[Receipt] = []
        self.stops: list[Stop] = []
        self.deliveries = 0
        self.writers: dict[BlobRef, Writer] = {}
        self.held = asyncio.Event()
        self.held.set()

    def hello(self, nonce: str) -> Hello:
        return Hello(
            hotkey=self.hotkey, nonce=nonce, tasks=self.tasks, codecs=("fp32",), version=None, time_ns=time.time_ns()
        )

    def status(self) -> Status:
        return Status(
            hotkey=self.hotkey, state="idle", order=None, run=None, round=None, version=None, batches_done=0, time_ns=0
        )

    def health(self) -> Health:
        return Health(
            role="miner",
            hotkey=self.hotkey,
            healthy=True,
            state="idle",
            run=None,
            round=None,
            version=None,
            time_ns=time.time_ns(),
        )

    def accept_order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
        missing = [ref for ref in (order.update.refs[0], order.data.blobs["tokens"]) if ref.digest not in self.blobs]
        if missing:
            held = {ref.digest: self.writers[ref].held for ref in missing if ref in self.writers}
            raise Refused(409, "send these first", missing=missing, held=held)
        self.orders[digest] = order
        return self.status()

    def open_blob(self, caller: Hotkey, ref: BlobRef, offset: int) -> Writer:
        writer = self.writers.setdefault(ref, Writer(self, ref))
        if offset != writer.held:
            raise Refused(409, "another part is held", missing=[ref], held={ref.digest: writer.held})
        return writer

    async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        if order not in self.orders:
            raise Refused(404, "no such order")
        await asyncio.sleep(self.work_s)
        try:
            await asyncio.wait_for(self.held.wait(), wait_s)
        except TimeoutError:
            return None
        return self.answer(order)

    def answer(self, digest_: Digest) -> Reply:
        order = self.orders[digest_]
        payload = self.blobs[order.update.refs[0].digest]
        return Reply(
            run=order.run,
            round=order.round,
            hotkey=self.hotkey,
            order=digest_,
            version=order.version,
            done=order.ranges,
            loss=1.0,
            seconds=0.0,
            codec="fp32",
            payload_digest=digest("payload", payload),
            payload_bytes=len(payload),
            residual_before=None,
            residual_after=None,
        )

    def read_payload(self, caller: Hotkey, order: Digest) -> Buffer:
        if order not in self.orders:
            raise Refused(404, "no such order")
        return self.blobs[self.orders[order].update.refs[0].digest]

    def mark_delivered(self, caller: Hotkey, order: Digest) -> None:
        self.deliveries += 1

    def stop_order(self, caller: Hotkey, stop: Stop) -> Status:
        self.stops.append(stop)
        return self.status()

    def accept_receipt(self, caller: Hotkey, receipt: Receipt, signed: Signed) -> Status:
        self.receipts.append(receipt)
        return self.status()


def make_order(
    state: bytes = STATE, round: int = 0, deadline_s: float = 20.0, hotkey: Hotkey = MINER.ss58_address
) -> Order:
    blob = BlobRef(kind="state", digest=digest("state", state), bytes=len(state))
    tokens = BlobRef(kind="data", digest=digest("data", TOKENS), bytes=len(TOKENS))
    return Order(
        run="test",
        round=round,
        hotkey=hotkey,
        version=next_version(None, blob.digest),
        update=whole_state(blob),
        state_digest=None,
        task=TaskSpec(name="echo", parameters={}),
        data=DataSpec(blobs={"tokens": tokens}),
        ranges=(Range(0, 4),),
        deadline_s=deadline_s,
        staleness=0,
        codec_up="fp32",
        codec_down="fp32",
    )


def make_receipt(order: Order, order_digest: Digest) -> Receipt:
    return Receipt(
        run=order.run,
        round=order.round,
        hotkey=order.hotkey,
        order=order_digest,
        verdict="ACCEPTED",
        reason="4 of 4",
        done=order.ranges,
        work=4,
        scores={},
        weight=1.0,
    )


def blobs_of(order: Order, state: bytes = STATE) -> dict[Digest, bytes]:
    return {order.update.refs[0].digest: state, order.data.blobs["tokens"].digest: TOKENS}


def open_guard() -> Guard:
    return Guard(frozenset(), None, lambda _: None)


@asynccontextmanager
async def serving(axon: Axon) -> AsyncIterator[int]:
    port = await axon.start()
    try:
        yield port
    finally:
        await axon.close()


@asynccontextmanager
async def served(
    service: Echo, keypair: Keypair = MINER, port: int = 0, limits: Limits | None = None
) -> AsyncIterator[int]:
    async with serving(Axon(service, keypair, open_guard(), "127.0.0.1", port, limits)) as bound:
        yield bound


@asynccontextmanager
async def dendrite(
    *ports: int, said: list[str] | None = None, away_s: float = 5.0, limits: Limits | None = None
) -> AsyncIterator[Dendrite]:
    """A started client; it has not waited for anybody. `away_s` changes that one of the limits."""
    lines = [] if said is None else said
    endpoints = [Endpoint("127.0.0.1", port) for port in ports]
    limits = limits or replace(Limits(), away_s=away_s)
    network = Dendrite(VALIDATOR, endpoints, {}, lambda _: None, "echo", lines.append, limits, hello_interval_s=0.05)
    await network.start()
    try:
        yield network
    finally:
        await network.close()


async def until(condition: Callable[[], object], patience_s: float = 60.0) -> None:
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.01)


def nobody_asks() -> Health:
    raise AssertionError


@asynccontextmanager
async def desk(
    network: Dendrite,
    port: int = 0,
    admit: str = "everyone",
    limits: Limits | None = None,
    clock_ns: Callable[[], int] = time.time_ns,
    said: list[str] | None = None,
) -> AsyncIterator[tuple[Gateway, Endpoint]]:
    """A validator's server for its miners, who announce themselves five times a second."""
    lines = [] if said is None else said
    admission = Admission(admit, lines.append, time.monotonic)
    server = Gateway(
        *(VALIDATOR, "echo", admission, nobody_asks, "127.0.0.1", port, limits), interval_s=0.2, clock_ns=clock_ns
    )
    bound = await server.start()
    server.attach(network)
    try:
        yield server, Endpoint("127.0.0.1", bound, VALIDATOR.ss58_address)
    finally:
        await server.close()


@asynccontextmanager
async def member(
    service: Echo,
    validator: Endpoint,
    serves: str | None = None,
    keypair: Keypair = MINER,
    said: list[str] | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[Registration]:
    """A miner's place there: announced to serve at "host:port", or pulling. It ends without saying that it leaves."""
    lines = [] if said is None else said
    limits = limits or replace(Limits(), poll_s=1.0)
    registration = Registration(service, keypair, validator, serves, lines.append, limits, interval_s=0.2)
    try:
        yield registration
        if registration.failed.done():
            registration.failed.result()
    finally:
        await registration.close()


@asynccontextmanager
async def caller(validator: Endpoint, keypair: Keypair = MINER, limits: Limits | None = None) -> AsyncIterator[Peer]:
    """Signed requests of a miner that does as it likes."""
    session = open_session(limits or Limits())
    try:
        yield Peer(validator, validator.hotkey, keypair, session, limits or Limits())
    finally:
        await session.close()


async def honest_exchange(port: int, path: Path, round: int = 99) -> None:
    """The miner at `port` still serves whoever behaves."""
    order = make_order(round=round)
    async with dendrite(port) as network:
        assert await network.wait_for_peer(5)
        await network.exchange(order, network.sign(order), blobs_of(order), path / "honest")
    assert (path / "honest").read_bytes() == STATE
