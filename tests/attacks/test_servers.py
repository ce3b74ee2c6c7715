"""What a hostile miner's server may answer. It costs the miner a fault and nobody else anything."""

from __future__ import annotations

import asyncio
import gzip
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pilot.common.limits import Limits
from pilot.interfaces import Faulted, Refused
from pilot.simulation.chaos.proxy import proxy_to
from pilot.transport.auth import sign_message, sign_refusal
from pilot.transport.server.axon import Axon
from protocol import BlobRef, Digest, Fault, Hello, Hotkey, Message, Order, Refusal, Reply, Status
from tests.echo import MALLORY, MINER, STATE, Echo, Writer, blobs_of, dendrite, make_order, open_guard, served, serving

BLOB = make_order().update.refs[0]
Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Liar(Axon):
    """An axon that signs its replies with another key."""

    def _signed_response(self, message: Message, status: int = 200) -> web.Response:
        if isinstance(message, Reply):
            text = sign_message(MALLORY, message).model_dump_json()
            return web.Response(text=text, content_type="application/json")
        return super()._signed_response(message, status)


class Twisted(Echo):
    """Replies with these fields changed, and sends this payload."""

    def __init__(self, payload: bytes | None = None, **changed: Any) -> None:
        super().__init__()
        self.sent, self.changed = payload, changed

    def answer(self, digest_: Digest) -> Reply:
        return super().answer(digest_).model_copy(update=self.changed)

    def read_payload(self, caller: Hotkey, order: Digest) -> bytes:
        return STATE if self.sent is None else self.sent


QUICK = replace(Limits(), message_s=0.3, connect_s=1.0, rate_s=0.3, away_s=1.0)


async def judge(
    folder: Path,
    miner: Echo,
    axon: type[Axon] = Axon,
    largest: int | None = None,
    limits: Limits | None = None,
    deadline_s: float = 600.0,
) -> Fault:
    """The fault of an exchange with this miner, long before its deadline; the same client still works."""
    bad = axon(miner, MINER, open_guard(), "127.0.0.1", 0)
    good = Axon(Echo(MALLORY.ss58_address), MALLORY, open_guard(), "127.0.0.1", 0)
    async with serving(bad) as a, serving(good) as b, dendrite(a, b, limits=limits) as network:
        assert await network.wait_for_peers(2, 20) == 2
        order = make_order(deadline_s=deadline_s)
        with pytest.raises(Faulted) as caught:
            async with asyncio.timeout(30):
                await network.exchange(order, network.sign(order), blobs_of(order), folder / "bad", largest)
        assert not (folder / "bad").exists()
        assert caught.value.reason.isprintable()
        order = make_order(hotkey=MALLORY.ss58_address)
        await network.exchange(order, network.sign(order), blobs_of(order), folder / "good")
        assert (folder / "good").read_bytes() == STATE
    return caught.value.fault


def verdict(folder: Path, miner: Echo, axon: type[Axon] = Axon, **how: Any) -> Fault:
    return asyncio.run(judge(folder, miner, axon, **how))


async def silent(folder: Path, route: str, answers: dict[str, Answer]) -> None:
    """All of these, side by side, are given up on after `away_s`."""

    async def one(what: str) -> Fault:
        (folder / what).mkdir()
        return await judge(folder / what, Echo(), wild(answers[what], route), limits=QUICK)

    faults = dict(zip(answers, await asyncio.gather(*map(one, answers)), strict=True))
    assert faults == dict.fromkeys(answers, Fault.SILENT)


def test_reply_signed_by_another_key(tmp_path: Path) -> None:
    assert verdict(tmp_path, Echo(), Liar, limits=QUICK) is Fault.SILENT


def test_reply_to_another_order(tmp_path: Path) -> None:
    """Anyone on the way may have kept it."""
    assert verdict(tmp_path, Twisted(order="0" * 64), limits=QUICK) is Fault.SILENT


