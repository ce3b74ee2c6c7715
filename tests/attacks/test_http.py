"""Odd HTTP: heads, lengths, chunks and other protocols. Refused and counted, and never taken for two requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pilot.common.limits import Limits
from pilot.transport.server.axon import Axon
from protocol import MAX_BLOB_BYTES
from tests.attacks.caller import BODY, ORDER, ORDER_DIGEST, Caller, attack, blob_target, head, signed
from tests.echo import MALLORY, STATE, Echo

HELLO = f"/v1/hello?nonce={'0' * 32}"
POST = "POST /v1/order HTTP/1.1"
SMUGGLED = b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


def request(*lines: str, first: str = f"GET {HELLO} HTTP/1.1", body: bytes = b"") -> bytes:
    return "\r\n".join([first, "Host: x", *lines, "", ""]).encode("latin-1") + body


def post(*lines: str, body: bytes = b"{}") -> bytes:
    return request(*lines, first=POST, body=body)


def chunked(body: bytes) -> bytes:
    """A message that is signed as it should be, up to its body."""
    return head("POST", "/v1/order", "Transfer-Encoding: chunked", body=BODY) + body


REFUSED = {
    "a line too long": b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a line without an end": b"GET /" + b"a" * 300_000,
    "a field too long": request("X: " + "a" * 9000),
    "a field without an end": b"GET / HTTP/1.1\r\nX: " + b"a" * 300_000,
    "a name too long": request("a" * 9000 + ": 1"),
    "too many fields": request(*(f"X{i}: 1" for i in range(200))),
    "no host": f"GET {HELLO} HTTP/1.1\r\n\r\n".encode(),
    "zero in a field": request("X: a\0b"),
    "no colon": request("Xabc"),
    "space before the colon": request("X : 1"),
    "folded field": request("X: 1", " folded"),
    "bare line feeds": request().replace(b"\r\n", b"\n"),
    "bare carriage return": request("X: a\rb"),
    "odd name": request("\xff: 1"),
    "odd target": request(first=f"GET http://[::1{HELLO} HTTP/1.1"),
    "space in the target": request(first="GET /v1/ status HTTP/1.1"),
    "two lengths": post("Content-Length: 2", "Content-Length: 3"),
    "the same length twice": post("Content-Length: 2", "Content-Length: 2"),
    "a list of lengths": post("Content-Length: 2, 2"),
    "a negative length": post("Content-Length: -1"),
    "a plus": post("Content-Length: +2"),
    "a length in hex": post("Content-Length: 0x2"),
    "a length with an underscore": post("Content-Length: 1_0"),
    "a length in other digits": post("Content-Length: \xb2"),
    "an empty length": post("Content-Length:"),
    "a length of 2^64": post(f"Content-Length: {1 << 64}"),
    "a length of 5,000 digits": post("Content-Length: " + "9" * 5000),
    "length and chunks": post("Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED),
    "chunks and length": post("Transfer-Encoding: chunked", "Content-Length: 5", body=b"0\r\n\r\n" + SMUGGLED),
    "another transfer encoding": post("Transfer-Encoding: gzip", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked twice": post("Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n" + SMUGGLED),
    "nearly chunked": post("Transfer-Encoding: xchunked", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked and identity": post("Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=b"0\r\n\r\n"),
    "a chunk's size is no number": chunked(b"zz\r\nabc\r\n"),
    "a chunk's size is negative": chunked(b"-1\r\nabc\r\n"),
    "a chunk's size overflows": chunked(b"f" * 17 + b"\r\nabc\r\n"),
    "a chunk longer than it says": chunked(b"1\r\nxyz\r\n0\r\n\r\n"),
    "a hundred thousand trailers": chunked(b"0\r\n" + b"X: a\r\n" * 100_000 + b"\r\n"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "HTTP/9.9": request(first="GET /v1/status HTTP/9.9"),
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(190),
    "zeros": bytes(5000),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_request_is_refused(what: str, tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        answer = await caller.whole(REFUSED[what])
        answers = [line for line in answer.split(b"\r\n") if line.startswith(b"HTTP/")]
        assert answers == [b"HTTP/1.0 400 Bad Request"]  # one: what came behind it is no request
        assert dict(axon.refused) == {400: 1}
        assert not miner.orders

    attack(tmp_path, play)


SERVED_OR_NOT = {
    "an absolute target": (request(first=f"GET http://elsewhere.example{HELLO} HTTP/1.1"), 200),
    "odd expectations": (request("Expect: 200-maybe"), 200),
    "an upgrade": (request("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x"), 200),
    "an upgrade to HTTP/2": (request("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"), 200),
    "odd bytes in a field": (request("X: \xff\xfe"), 200),
    "HTTP/1.0": (b"GET /v1/status HTTP/1.0\r\n\r\n", 200),
    "HTTP/0.9": (b"GET /v1/status\r\n\r\n", 200),
    "a tunnel": (request(first="CONNECT elsewhere.example:443 HTTP/1.1"), 404),
    "an asterisk": (request(first="OPTIONS * HTTP/1.1"), 404),
    "a trace": (request(first="TRACE /v1/status HTTP/1.1"), 405),
    "a length of 2^63 - 1": (post(f"Content-Length: {(1 << 63) - 1}"), 401),
    "compressed": (post("Content-Encoding: gzip", "Content-Length: 2"), 415),
    "compressed oddly": (post("Content-Encoding: br, gzip", "Content-Length: 2"), 415),
    "hotkey twice": (
        head("POST", "/v1/order", f"X-Bittensor-Hotkey: {MALLORY.ss58_address}", "Content-Length: 0"),
        401,
    ),
    "signature twice": (head("POST", "/v1/order", "X-Bittensor-Signature: 0x00", "Content-Length: 0"), 401),
}


@pytest.mark.parametrize("what", SERVED_OR_NOT)
def test_odd_requests_mean_what_they_say(what: str, tmp_path: Path) -> None:
    """An open path stays open, whatever is around it; nothing else opens."""
    data, status = SERVED_OR_NOT[what]

    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        assert int((await caller.raw(data)).split(b" ", 2)[1]) == status
        assert dict(axon.refused) == ({status: 1} if status >= 400 else {})
        assert not miner.orders

    attack(tmp_path, play)


def test_a_signature_is_good_for_the_target_as_it_was_sent(tmp_path: Path) -> None:
    target = blob_target(STATE)

    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        for other in (f"http://127.0.0.1{target}", target.replace("state", "%73tate"), target + "&", target + "#x"):
            request = head("PUT", target, f"Content-Length: {len(STATE)}").replace(target.encode(), other.encode(), 1)
            assert b" 401 " in await caller.raw(request + STATE)
        assert not miner.blobs

    assert dict(attack(tmp_path, play).refused) == {401: 4}


def test_pipelined_requests_behind_a_refused_one_are_dropped(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        answer = await caller.whole(post("Content-Length: 2") * 1000)
        assert answer.count(b"HTTP/1.1 401") == 1

    assert dict(attack(tmp_path, play).refused) == {401: 1}


def test_chunk_extensions_without_an_end_are_cut_off(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        assert b" 408 " in await caller.raw(chunked(b"1;" + b"a" * 1_000_000))

    attack(tmp_path, play, replace(Limits(), message_s=0.3))


def test_a_compressed_message_is_not_unpacked(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        headers = signed("POST", "/v1/order", BODY) | {"Content-Encoding": "gzip"}
        assert (await caller.send("POST", "/v1/order", headers, BODY))[0] == 415
        target = blob_target(STATE)
        headers = signed("PUT", target) | {"Content-Encoding": "deflate"}
        assert (await caller.send("PUT", target, headers, STATE))[0] == 415
        assert not miner.blobs

    attack(tmp_path, play)


# --- numbers in the query -----------------------------------------------------------------------------------------

NUMBERS = [
    str(1 << 64), str(1 << 63), "9" * 20, "9" * 5000, "-1", "+1", "1e3", "1.0", "0x10", "1_0", "", "%20" + "1",
    "1%00", "%D9%A3", "%EF%BC%93", "%C2%B2", "Infinity", "nan", "1,2",
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_that_is_none_is_refused(number: str, tmp_path: Path) -> None:
    """As length, as offset, and as seconds to wait."""
    digest = "0" * 64
    targets = {
        "PUT": [blob_target(STATE, number or "%20"), blob_target(STATE, offset=number)],
        "GET": [f"/v1/payload?order={digest}&offset={number}", f"/v1/reply?order={digest}&wait={number}"],
    }

    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        for method, several in targets.items():
            for target in several:
                status, refusal = await caller.send(method, target, signed(method, target))
                assert status == 400, (target, refusal)
                assert len(refusal.reason) < 200
        assert not miner.blobs

    attack(tmp_path, play)


SIZE = len(STATE)
RANGES = [
    (blob_target(STATE, offset=SIZE), SIZE, 416),
    (blob_target(STATE, offset=SIZE + 1), SIZE, 416),
    (blob_target(STATE, offset=10**15 - 1), SIZE, 416),
    (blob_target(STATE, MAX_BLOB_BYTES + 1), SIZE, 400),  # more than any blob
    (blob_target(STATE, MAX_BLOB_BYTES), SIZE, 413),  # more than this miner takes
    (blob_target(STATE, 10**15 - 1), SIZE, 400),
    (blob_target(STATE, offset=1), SIZE - 1, 409),  # a gap at the beginning
    (blob_target(STATE, offset=1), SIZE, 413),  # announced longer than what is left
    (blob_target(STATE, offset=0), SIZE - 1, 400),  # and shorter
    (blob_target(STATE) + "&offset=0", SIZE, 400),
    (blob_target(STATE) + "&offset=1", SIZE, 400),
    (blob_target(STATE) + "&offset[]=1", SIZE, 400),
]


@pytest.mark.parametrize(("target", "announced", "status"), RANGES)
def test_ranges_that_cannot_be(target: str, announced: int, status: int, tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        answer = await caller.raw(head("PUT", target, f"Content-Length: {announced}") + STATE[:announced])
        assert int(answer.split(b" ", 2)[1]) == status
        assert not miner.blobs
        assert sum(writer.held for writer in miner.writers.values()) == 0

    attack(tmp_path, play)


def test_an_offset_beyond_the_payload(tmp_path: Path) -> None:
    async def play(caller: Caller, axon: Axon, miner: Echo) -> None:
        miner.orders[ORDER_DIGEST] = ORDER
        miner.blobs[ORDER.update.refs[0].digest] = STATE
        for offset, status in ((SIZE + 1, 416), (10**15 - 1, 416), (SIZE, 200)):
            target = f"/v1/payload?order={ORDER_DIGEST}&offset={offset}"
            answer = await caller.raw(head("GET", target))
            assert int(answer.split(b" ", 2)[1]) == status

    attack(tmp_path, play)
