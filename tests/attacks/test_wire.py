"""What a hostile caller may send to a miner. Each is refused with the right status, and honest work goes on."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import aiohttp
import pytest

from pilot.transport.auth import sign_message, sign_request
from pilot.transport.server.axon import Axon
from protocol import MAX_MESSAGE_BYTES, Fault, Message, Order, Receipt, Refusal
from tests.attacks.caller import (
    BODY,
    ORDER,
    ORDER_DIGEST,
    Caller,
    Headers,
    attack,
    blob_target,
    head,
    refuses,
    signed,
)
from tests.echo import (
    MALLORY,
    MINER,
    STATE,
    VALIDATOR,
    Echo,
    honest_exchange,
    make_order,
    make_receipt,
    open_guard,
    serving,
)

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
        body = sign_message(VALIDATOR, make_receipt(ORDER, ORDER_DIGEST)).model_dump_json().encode()
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


@pytest.mark.parametrize("offset_s", [0, 3600, -3600], ids=["the same", "an hour ahead", "an hour behind"])
def test_replayed_after_a_restart(tmp_path: Path, offset_s: int) -> None:
    """The next process refuses what this one has taken, whatever its clock says by then."""
    body = sign_message(VALIDATOR, make_receipt(ORDER, ORDER_DIGEST)).model_dump_json().encode()

    async def main() -> None:
        miner, headers = Echo(), {}
        async with aiohttp.ClientSession() as session:
            async with serving(Axon(miner, MINER, open_guard(), "127.0.0.1", 0)) as port:
                headers = signed("POST", "/v1/receipt", body)
                assert (await Caller(session, port).send("POST", "/v1/receipt", headers, body))[0] == 200
            again = Axon(miner, MINER, open_guard(), "127.0.0.1", 0, clock_ns=lambda: time.time_ns() + offset_s * 10**9)
            async with serving(again) as port:
                assert (await Caller(session, port).send("POST", "/v1/receipt", headers, body))[0] == 401
                await honest_exchange(port, tmp_path)
        assert len(miner.receipts) == 1

    asyncio.run(main())


def test_misdirected(tmp_path: Path) -> None:
    headers = sign_request(VALIDATOR, "POST", "/v1/order", MALLORY.ss58_address, BODY)
    refuses(tmp_path, 403, lambda c: c.send("POST", "/v1/order", headers, BODY))


@pytest.mark.parametrize("cls", [Order, Receipt])
def test_an_order_or_receipt_for_another_miner(tmp_path: Path, cls: type[Message]) -> None:
    order = make_order(hotkey=MALLORY.ss58_address)
    message = order if cls is Order else make_receipt(order, ORDER_DIGEST)
    body, target = sign_message(VALIDATOR, message).model_dump_json().encode(), f"/v1/{message.kind}"
    refuses(tmp_path, 403, lambda c: c.send("POST", target, signed("POST", target, body), body))


def test_body_changed_after_signing(tmp_path: Path) -> None:
    changed = BODY.replace(b'\\"round\\":0', b'\\"round\\":7')
    assert changed != BODY
    refuses(tmp_path, 401, lambda c: c.send("POST", "/v1/order", signed("POST", "/v1/order", BODY), changed))


def test_envelope_changed_inside_a_signed_request(tmp_path: Path) -> None:
    changed = BODY.replace(b'\\"round\\":0', b'\\"round\\":7')
    assert refuses(tmp_path, 401, lambda c: c.order(changed)).fault is Fault.FORGED


def test_envelope_of_another_kind(tmp_path: Path) -> None:
    body = sign_message(VALIDATOR, make_receipt(ORDER, ORDER_DIGEST)).model_dump_json().encode()
    assert refuses(tmp_path, 401, lambda c: c.order(body)).fault is Fault.FORGED


def test_order_signed_by_another_than_the_caller(tmp_path: Path) -> None:
    body = sign_message(MALLORY, ORDER).model_dump_json().encode()
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
        {"protocol": "pilot/1"},
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
    body = sign_message(VALIDATOR, raw).model_dump_json().encode()
    assert refuses(tmp_path, 400, lambda c: c.order(body)).fault is Fault.MALFORMED


def test_a_second_validator_meets_a_pinned_miner(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        assert (await caller.order())[0] == 409  # VALIDATOR is pinned by now; the blobs are missing
        body = sign_message(MALLORY, ORDER).model_dump_json().encode()
        status, refusal = await caller.order(body, MALLORY)
        assert status == 403
        assert "--unpin" in refusal.reason
        assert not miner.orders

    attack(tmp_path, play)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_may_not_call_is_refused_before_its_signature_is_looked_at(method: str, tmp_path: Path) -> None:
    target = "/v1/order" if method == "POST" else f"/v1/reply?order={'0' * 64}&wait=0"
    body = BODY if method == "POST" else None

    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        assert (await caller.order())[0] == 409  # VALIDATOR is pinned by now
        unverified = signed(method, target, signer=MALLORY) | {"X-Bittensor-Signature": "00" * 64}
        assert (await caller.send(method, target, unverified, body))[0] == 403

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


def asks_again(tmp_path: Path, target: str, sent: bytes) -> bool:
    """Whether a damaged blob is to be sent again, from its beginning: its bytes are not signed."""

    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        status, refusal = await caller.send("PUT", target, signed("PUT", target), sent)
        assert (status, refusal.fault, [*refusal.held.values()]) == (409, None, [0])
        assert [ref.digest for ref in refusal.missing] == [*refusal.held]
        assert not miner.blobs

    attack(tmp_path, play)
    return True


@pytest.mark.parametrize("sent", [b"x" * len(STATE), STATE[:-1] + b"?"])
def test_blob_with_a_wrong_digest(tmp_path: Path, sent: bytes) -> None:
    target = blob_target(STATE)
    assert asks_again(tmp_path, target, sent)


def test_blob_under_another_kind(tmp_path: Path) -> None:
    target = blob_target(STATE).replace("state", "data")
    assert asks_again(tmp_path, target, STATE)


def test_blob_shorter_or_longer_than_signed(tmp_path: Path) -> None:
    target = blob_target(STATE)
    refuses(tmp_path, 400, lambda c: c.send("PUT", target, signed("PUT", target), STATE[:-1]))
    refuses(tmp_path, 413, lambda c: c.send("PUT", target, signed("PUT", target), STATE + b"x"))


def test_blob_without_a_length(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        line = await caller.raw(
            head("PUT", blob_target(STATE), "Transfer-Encoding: chunked") + b"4\r\nabcd\r\n0\r\n\r\n"
        )
        assert line.startswith(b"HTTP/1.1 411")
        assert not miner.blobs

    assert attack(tmp_path, play).refused[411] == 1


def test_blob_whose_sender_hangs_up(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", caller.port)
        writer.write(head("PUT", blob_target(STATE), f"Content-Length: {len(STATE)}") + STATE[:-1])
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
        request = head("PUT", blob_target(STATE), f"Content-Length: {len(STATE)}")
        line = await caller.raw(request.replace(b"kind=state", b"kind=data"))
        assert line.startswith(b"HTTP/1.1 401")

    attack(tmp_path, play)