@pytest.mark.parametrize(
    "changed",
    [{"round": 5}, {"run": "other"}, {"hotkey": MALLORY.ss58_address}, {"loss": float("nan")}],
    ids=lambda changed: next(iter(changed)),
)
def test_reply_that_contradicts_its_order(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert verdict(tmp_path, Twisted(**changed)) is Fault.MALFORMED


def test_payload_of_other_bytes(tmp_path: Path) -> None:
    """The miner has signed the digest of others: it may be lying, and anyone on the way may have changed them."""

    async def one(payload: bytes) -> Fault:
        folder = tmp_path / payload[-1:].hex() / str(len(payload))
        folder.mkdir(parents=True)
        return await judge(folder, Twisted(payload), limits=QUICK)

    async def main() -> list[Fault]:
        return await asyncio.gather(*map(one, (b"", STATE[:-1], STATE + b"x", STATE[:-1] + b"?")))

    assert asyncio.run(main()) == [Fault.SILENT] * 4


def test_payload_larger_than_any(tmp_path: Path) -> None:
    assert verdict(tmp_path, Twisted(payload_bytes=1 << 50)) is Fault.MALFORMED


def test_a_miner_that_asks_for_what_is_not_the_order_s(tmp_path: Path) -> None:
    class Greedy(Echo):
        def accept_order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
            other = make_order(b"secret" * 10)
            return super().accept_order(caller, other, digest)

    assert verdict(tmp_path, Greedy()) is Fault.MALFORMED


def test_a_miner_that_asks_for_the_same_for_ever(tmp_path: Path) -> None:
    class Forgetful(Echo):
        def accept_order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
            self.blobs.clear()
            return super().accept_order(caller, order, digest)

    assert verdict(tmp_path, Forgetful()) is Fault.SILENT


def wild(answer: Answer, route: str = "_order") -> type[Axon]:
    """An axon whose handler of this name answers like this."""

    async def handler(self: Axon, request: web.BaseRequest) -> web.StreamResponse:
        return await answer(request)

    return type("Wild", (Axon,), {route: handler})


def raw(pieces: Callable[[], AsyncIterator[bytes]]) -> Answer:
    """These very bytes for an answer; then the connection is closed."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        async for piece in pieces():
            await request.writer.write(piece)
        await request.writer.drain()
        assert request.transport is not None
        request.transport.close()
        return web.Response()  # to nobody

    return answer


def once(data: bytes) -> Answer:
    async def pieces() -> AsyncIterator[bytes]:
        yield data

    return raw(pieces)


def endless(data: bytes, again: bytes, pause_s: float = 0.0) -> Answer:
    async def pieces() -> AsyncIterator[bytes]:
        yield data
        while True:
            yield again
            await asyncio.sleep(pause_s)

    return raw(pieces)


def ok(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


BOMB = gzip.compress(bytes(32 << 20))
SPACES = b" " * 65536
REFUSAL = Refusal(reason="no").text().encode()
CHUNKED = ok("Transfer-Encoding: chunked")
DAMAGED: dict[str, Answer] = {
    "a protocol to switch to": once(ok("Upgrade: h2c", "Connection: Upgrade", status="101 Go")),
    "an endless answer": endless(ok(), SPACES),
    "an endless answer in chunks": endless(CHUNKED, b"400\r\n" + SPACES[:1024] + b"\r\n"),
    "an endless refusal": endless(ok(status="409 Conflict"), SPACES),
    "a compressed answer": once(ok("Content-Encoding: gzip", "Content-Length: 2") + b"{}"),
    "a bomb": once(ok("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}") + BOMB),
    "no message": once(ok("Content-Length: 2") + b"{}"),
    "no refusal": once(ok("Content-Length: 6", status="418 Tea") + b"<html>"),
    "no content": once(ok(status="204 No Content")),
    "not modified": once(ok(status="304 Not Modified")),
}
SILENT: dict[str, Answer] = {
    "1xx for ever": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10),
    "1xx of another kind": endless(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 10),
    "a line of gigabytes": endless(b"HTTP/1.1 200 ", b"a" * 65536),
    "a header of gigabytes": endless(b"HTTP/1.1 200 OK\r\nX: ", b"a" * 65536),
    "headers for ever": endless(b"HTTP/1.1 200 OK\r\n", b"X: a\r\n" * 1000),
    "a head that trickles": endless(b"HTTP/1.1 200 OK\r\nX: ", b"a", 0.05),
    "no HTTP": once(b"\0" * 1000),
    "nothing": once(b""),
    "an answer that trickles": endless(ok("Content-Length: 1000"), b" ", 0.05),
    "an answer cut short": once(ok("Content-Length: 1000") + b"{"),
    "a length of 2^64": once(ok(f"Content-Length: {1 << 64}")),
    "two lengths": once(ok("Content-Length: 2", "Content-Length: 3") + b"{}}"),
    "an odd chunk": once(CHUNKED + b"-5\r\nabc\r\n"),
    "a failure inside": once(ok("Content-Length: 0", status="500 Oops")),
    "never the time": once(ok("Content-Length: 0", status="429 Later")),
    "a plain refusal": once(ok(f"Content-Length: {len(REFUSAL)}", status="403 No") + REFUSAL),
}


@pytest.mark.parametrize("route", ["_order", "_blob", "_reply"])
def test_answers_that_are_damaged(route: str, tmp_path: Path) -> None:
    asyncio.run(silent(tmp_path, route, DAMAGED))


def test_answers_that_are_none(tmp_path: Path) -> None:
    asyncio.run(silent(tmp_path, "_order", SILENT))


@pytest.mark.parametrize("route", ["_blob", "_reply"])
def test_answers_that_are_none_later_on(route: str, tmp_path: Path) -> None:
    asyncio.run(silent(tmp_path, route, {what: SILENT[what] for what in ("nothing", "a failure inside")}))


LENGTH = f"Content-Length: {len(STATE)}"
PAYLOADS: dict[str, Answer] = {
    "without a length": endless(ok(), STATE),
    "in chunks": endless(CHUNKED, b"1\r\nx\r\n"),
    "longer": once(ok(f"Content-Length: {len(STATE) + 1}") + STATE + b"x"),
    "shorter": once(ok(f"Content-Length: {len(STATE) - 1}") + STATE[:-1]),
    "other bytes": once(ok(LENGTH) + bytes(len(STATE))),
    "a part, again and again": once(ok(LENGTH) + STATE[:100]),  # the second time other than asked
    "compressed": once(ok("Content-Encoding: gzip", LENGTH) + BOMB[: len(STATE)]),
    "a bomb": once(ok("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}") + BOMB),
    "partial content": once(ok(LENGTH, status="206 Partial Content") + STATE),
}


def test_payloads_that_are_damaged(tmp_path: Path) -> None:
    asyncio.run(silent(tmp_path, "_payload", PAYLOADS))


def test_payloads_that_never_come(tmp_path: Path) -> None:
    async def dribble(request: web.BaseRequest) -> web.StreamResponse:
        left = len(STATE) - int(request.query["offset"])
        return await endless(ok(f"Content-Length: {left}"), b"x", 0.05)(request)

    answers = {
        "nothing of it": once(ok(LENGTH)),
        "a byte now and then": dribble,
        "longer, without an end": endless(ok(f"Content-Length: {len(STATE) + 1}"), STATE),
    }
    asyncio.run(silent(tmp_path, "_payload", answers))


def test_a_payload_larger_than_the_codec_makes_is_not_fetched(tmp_path: Path) -> None:
    asked: list[str] = []

    class Watched(Echo):
        def read_payload(self, caller: Hotkey, order: Digest) -> bytes:
            asked.append(order)
            return STATE

    assert verdict(tmp_path, Watched(), largest=len(STATE) - 1) is Fault.MALFORMED
    assert not asked


@pytest.mark.parametrize("route", ["_order", "_reply", "_payload", "_blob"])
def test_a_redirect_is_not_followed(route: str, tmp_path: Path) -> None:
    statuses = ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent")
    asked: list[str] = []
    arrived: list[asyncio.StreamWriter] = []

    class Elsewhere(Axon):
        async def start(self) -> int:
            self.other = await asyncio.start_server(lambda _, writer: arrived.append(writer), "127.0.0.1", 0)
            host, port = self.other.sockets[0].getsockname()
            self.location = f"http://{host}:{port}/v1/order"
            return await super().start()

        async def close(self) -> None:
            self.other.close()
            await super().close()

    async def redirect(self: Elsewhere, request: web.BaseRequest) -> web.StreamResponse:
        asked.append(statuses[len(asked) % len(statuses)])
        return await once(ok(f"Location: {self.location}", "Content-Length: 0", status=asked[-1]))(request)

    redirecting = type("Redirecting", (Elsewhere,), {route: redirect})
    assert verdict(tmp_path, Echo(), redirecting, limits=replace(QUICK, away_s=2.0)) is Fault.SILENT
    assert {*asked} == {*statuses}
    assert not arrived


def test_a_miner_that_keeps_refusing_for_the_time(tmp_path: Path) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=401, text=Refusal(reason="stale", time_ns=1 << 60).text())

    assert verdict(tmp_path, Echo(), wild(answer), limits=QUICK) is Fault.SILENT


@pytest.mark.parametrize("ahead_s", [3600, -3600, 3 * 3600, 10**6])
@pytest.mark.parametrize("hello", ["honest", "another's", "hours off"])
def test_a_time_that_is_not_the_miner_s_own(hello: str, ahead_s: int, tmp_path: Path) -> None:
    """An unsigned refusal sets no clock, nor does a hello that another has signed, or that is out of bounds.

    Else whoever is between the two would get requests that are good later on.
    """
    asked: list[int] = []

    class Between(Axon):
        async def _order(self, request: web.BaseRequest) -> web.StreamResponse:
            asked.append(int(request.headers["X-Bittensor-Nonce"]))
            told_ns = time.time_ns() + ahead_s * 10**9
            return web.Response(status=401, text=Refusal(reason="stale", time_ns=told_ns).text())

        def _signed_response(self, message: Message, status: int = 200) -> web.Response:
            if not asked or hello == "honest":
                return super()._signed_response(message, status)
            told_ns = time.time_ns() + (ahead_s if hello == "another's" else 10**5) * 10**9
            signer = MALLORY if hello == "another's" else MINER
            return web.Response(
                text=sign_message(signer, message.model_copy(update={"time_ns": told_ns})).model_dump_json()
            )

    limits = replace(Limits(), away_s=0.3)
    assert verdict(tmp_path, Echo(), Between, limits=limits) is Fault.SILENT
    assert max(abs(nonce - time.time_ns()) for nonce in asked) < 60 * 10**9
    assert asked


# --- blobs without an end ---------------------------------------------------------------------------------------------


class Hungry(Echo):
    """Says that it lacks the state, and holds `claim()` bytes of it."""

    def __init__(self, claim: Callable[[], int]) -> None:
        super().__init__()
        self.claim = claim
        self.asked = 0

    def accept_order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
        raise self.refusal()

    def refusal(self) -> Refused:
        self.asked += 1
        return Refused(409, "more", missing=[BLOB], held={BLOB.digest: self.claim()})


class Insatiable(Hungry):
    """And says it again when that comes."""

    def open_blob(self, caller: Hotkey, ref: BlobRef, offset: int) -> Writer:
        raise self.refusal()


@pytest.mark.parametrize("claim", [len(STATE) + 1, 1 << 53], ids=["more", "much more"])
def test_a_miner_that_holds_more_than_all(claim: int, tmp_path: Path) -> None:
    assert verdict(tmp_path, Hungry(lambda: claim)) is Fault.MALFORMED


def test_a_miner_that_holds_all_and_asks_for_ever(tmp_path: Path) -> None:
    """Once or twice that is no lie: the last byte has come, and is not yet counted."""
    assert verdict(tmp_path, Hungry(lambda: len(STATE))) is Fault.SILENT


def test_a_miner_that_holds_less_than_nothing(tmp_path: Path) -> None:
    missing = Refusal(reason="more", missing=(BLOB,), held={BLOB.digest: 1}).text().replace(":1}", ":-1}")

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=409, text=missing, headers=sign_refusal(MINER, request.headers, 409, missing))

    assert verdict(tmp_path, Echo(), wild(answer), limits=QUICK) is Fault.SILENT


@pytest.mark.parametrize("kind", ["growing", "random"])
def test_a_miner_that_claims_another_part_each_time(kind: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    miner = Insatiable(lambda: min(miner.asked, len(STATE) - 1) if kind == "growing" else rng.randrange(len(STATE)))
    assert verdict(tmp_path, miner) is Fault.SILENT
    assert miner.asked < 200


def test_a_miner_that_takes_the_state_and_forgets_its_order(tmp_path: Path) -> None:
    class Amnesiac(Echo):
        forgot = 0

        async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
            self.forgot += 1
            self.blobs.clear()
            raise Refused(404, "which order?")

    assert verdict(tmp_path, miner := Amnesiac(), deadline_s=2.0) is Fault.LATE
    assert 1 < miner.forgot < 20


# --- who it says it is ------------------------------------------------------------------------------------------------


def greets(tmp_path: Path, axon: Axon) -> str:
    """What is said about a server that is not used, while an honest miner is."""
    said: list[str] = []

    async def main() -> None:
        order = make_order()
        async with serving(axon) as a, served(Echo()) as b, dendrite(a, b, said=said) as network:
            assert await network.wait_for_peer(5)
            async with asyncio.timeout(10):
                while not said:
                    await asyncio.sleep(0.01)
            assert network.peers() == (MINER.ss58_address,)
            await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "p")

    asyncio.run(main())
    [line] = said
    return line


def test_a_server_that_says_another_s_hotkey(tmp_path: Path) -> None:
    """Its hello names MINER, and is signed by itself."""
    axon = Axon(Echo(MINER.ss58_address), MALLORY, open_guard(), "127.0.0.1", 0)
    assert "not an answer to ours; not used" in greets(tmp_path, axon)


def test_a_server_that_shows_another_s_old_hello(tmp_path: Path) -> None:
    class Parrot(Axon):
        def _signed_response(self, message: Message, status: int = 200) -> web.Response:
            assert isinstance(message, Hello)
            old = message.model_copy(update={"nonce": "0" * 32})
            return web.Response(text=sign_message(MINER, old).model_dump_json())

    axon = Parrot(Echo(MALLORY.ss58_address), MALLORY, open_guard(), "127.0.0.1", 0)
    assert "not an answer to ours; not used" in greets(tmp_path, axon)


def test_a_server_that_passes_everything_on_to_another(tmp_path: Path) -> None:
    """It answers as that miner at the same time: one of the two is used, and all that matters is signed end to end."""
    said: list[str] = []

    async def main() -> None:
        order = make_order()
        async with (
            served(miner := Echo()) as far,
            proxy_to(far) as (line, near),
            dendrite(near, far, said=said) as network,
        ):
            assert await network.wait_for_peers(2, 0.5) == 1
            assert network.peers() == (MINER.ss58_address,)
            await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "p")
            assert len(miner.orders) == 1
            line.hang_up()

    asyncio.run(main())
    assert len(said) == 1
    assert "the same miner" in said[0]
