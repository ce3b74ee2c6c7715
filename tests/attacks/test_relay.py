"""What somebody on the way may do to messages without TLS: it is repeated, and the miner is never blamed for it."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pilot.common.limits import Limits
from pilot.interfaces import Faulted, Refused
from pilot.transport.auth import REFUSAL_SIGNATURE, sign_message, sign_refusal
from pilot.transport.client.dendrite import Dendrite
from protocol import Fault, Refusal
from tests.echo import MALLORY, MINER, STATE, Echo, blobs_of, dendrite, desk, make_order, member, served

LIMITS = replace(Limits(), away_s=2.5, poll_s=1.0, message_s=2.0, header_s=2.0)
NEUTRAL = {Fault.SILENT, Fault.LATE}


@dataclass
class Relay:
    """Passes connections on to `port`, whole messages at a time, changed by `request` and `response`.

    Both get the request's first line and a message. A change to None is no change; `changed` counts the others.
    """

    port: int
    request: Callable[[str, bytes], bytes | None] = lambda target, message: None
    response: Callable[[str, bytes], bytes | None] = lambda target, message: None
    changed: int = 0
    seen: list[tuple[str, bytes]] = field(default_factory=list)  # responses, as they came

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                while head := await _head(reader):
                    target = head.split(b"\r\n")[0].decode()
                    message = head + await _body(reader, head)
                    message = self._apply(self.request, target, message)
                    far_writer.write(message.replace(b"Expect: 100-continue\r\n", b""))
                    answer = await _head(far_reader)
                    if not answer:
                        break
                    answer += await _body(far_reader, answer)
                    self.seen.append((target, answer))
                    writer.write(self._apply(self.response, target, answer))
                    await writer.drain()
            finally:
                far_writer.close()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _apply(self, change: Callable[[str, bytes], bytes | None], target: str, message: bytes) -> bytes:
        other = change(target, message)
        self.changed += other is not None
        return message if other is None else other


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return await reader.readexactly(int(length[1])) if length else b""


@asynccontextmanager
async def relay_to(port: int) -> AsyncIterator[tuple[Relay, int]]:
    relay = Relay(port)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    try:
        yield relay, server.sockets[0].getsockname()[1]
    finally:
        server.close()


@asynccontextmanager
async def pushing() -> AsyncIterator[tuple[Dendrite, Relay]]:
    async with (
        served(Echo(), limits=LIMITS) as far,
        relay_to(far) as (relay, near),
        dendrite(near, limits=LIMITS) as network,
    ):
        yield network, relay


@asynccontextmanager
async def pulling() -> AsyncIterator[tuple[Dendrite, Relay]]:
    async with (
        dendrite(limits=LIMITS) as network,
        desk(network, limits=LIMITS) as (_, at),
        relay_to(at.port) as (relay, near),
        member(Echo(), replace(at, port=near), limits=LIMITS),
    ):
        yield network, relay


FORMS = {"push": pushing, "pull": pulling}


async def exchange(network: Dendrite, folder: Path, round: int = 0, deadline_s: float = 20.0) -> Fault | None:
    """Order once; None where the very payload that the miner sent is here."""
    order = make_order(round=round, deadline_s=deadline_s)
    path = folder / str(round)
    try:
        received = await network.exchange(order, network.sign(order), blobs_of(order), path)
    except Faulted as faulted:
        assert not path.exists()
        return faulted.fault
    assert path.read_bytes() == STATE
    assert received.signed.signer == MINER.ss58_address
    return None


# --- damage -----------------------------------------------------------------------------------------------------------

SIGNED = r"/v1/(order|blob|reply|payload|next|working|refusal)"


def flip(message: bytes, rng: random.Random) -> bytes:
    """One bit of a message is another; not of its length, which only makes the relay wait."""
    at = rng.randrange(len(message))
    return message[:at] + bytes([message[at] ^ 1 << rng.randrange(8)]) + message[at + 1 :]


def in_body(message: bytes, rng: random.Random) -> bytes:
    head, _, body = message.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n" + (flip(body, rng) if body else b"")


def halved(message: bytes, rng: random.Random) -> bytes:
    head, _, body = message.partition(b"\r\n\r\n")
    half = body[: len(body) // 2]
    return re.sub(rb"(?i)content-length: *\d+", b"Content-Length: %d" % len(half), head) + b"\r\n\r\n" + half


def chunked(message: bytes, rng: random.Random) -> bytes:
    head, _, body = message.partition(b"\r\n\r\n")
    head = re.sub(rb"(?i)content-length: *\d+", b"Transfer-Encoding: chunked", head)
    return head + b"\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else message


def another_status(message: bytes, rng: random.Random) -> bytes:
    return re.sub(rb"^HTTP/1.1 \d", b"HTTP/1.1 " + rng.choice([b"1", b"3", b"4", b"5", b"6"]), message)


DAMAGES = {f.__name__: f for f in (flip, in_body, halved, chunked, another_status)}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", FORMS)
def test_damage_on_the_way_is_repeated(form: str, damage: str, tmp_path: Path) -> None:
    """Every other message of the first dozen is damaged, in both directions."""

    async def main() -> None:
        rng = random.Random(f"{form} {damage}")
        async with FORMS[form]() as (network, relay):
            assert await network.wait_for_peer(20)

            def sometimes(target: str, message: bytes) -> bytes | None:
                if not re.search(SIGNED, target) or rng.random() < 0.5 or relay.changed >= 12:
                    return None
                return DAMAGES[damage](message, rng)

            relay.request = relay.response = sometimes
            for round in range(3):
                before = relay.changed
                fault = await exchange(network, tmp_path, round)
                assert fault is None or (fault in NEUTRAL and relay.changed > before)
                assert await network.wait_for_peer(20)
            relay.request = relay.response = lambda target, message: None
            assert await exchange(network, tmp_path, 9) is None
            assert relay.changed >= 3

    asyncio.run(main())


@pytest.mark.parametrize("way", ["request", "response"])
@pytest.mark.parametrize("target", ["order", "blob", "reply", "payload", "next"])
@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_body_costs_the_miner_nothing(form: str, target: str, way: str, tmp_path: Path) -> None:
    """The first three of a kind are damaged: the round still has the whole contribution."""

    async def main() -> None:
        rng = random.Random(0)
        async with FORMS[form]() as (network, relay):
            assert await network.wait_for_peer(20)

            def first(line: str, message: bytes) -> bytes | None:
                if f"/v1/{target}" not in line or relay.changed >= 3 or message.endswith(b"\r\n\r\n"):
                    return None
                return in_body(message, rng)

            setattr(relay, way, first)
            assert await exchange(network, tmp_path) is None

    asyncio.run(main())


# --- forgery ----------------------------------------------------------------------------------------------------------


def refusing(fault: Fault | None, target: str, replayed: str = "") -> Callable[[str, bytes], bytes | None]:
    """Every answer of a kind becomes a refusal with this fault, as the relay can make one."""
    text = Refusal(reason="no", fault=fault).text()

    def change(line: str, message: bytes) -> bytes | None:
        if f"/v1/{target}" not in line:
            return None
        signature = f"{REFUSAL_SIGNATURE}: {replayed}\r\n" if replayed else ""
        head = f"HTTP/1.1 409 Conflict\r\n{signature}Content-Type: application/json\r\nContent-Length: {len(text)}"
        return f"{head}\r\n\r\n{text}".encode()

    return change


@pytest.mark.parametrize("fault", [Fault.UNVERIFIED, Fault.BUSY])
@pytest.mark.parametrize(("form", "target"), [("push", "order"), ("push", "blob"), ("push", "reply"), ("pull", "next")])
def test_a_forged_refusal_decides_nothing(form: str, target: str, fault: Fault | None, tmp_path: Path) -> None:
    async def main() -> None:
        other = sign_refusal(MALLORY, {}, 409, Refusal(reason="no", fault=fault).text())[REFUSAL_SIGNATURE]
        for replayed in ("", other):
            async with FORMS[form]() as (network, relay):
                assert await network.wait_for_peer(20)
                relay.response = refusing(fault, target, replayed)
                outcome = await exchange(network, tmp_path, deadline_s=1.0)
                assert outcome in NEUTRAL or (target == "blob" and outcome is None)  # the blob has arrived before
                relay.response = lambda target, message: None
                assert await network.wait_for_peer(20)
                assert await exchange(network, tmp_path, 1) is None

    asyncio.run(main())


def test_a_refusal_of_another_request_decides_nothing(tmp_path: Path) -> None:
    """The relay keeps one that the miner has signed, and shows it again."""

    async def main() -> None:
        async with pushing() as (network, relay):
            assert await network.wait_for_peer(20)
            assert await exchange(network, tmp_path) is None
            kept = next(answer for line, answer in relay.seen if b" 409 " in answer[:20] and "/v1/order" in line)
            assert REFUSAL_SIGNATURE.encode() in kept
            relay.response = lambda line, message: kept if "/v1/order" in line else None
            assert await exchange(network, tmp_path, 1, deadline_s=1.5) in NEUTRAL

    asyncio.run(main())


@pytest.mark.parametrize("target", ["reply", "payload"])
def test_an_answer_to_another_order_is_not_taken(target: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with pushing() as (network, relay):
            assert await network.wait_for_peer(20)
            assert await exchange(network, tmp_path) is None
            kept = next(answer for line, answer in relay.seen if f"/v1/{target}" in line and b" 200 " in answer[:20])
            kept = kept if target == "reply" else kept.replace(STATE[:4], b"!!!!")
            relay.response = lambda line, message: kept if f"/v1/{target}" in line else None
            assert await exchange(network, tmp_path, 1, deadline_s=1.5) in NEUTRAL

    asyncio.run(main())


def test_a_reply_signed_by_the_relay_is_not_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with pushing() as (network, relay):
            assert await network.wait_for_peer(20)
            mallory = Echo(MALLORY.ss58_address)

            def forge(line: str, message: bytes) -> bytes | None:
                if "/v1/reply" not in line:
                    return None
                order = make_order()
                digest = network.sign(order).digest
                mallory.orders[digest], mallory.blobs[order.update.refs[0].digest] = order, STATE
                text = sign_message(MALLORY, mallory.answer(digest)).model_dump_json()
                return f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()

            relay.response = forge
            assert await exchange(network, tmp_path, deadline_s=1.5) in NEUTRAL

    asyncio.run(main())


# --- what a miner may say of itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_miner_chooses_among_few_faults(form: str, tmp_path: Path) -> None:
    async def main() -> dict[Fault, Fault | None]:
        found: dict[Fault, Fault | None] = {}
        async with FORMS[form]() as (network, _):
            assert await network.wait_for_peer(20)
            for round, fault in enumerate(Fault):
                with pytest.MonkeyPatch.context() as patch:

                    def refuse(*_: object, chosen: Fault = fault) -> None:
                        raise Refused(409, "no", chosen)

                    patch.setattr(Echo, "accept_order", refuse)
                    found[fault] = await exchange(network, tmp_path, round)
        return found

    own = {Fault.BUSY, Fault.LEAVING, Fault.LATE, Fault.NONFINITE}
    assert asyncio.run(main()) == {fault: fault if fault in own else Fault.REFUSED for fault in Fault}
