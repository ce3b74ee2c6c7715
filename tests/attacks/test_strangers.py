"""Strangers that are slow, many or fast: each costs a bounded share, and those who are known go on meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from pilot.common.addresses import network_of
from pilot.common.limits import Limits
from pilot.transport.client.dendrite import Dendrite, Endpoint
from pilot.transport.server.axon import Axon
from pilot.transport.server.listener import RateLimiter
from pilot.transport.tls import client_context
from tests.attacks.caller import BODY, ORDER, ORDER_DIGEST, Apart, Caller, attack, blob_target, head
from tests.echo import MINER, STATE, VALIDATOR, Echo, blobs_of, dendrite, make_order, open_guard, serving
from tests.test_tls import Files, issue

SHORT = replace(Limits(), header_s=0.3, message_s=0.3, connect_s=0.3, rate_s=0.3)
HELLO = f"GET /v1/hello?nonce={'0' * 32} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
UNSIGNED = b"POST /v1/order HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
SECONDS = 20.0  # in which anything at all must have happened on a busy machine


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What still comes, once the other side has closed the connection."""
    came = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(SECONDS):
            while piece := await reader.read(1 << 16):
                came += piece
    return came


async def trickle(writer: asyncio.StreamWriter, data: bytes, pause_s: float) -> None:
    with contextlib.suppress(ConnectionError):
        for i in range(len(data)):
            writer.write(data[i : i + 1])
            await writer.drain()
            await asyncio.sleep(pause_s)


