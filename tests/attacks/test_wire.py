"""What a hostile peer may put on the wire. Each is refused with the right status or Fault, and honest work goes on."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from protocol import (
    MAX_MESSAGE_BYTES,
    Digest,
    Fault,
    Faulted,
    Hotkey,
    Message,
    Order,
    Receipt,
    Refusal,
    Reply,
    Status,
    digest,
)
from tests.echo import (
    MALLORY,
    MINER,
    STATE,
    VALIDATOR,
    Echo,
    blobs_of,
    dendrite,
    honest_exchange,
    make_order,
    make_receipt,
    open_guard,
    serving,
)
from transport.auth import Keypair, seal, sign_request
from transport.axon import Axon

ORDER = make_order()
BODY = seal(VALIDATOR, ORDER).model_dump_json().encode()
ORDER_DIGEST = seal(VALIDATOR, ORDER).digest
Headers = dict[str, str]


class Caller:
    """Sends whatever it likes to the axon at `port`."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self.session, self.port = session, port

    async def send(
        self, method: str, target: str, headers: Headers | None = None, body: bytes | None = None
    ) -> tuple[int, Refusal]:
        url = URL(f"http://127.0.0.1:{self.port}{target}", encoded=True)
        async with self.session.request(method, url, headers=headers, data=body and io.BytesIO(body)) as response:
            text = await response.read()
            return response.status, Refusal.parse(text) if response.status >= 400 else Refusal(reason="")

    async def order(self, body: bytes = BODY, signer: Keypair = VALIDATOR) -> tuple[int, Refusal]:
        """A correctly signed request with this body."""
        return await self.send("POST", "/v1/order", signed("POST", "/v1/order", body, signer), body)

    async def raw(self, request: bytes) -> bytes:
        """The answer's first line; the connection is closed by us once the request is out and answered."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            await writer.drain()
            return await asyncio.wait_for(reader.readline(), 5)
        finally:
            writer.close()


def signed(method: str, target: str, body: bytes = b"", signer: Keypair = VALIDATOR, offset_s: float = 0) -> Headers:
    return sign_request(signer, method, target, MINER.ss58_address, body, int(offset_s * 1e9))


def attack(tmp_path: Path, play: Callable[[Caller, Axon, Echo], Awaitable[None]]) -> Axon:
    """Plays it against an axon of MINER; afterwards an honest exchange must work. Returns the axon, for its counts."""

    async def main() -> Axon:
        axon = Axon(miner := Echo(), MINER, open_guard(), "127.0.0.1", 0)
        async with serving(axon) as port, aiohttp.ClientSession() as session:
            await play(Caller(session, port), axon, miner)
            await honest_exchange(port, tmp_path)
        return axon

    return asyncio.run(main())


def refuses(tmp_path: Path, status: int, send: Callable[[Caller], Awaitable[tuple[int, Refusal]]]) -> Refusal:
    """One request, refused with `status`, counted, and without effect."""
    refusals: list[Refusal] = []

    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        got, refusal = await send(caller)
        assert (got, dict(axon.refused)) == (status, {status: 1})
        assert refusal.reason
        assert "Traceback" not in refusal.reason
        assert not miner.orders
        assert not miner.blobs
        assert not miner.receipts
        refusals.append(refusal)

    attack(tmp_path, play)
    return refusals[0]


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1/order"),
        ("POST", "/v1/stop"),
        ("POST", "/v1/receipt"),
        ("PUT", f"/v1/blob?kind=state&digest={'0' * 64}&bytes=4&offset=0"),
        ("GET", f"/v1/reply?order={'0' * 64}&wait=1"),
        ("GET", f"/v1/payload?order={'0' * 64}&offset=0"),
    ],
)
def test_unsigned(tmp_path: Path, method: str, target: str) -> None:
    refuses(tmp_path, 401, lambda c: c.send(method, target, body=b"{}{}" if method != "GET" else None))


def test_forged_signature(tmp_path: Path) -> None:
    headers = signed("POST", "/v1/order", BODY, MALLORY) | {"X-Bittensor-Hotkey": VALIDATOR.ss58_address}
    refuses(tmp_path, 401, lambda c: c.send("POST", "/v1/order", headers, BODY))


@pytest.mark.parametrize(
    "odd",
    [
        {"X-Bittensor-Signature": "0xzz"},
        {"X-Bittensor-Signature": "0x00"},
        {"X-Bittensor-Nonce": "soon"},
        {"X-Bittensor-Nonce": "9" * 5000},
        {"X-Bittensor-Hotkey": "5Nobody"},
        {"X-Bittensor-Version": "2"},
        {"X-Bittensor-Crypto": "rot13"},
    ],
)
def test_odd_headers(tmp_path: Path, odd: Headers) -> None:
    refuses(tmp_path, 401, lambda c: c.send("POST", "/v1/order", signed("POST", "/v1/order", BODY) | odd, BODY))


def test_replayed(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        body = seal(VALIDATOR, make_receipt(ORDER, ORDER_DIGEST)).model_dump_json().encode()
        headers = signed("POST", "/v1/receipt", body)
        assert (await caller.send("POST", "/v1/receipt", headers, body))[0] == 200
        assert (await caller.send("POST", "/v1/receipt", headers, body))[0] == 401
        assert len(miner.receipts) == 1

    assert attack(tmp_path, play).refused[401] == 1


@pytest.mark.parametrize("offset_s", [-11, 60, -1e6])
def test_stale_tells_the_time(tmp_path: Path, offset_s: float) -> None:
    async def late(caller: Caller) -> tuple[int, Refusal]:
        return await caller.send("POST", "/v1/order", signed("POST", "/v1/order", BODY, offset_s=offset_s), BODY)

    assert abs(refuses(tmp_path, 401, late).time_ns - time.time_ns()) < 60e9


def test_from_before_the_process_started(tmp_path: Path) -> None:
    """What an earlier process of this miner has taken is not new to the next one."""
    headers = signed("POST", "/v1/order", BODY)
    refuses(tmp_path, 401, lambda c: c.send("POST", "/v1/order", headers, BODY))


def test_misdirected(tmp_path: Path) -> None:
    headers = sign_request(VALIDATOR, "POST", "/v1/order", MALLORY.ss58_address, BODY)
    refuses(tmp_path, 403, lambda c: c.send("POST", "/v1/order", headers, BODY))


@pytest.mark.parametrize("cls", [Order, Receipt])
def test_an_order_or_receipt_for_another_miner(tmp_path: Path, cls: type[Message]) -> None:
    order = make_order(hotkey=MALLORY.ss58_address)
    message = order if cls is Order else make_receipt(order, ORDER_DIGEST)
    body, target = seal(VALIDATOR, message).model_dump_json().encode(), f"/v1/{message.kind}"
    refuses(tmp_path, 403, lambda c: c.send("POST", target, signed("POST", target, body), body))


def test_body_changed_after_signing(tmp_path: Path) -> None:
    changed = BODY.replace(b'\\"round\\":0', b'\\"round\\":7')
    assert changed != BODY
    refuses(tmp_path, 401, lambda c: c.send("POST", "/v1/order", signed("POST", "/v1/order", BODY), changed))


def test_envelope_changed_inside_a_signed_request(tmp_path: Path) -> None:
    changed = BODY.replace(b'\\"round\\":0', b'\\"round\\":7')
    assert refuses(tmp_path, 401, lambda c: c.order(changed)).fault is Fault.FORGED


def test_envelope_of_another_kind(tmp_path: Path) -> None:
    body = seal(VALIDATOR, make_receipt(ORDER, ORDER_DIGEST)).model_dump_json().encode()
    assert refuses(tmp_path, 401, lambda c: c.order(body)).fault is Fault.FORGED


def test_order_signed_by_another_than_the_caller(tmp_path: Path) -> None:
    body = seal(MALLORY, ORDER).model_dump_json().encode()
    assert refuses(tmp_path, 401, lambda c: c.order(body)).fault is Fault.FORGED


def test_huge_message(tmp_path: Path) -> None:
    refuses(tmp_path, 413, lambda c: c.order(b" " * (MAX_MESSAGE_BYTES + 1)))


def test_huge_message_without_a_length(tmp_path: Path) -> None:
    async def chunked(caller: Caller) -> tuple[int, Refusal]:
        async def pieces() -> object:
            for _ in range(40):
                yield b" " * (1 << 16)

        url = f"http://127.0.0.1:{caller.port}/v1/order"
        async with caller.session.post(url, data=pieces(), headers=signed("POST", "/v1/order")) as response:
            return response.status, Refusal.parse(await response.read())

    refuses(tmp_path, 413, chunked)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 100_000,
        BODY[:-1],
        BODY[:-1] + b',"extra":1}',
        BODY.replace(b'"body":"', b'"body":"\\ud800'),
    ],
    ids=["empty", "not utf-8", "a list", "no fields", "deep", "cut off", "unknown field", "lone surrogate"],
)
def test_bytes_that_are_no_envelope(tmp_path: Path, body: bytes) -> None:
    assert refuses(tmp_path, 400, lambda c: c.order(body)).fault is Fault.MALFORMED


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "pilot/2"},
        {"surprise": 1},
        {"round": -1},
        {"round": "0"},
        {"ranges": [[3, 3]]},
        {"deadline_s": 1e9},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_signed_body_with_an_unknown_version_field_or_value(tmp_path: Path, change: dict[str, object]) -> None:
    class Raw(Order):
        def text(self) -> str:
            return json.dumps({**json.loads(ORDER.text()), **change})

    raw = Raw(**{name: getattr(ORDER, name) for name in Order.model_fields})
    body = seal(VALIDATOR, raw).model_dump_json().encode()
    assert refuses(tmp_path, 400, lambda c: c.order(body)).fault is Fault.MALFORMED


def test_a_second_validator_meets_a_pinned_miner(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        assert (await caller.order())[0] == 409  # VALIDATOR is pinned by now; the blobs are missing
        body = seal(MALLORY, ORDER).model_dump_json().encode()
        status, refusal = await caller.order(body, MALLORY)
        assert status == 403
        assert "--unpin" in refusal.reason
        assert not miner.orders

    attack(tmp_path, play)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/v1/hello", 400),
        ("GET", "/v1/hello?nonce=zz", 400),
        ("GET", f"/v1/hello?nonce={'0' * 32}&nonce={'1' * 32}", 400),
        ("GET", "/v1/reply?order=12&wait=1", 400),
        ("GET", f"/v1/reply?order={'0' * 64}&wait=-1", 400),
        ("GET", f"/v1/reply?order={'0' * 64}&wait=1e9", 400),
        ("GET", f"/v1/reply?order={'0' * 64}&wait=1", 404),
        ("GET", f"/v1/payload?order={'0' * 64}&offset=0", 404),
        ("GET", "/v1/order", 405),
        ("GET", "/v2/hello", 404),
        ("GET", "/v1/../../etc/passwd", 404),
        ("PUT", f"/v1/blob?kind=pickle&digest={'0' * 64}&bytes=4&offset=0", 400),
        ("PUT", "/v1/blob?kind=state&digest=..%2f..%2fetc&bytes=4&offset=0", 400),
        ("PUT", f"/v1/blob?kind=state&digest={'0' * 64}&bytes=0&offset=0", 416),
        ("PUT", f"/v1/blob?kind=state&digest={'0' * 64}&bytes=999999999999999&offset=0", 400),
    ],
)
def test_odd_targets(tmp_path: Path, method: str, target: str, status: int) -> None:
    refuses(tmp_path, status, lambda c: c.send(method, target, signed(method, target)))


# --- blobs ------------------------------------------------------------------------------------------------------------


def blob_target(data: bytes, size: int | None = None) -> str:
    return f"/v1/blob?kind=state&digest={digest('state', data)}&bytes={size or len(data)}&offset=0"


def head(target: str, *lines: str) -> bytes:
    headers = [f"{k}: {v}" for k, v in signed("PUT", target).items()]
    return "\r\n".join([f"PUT {target} HTTP/1.1", "Host: x", *headers, *lines, "", ""]).encode()


@pytest.mark.parametrize("sent", [b"x" * len(STATE), STATE[:-1] + b"?"])
def test_blob_with_a_wrong_digest(tmp_path: Path, sent: bytes) -> None:
    target = blob_target(STATE)
    refusal = refuses(tmp_path, 400, lambda c: c.send("PUT", target, signed("PUT", target), sent))
    assert refusal.fault is Fault.MALFORMED


def test_blob_under_another_kind(tmp_path: Path) -> None:
    target = blob_target(STATE).replace("state", "data")
    refuses(tmp_path, 400, lambda c: c.send("PUT", target, signed("PUT", target), STATE))


def test_blob_shorter_or_longer_than_signed(tmp_path: Path) -> None:
    target = blob_target(STATE)
    refuses(tmp_path, 400, lambda c: c.send("PUT", target, signed("PUT", target), STATE[:-1]))
    refuses(tmp_path, 413, lambda c: c.send("PUT", target, signed("PUT", target), STATE + b"x"))


def test_blob_without_a_length(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        line = await caller.raw(head(blob_target(STATE), "Transfer-Encoding: chunked") + b"4\r\nabcd\r\n0\r\n\r\n")
        assert line.startswith(b"HTTP/1.1 411")
        assert not miner.blobs

    assert attack(tmp_path, play).refused[411] == 1


def test_blob_whose_sender_hangs_up(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", caller.port)
        writer.write(head(blob_target(STATE), f"Content-Length: {len(STATE)}") + STATE[:-1])
        await writer.drain()
        writer.close()
        async with asyncio.timeout(10):
            while [writer.held for writer in miner.writers.values()] != [len(STATE) - 1]:
                await asyncio.sleep(0.01)
        assert not miner.blobs

    attack(tmp_path, play)


def test_blob_is_verified_before_a_byte_of_it_is_read(tmp_path: Path) -> None:
    """The refusal comes though the body never does."""

    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        request = head(blob_target(STATE), f"Content-Length: {len(STATE)}")
        line = await caller.raw(request.replace(b"kind=state", b"kind=data"))
        assert line.startswith(b"HTTP/1.1 401")

    attack(tmp_path, play)


# --- a hostile miner --------------------------------------------------------------------------------------------------


class Liar(Axon):
    """An axon that signs its replies with another key."""

    def _sealed(self, message: Message, status: int = 200) -> web.Response:
        if isinstance(message, Reply):
            text = seal(MALLORY, message).model_dump_json()
            return web.Response(text=text, content_type="application/json")
        return super()._sealed(message, status)


class Twisted(Echo):
    """Replies with these fields changed, and sends this payload."""

    def __init__(self, payload: bytes | None = None, **changed: Any) -> None:
        super().__init__()
        self.sent, self.changed = payload, changed

    def answer(self, digest_: Digest) -> Reply:
        return super().answer(digest_).model_copy(update=self.changed)

    def payload(self, caller: Hotkey, order: Digest) -> bytes:
        return STATE if self.sent is None else self.sent


def verdict(tmp_path: Path, miner: Echo, axon: type[Axon] = Axon) -> Fault:
    """The fault of an exchange with this miner; the same client still works with an honest one."""

    async def main() -> Fault:
        bad = axon(miner, MINER, open_guard(), "127.0.0.1", 0)
        good = Axon(Echo(MALLORY.ss58_address), MALLORY, open_guard(), "127.0.0.1", 0)
        async with serving(bad) as a, serving(good) as b, dendrite(a, b) as network:
            assert await network.wait_for_peers(2, 5) == 2
            with pytest.raises(Faulted) as caught:
                await network.exchange(ORDER, network.seal(ORDER), blobs_of(ORDER), tmp_path / "bad")
            order = make_order(hotkey=MALLORY.ss58_address)
            await network.exchange(order, network.seal(order), blobs_of(order), tmp_path / "good")
            assert (tmp_path / "good").read_bytes() == STATE
        return caught.value.fault

    return asyncio.run(main())


def test_reply_signed_by_another_key(tmp_path: Path) -> None:
    assert verdict(tmp_path, Echo(), Liar) is Fault.FORGED


@pytest.mark.parametrize(
    "changed",
    [{"order": "0" * 64}, {"round": 5}, {"run": "other"}, {"hotkey": MALLORY.ss58_address}, {"loss": float("nan")}],
    ids=lambda changed: next(iter(changed)),
)
def test_reply_to_something_else(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert verdict(tmp_path, Twisted(**changed)) is Fault.MALFORMED


@pytest.mark.parametrize(
    "payload", [b"", STATE[:-1], STATE + b"x", STATE[:-1] + b"?"], ids=["none", "short", "long", "other"]
)
def test_payload_of_other_bytes(tmp_path: Path, payload: bytes) -> None:
    assert verdict(tmp_path, Twisted(payload)) is Fault.MALFORMED


def test_payload_larger_than_any(tmp_path: Path) -> None:
    assert verdict(tmp_path, Twisted(payload_bytes=1 << 50)) is Fault.MALFORMED


def test_a_miner_that_asks_for_what_is_not_the_order_s(tmp_path: Path) -> None:
    class Greedy(Echo):
        def order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
            other = make_order(b"secret" * 10)
            return super().order(caller, other, digest)

    assert verdict(tmp_path, Greedy()) is Fault.MALFORMED


def test_a_miner_that_asks_for_the_same_for_ever(tmp_path: Path) -> None:
    class Forgetful(Echo):
        def order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
            self.blobs.clear()
            return super().order(caller, order, digest)

    assert verdict(tmp_path, Forgetful()) is Fault.MALFORMED


def wild(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> type[Axon]:
    """An axon whose order route answers like this."""

    class Wild(Axon):
        async def _order(self, request: web.Request) -> web.StreamResponse:
            return await answer(request)

    return Wild


def test_an_error_that_is_no_refusal(tmp_path: Path) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=418, text="<html>")

    assert verdict(tmp_path, Echo(), wild(answer)) is Fault.MALFORMED


def test_an_endless_answer(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * (1 << 16))

    assert verdict(tmp_path, Echo(), wild(answer)) is Fault.MALFORMED


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": "http://127.0.0.1:1/"})

    assert verdict(tmp_path, Echo(), wild(answer)) is Fault.MALFORMED


def test_a_miner_that_keeps_refusing_for_the_time(tmp_path: Path) -> None:
    """One correction of the clock a request, however often it is told another time."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers["X-Bittensor-Nonce"])
        refusal = Refusal(reason="stale", time_ns=1 << 60)
        return web.Response(status=401, text=refusal.text())

    assert verdict(tmp_path, Echo(), wild(answer)) is Fault.SILENT
    assert len(asked) == 2