# --- slow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [b"", HELLO], ids=["from the start", "after a good request"])
@pytest.mark.parametrize("rest", [b"", b"\r\n" * 1000, HELLO.replace(b"x", b"x" * 2000)], ids=["none", "empty", "slow"])
def test_a_head_that_trickles_is_cut_off(first: bytes, rest: bytes, tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", caller.port)
        writer.write(first)
        trickling = asyncio.create_task(trickle(writer, rest, 0.02))
        answer = await closed(reader)
        assert answer.count(b"HTTP/1.1 200 OK") == (first != b"")
        trickling.cancel()
        writer.close()

    attack(tmp_path, play, SHORT)


@pytest.mark.parametrize("signer", ["signed", "unsigned"])
def test_a_message_that_trickles_is_cut_off(signer: str, tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", caller.port)
        length = f"Content-Length: {len(BODY)}"
        request = head("POST", "/v1/order", length, body=BODY)
        writer.write(request if signer == "signed" else UNSIGNED.replace(b": 2\r\n\r\n{}", b": 2000\r\n\r\n"))
        trickling = asyncio.create_task(trickle(writer, BODY, 0.02))
        assert (await closed(reader)).split(b" ", 2)[1] == (b"408" if signer == "signed" else b"401")
        trickling.cancel()
        writer.close()
        assert not miner.orders

    attack(tmp_path, play, SHORT)


def test_a_blob_that_trickles_is_cut_off(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", caller.port)
        writer.write(head("PUT", blob_target(STATE), f"Content-Length: {len(STATE)}"))
        trickling = asyncio.create_task(trickle(writer, STATE, 0.02))
        assert (await closed(reader)).split(b" ", 2)[1] == b"408"
        trickling.cancel()
        writer.close()
        assert not miner.blobs

    attack(tmp_path, play, SHORT)


def test_a_payload_that_nobody_reads_is_cut_off(tmp_path: Path) -> None:
    """The connection ends though its caller is known, and its signature good."""

    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        miner.orders[ORDER_DIGEST] = ORDER
        miner.blobs[ORDER.update.refs[0].digest] = bytes(64 << 20)  # more than the sockets hold
        target = f"/v1/payload?order={ORDER_DIGEST}&offset=0"
        reader, writer = await asyncio.open_connection("127.0.0.1", caller.port, limit=1024)
        writer.write(head("GET", target))
        await until(lambda: axon.connections == 0)
        assert miner.deliveries == 0
        assert len(await closed(reader)) < 64 << 20
        writer.close()
        miner.blobs.clear()

    attack(tmp_path, play, SHORT)


# --- many -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    with Apart() as axon:
        yield axon


async def crowd(port: int, count: int, data: bytes, readers: list[asyncio.StreamReader]) -> None:
    """So many connections at once, held for as long as the axon does."""

    async def one() -> None:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                readers.append(reader)
                writer.write(data)
                await reader.read()
            finally:
                writer.close()

    await asyncio.gather(*(one() for _ in range(count)))


@asynccontextmanager
async def crowded(port: int, count: int, data: bytes) -> AsyncIterator[list[asyncio.StreamReader]]:
    """While they are there."""
    readers: list[asyncio.StreamReader] = []
    task = asyncio.create_task(crowd(port, count, data, readers))
    try:
        yield readers
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.mark.parametrize("data", [b"", HELLO[:-2], UNSIGNED], ids=["idle", "half a head", "unsigned"])
def test_a_thousand_connections_at_once(data: bytes, apart: Apart, tmp_path: Path) -> None:
    room_for_files(2000)

    async def main() -> None:
        await honest(apart.port, tmp_path)
        before = apart.sockets
        async with crowded(apart.port, 1000, data) as readers:
            await until(lambda: len(readers) > 100)  # more than one address may have: some have been closed again
            await honest(apart.port, tmp_path)
            assert apart.sockets <= before + Limits().connections_per_address + 8
        await honest(apart.port, tmp_path)
        await until(lambda: apart.sockets <= before + 8)

    asyncio.run(main())


async def honest(port: int, folder: Path) -> None:
    order = make_order()
    async with dendrite(port) as network:
        assert await network.wait_for_peer(SECONDS)
        await network.exchange(order, network.sign(order), blobs_of(order), folder / "p")


def room_for_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this user may open {hard} files; the test needs {count}")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.02)


FEW = replace(Limits(), connections_per_address=8, strangers_per_s=1000.0)


def test_who_is_known_is_never_closed_to_make_room(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", caller.port)
        request = f"/v1/reply?order={'0' * 64}&wait=0"
        writer.write(head("GET", request))
        assert b" 404 " in await reader.readline()
        async with crowded(caller.port, 100, b"") as readers:
            await until(lambda: sum(r.at_eof() for r in readers) > 80)  # all but a few have been closed again
            assert axon.connections <= 8
            await reader.readexactly(len(reader._buffer))  # type: ignore[attr-defined]
            writer.write(head("GET", request))
            assert b" 404 " in await reader.readline()
        writer.close()

    attack(tmp_path, play, FEW)


def test_one_peer_s_requests_are_counted_too(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        miner.orders[ORDER_DIGEST] = ORDER
        miner.held.clear()
        target = f"/v1/reply?order={ORDER_DIGEST}&wait=1"
        answers = await asyncio.gather(*(caller.raw(head("GET", target)) for _ in range(12)))
        assert sorted(int(answer.split(b" ", 2)[1]) for answer in answers) == [202] * 8 + [429] * 4
        miner.held.set()
        miner.orders.clear()

    attack(tmp_path, play)


# --- fast -------------------------------------------------------------------------------------------------------------

MB = bytes(1 << 20)
JUNK = [
    UNSIGNED,
    b"GET /v1/payload?order=1&offset=0 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /favicon.ico HTTP/1.1\r\nHost: x\r\n\r\n" * 50,
    b"\x00\xff" * 1000,
    b"GET /" + b"a" * 20_000,
    b"POST /v1/order HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n" + MB,
    b"PUT /v1/blob?kind=state HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n100000\r\n" + MB,
]


def test_junk_over_fifty_connections(apart: Apart, tmp_path: Path) -> None:
    """As fast as it is taken: all refused and counted, while honest work goes on and the memory does not grow."""
    statuses: Counter[int] = Counter()

    async def send_for_ever(turn: int) -> None:
        while True:
            turn += 1
            with contextlib.suppress(ConnectionError):
                reader, writer = await asyncio.open_connection("127.0.0.1", apart.port)
                try:
                    writer.write(JUNK[turn % len(JUNK)])
                    answer = (await reader.read(1 << 14)).split(b" ", 2)
                    statuses[int(answer[1]) if len(answer) > 2 else 0] += 1  # 0: it was closed to make room
                finally:
                    writer.close()

    async def main() -> int:
        senders = [asyncio.create_task(send_for_ever(turn)) for turn in range(50)]
        await until(lambda: statuses.total() > 100)
        before = apart.resident_mb
        order = make_order()
        async with dendrite(apart.port) as network:
            assert await network.wait_for_peer(SECONDS)
            for round in range(10):
                order = make_order(round=round)
                await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / f"{round}")
        await until(lambda: statuses.total() > 300)
        after = apart.resident_mb
        for sender in senders:
            sender.cancel()
        await asyncio.wait(senders)
        await honest(apart.port, tmp_path)
        return after - before

    counted = sum(apart.refused().values())
    grown_mb = asyncio.run(main())
    answered = sum(count for status, count in statuses.items() if status)
    assert set(statuses) <= {0, 400, 401, 404}
    assert answered > 250
    assert sum(apart.refused().values()) - counted >= answered
    assert grown_mb < 32


LONG = "5" + "z" * 7_900
REPLY = f"/v1/reply?order={'0' * 64}&wait=0"
FLOODS = {
    "long hotkeys": head("GET", REPLY).replace(VALIDATOR.ss58_address.encode(), LONG.encode()),
    "a second, long hotkey": head("GET", REPLY, f"X-Bittensor-Hotkey: {LONG}"),
    "long nonces": head("GET", REPLY, f"X-Bittensor-Nonce: {'9' * 4000}"),
    "wrong signatures": head("GET", REPLY + "0"),
    "no such path": b"GET /favicon.ico HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.fixture(scope="module")
def as_by_default() -> Iterator[Apart]:
    with Apart(Limits().strangers_per_s) as axon:
        yield axon


@pytest.mark.parametrize(("flood", "waits"), [*((flood, True) for flood in FLOODS), ("long hotkeys", False)])
def test_refused_strangers_do_not_hold_up_who_asks_for_the_status(
    flood: str, waits: bool, as_by_default: Apart
) -> None:
    """From the same address, and over new connections."""
    port = as_by_default.port

    async def send_for_ever() -> None:
        while True:
            with contextlib.suppress(ConnectionError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    writer.write(FLOODS[flood])
                    await (reader.read() if waits else writer.drain())
                finally:
                    writer.close()

    async def status_s() -> float:
        began = asyncio.get_running_loop().time()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in await reader.readline()
        writer.close()
        await asyncio.sleep(0.02)
        return asyncio.get_running_loop().time() - began - 0.02

    async def main() -> tuple[float, float]:
        quiet = median([await status_s() for _ in range(15)])
        strangers = [asyncio.create_task(send_for_ever()) for _ in range(20)]
        await asyncio.sleep(0.3)
        noisy = median([await status_s() for _ in range(15)])
        for stranger in strangers:
            stranger.cancel()
        await asyncio.wait(strangers)
        return quiet, noisy

    quiet, noisy = asyncio.run(main())
    assert noisy < quiet + 0.05


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return issue(tmp_path_factory.mktemp("tls") / "here", "127.0.0.1")


async def tls_exchange(port: int, files: Files, folder: Path) -> None:
    endpoints = [Endpoint("127.0.0.1", port, tls=True)]
    network = Dendrite(VALIDATOR, endpoints, {}, lambda _: None, "echo", lambda _: None, tls=client_context(files.ca))
    await network.start()
    try:
        assert await network.wait_for_peer(SECONDS)
        order = make_order()
        await network.exchange(order, network.sign(order), blobs_of(order), folder / "p")
    finally:
        await network.close()


def under_tls(limits: Limits, files: Files, play: Callable[[int, Axon], Awaitable[None]]) -> None:
    async def main() -> None:
        axon = Axon(Echo(), MINER, open_guard(), "127.0.0.1", 0, limits, files.server())
        async with serving(axon) as port:
            await play(port, axon)

    asyncio.run(main())


def test_a_handshake_that_does_not_end_is_cut_off(files: Files, tmp_path: Path) -> None:
    async def play(port: int, axon: Axon) -> None:
        for data in (b"", bytes.fromhex("1603010200"), HELLO, MB):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            await closed(reader)
            writer.close()
        await until(lambda: axon.connections == 0)
        await tls_exchange(port, files, tmp_path)

    under_tls(replace(Limits(), connect_s=0.3), files, play)


def test_many_handshakes_that_do_not_end_lock_nobody_out(files: Files, tmp_path: Path) -> None:
    async def play(port: int, axon: Axon) -> None:
        async with crowded(port, 100, b"\x16\x03\x01"):
            await until(lambda: axon.connections >= 8)
            await tls_exchange(port, files, tmp_path)
            assert axon.connections <= 8

    under_tls(replace(FEW, connect_s=600.0, header_s=600.0), files, play)


def test_who_never_says_goodbye_is_cut_off(files: Files) -> None:
    """A refused stranger that reads no more and keeps its end of the connection open."""

    async def play(port: int, axon: Axon) -> None:
        def linger() -> socket.socket:
            plain = socket.create_connection(("127.0.0.1", port))
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = client_context(files.ca).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                    break
                plain.sendall(outgoing.read())
                incoming.write(plain.recv(1 << 16))
            tls.write(UNSIGNED)
            plain.sendall(outgoing.read())
            return plain

        plain = await asyncio.to_thread(linger)
        await until(lambda: axon.refused.total() == 1)
        await until(lambda: axon.connections == 0)
        plain.close()

    under_tls(Limits(), files, play)


def test_networks_take_turns() -> None:
    """A hundred who wait from one address are no more than one from another; and an IPv6 customer is one network."""

    async def main() -> int:
        turns, passed = RateLimiter(per_s=200, burst=1), 0

        async def one() -> None:
            nonlocal passed
            await turns.wait(network_of("192.0.2.1"))
            passed += 1

        many = [asyncio.create_task(one()) for _ in range(100)]
        await asyncio.sleep(0.01)
        await turns.wait(network_of("192.0.2.2"))
        for task in many:
            task.cancel()
        return passed

    assert asyncio.run(main()) < 10
    assert network_of("2001:db8:1:2:3::4") == network_of("2001:db8:1:2:5:6:7:8") != network_of("2001:db8:1:3::4")
    assert network_of("::ffff:192.0.2.1") == "192.0.2.1"
    assert network_of("fe80::1%eth0") == "fe80::"


def test_strangers_who_leave_the_queue_hold_nobody_up() -> None:
    """Who asks and hangs up, again and again, may not fill the queue for those that wait."""

    async def main() -> float:
        turns = RateLimiter(per_s=20, burst=1)
        leaving = [asyncio.create_task(turns.wait()) for _ in range(1000)]
        await asyncio.sleep(0.01)
        for task in leaving:
            task.cancel()
        began = asyncio.get_running_loop().time()
        await turns.wait()
        return asyncio.get_running_loop().time() - began

    assert asyncio.run(main()) < 5  # not the 50 s of a thousand turns
