"""Miners that pull and do as they like: what their validator makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pilot.common.limits import Limits
from pilot.interfaces import Faulted, ReceivedReply, Refused
from pilot.transport.auth import sign_message
from pilot.transport.client.peer import Peer
from pilot.transport.client.pull_client import NOTHING
from pilot.transport.client.remote_miner import Unproven
from pilot.transport.server.pull_queue import PullQueue
from protocol import Announce, Digest, Fault, Order, Reply, Signed, new_nonce
from tests.echo import MALLORY, MINER, STATE, VALIDATOR, Echo, caller, make_order
from tests.test_pull import begun, there, validator


class Forger:
    """Announces itself, takes its order, and then sends what the test likes."""

    def __init__(self, peer: Peer) -> None:
        self.peer, self.session = peer, new_nonce()

    async def announce(self) -> None:
        announce = Announce(
            hotkey=MINER.ss58_address, endpoint=None, tls=False, tasks=("echo",), codecs=(), leaving=False, time_ns=0
        )
        body = sign_message(MINER, announce).model_dump_json().encode()
        await self.peer.call("POST", f"/v1/announce?session={self.session}", "refusal", body=body)

    async def next(self, taken: Digest = NOTHING) -> Signed:
        while True:
            target = f"/v1/next?session={self.session}&taken={taken}&wait=1"
            status, text = await self.peer.call("GET", target, "order", wait_s=1)
            if status == 200:
                return Signed.parse(text)

    async def post(self, what: str, order: Digest, message: Signed) -> None:
        body = message.model_dump_json().encode()
        await self.peer.call("POST", f"/v1/{what}?session={self.session}&order={order}", "refusal", body=body)

    async def get(self, order: Digest, digest: Digest) -> None:
        target = f"/v1/blob?session={self.session}&order={order}&digest={digest}&offset=0"
        await self.peer.call("GET", target, "refusal")

    async def put(self, order: Digest, digest: Digest, size: int, data: bytes, offset: int = 0) -> None:
        query = f"session={self.session}&order={order}&digest={digest}&bytes={size}&offset={offset}"
        target = f"/v1/payload?{query}"
        await self.peer.call("PUT", target, "refusal", blob=data)


@asynccontextmanager
async def forger(tmp_path: Path) -> AsyncIterator[tuple[Forger, Order, Signed, asyncio.Task[ReceivedReply]]]:
    """One that has been given an order."""
    async with validator() as (network, at), caller(at) as peer:
        made = Forger(peer)
        await made.announce()
        polling = asyncio.create_task(made.next())
        await there(network)
        order = make_order(deadline_s=60)
        exchange = begun(network, order, tmp_path / "p")
        yield made, order, await polling, exchange
        exchange.cancel()
        await asyncio.wait({exchange})


def answer(asked: Order, digest: Digest, **changes: object) -> Reply:
    echo = Echo()
    echo.orders[digest], echo.blobs[asked.update.refs[0].digest] = asked, STATE
    return echo.answer(digest).model_copy(update=changes)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({"round": 7}, Fault.MALFORMED), ({"order": "0" * 64}, Fault.FORGED), ({"run": "other"}, Fault.MALFORMED)],
    ids=str,
)
def test_a_reply_to_something_else(tmp_path: Path, changes: dict[str, object], verdict: Fault) -> None:
    async def main() -> Faulted:
        async with forger(tmp_path) as (miner, order, signed, exchange):
            reply = sign_message(MINER, answer(order, signed.digest, **changes))
            with pytest.raises(Refused):
                await miner.post("reply", signed.digest, reply)
            with pytest.raises(Faulted) as caught:
                await exchange
            return caught.value

    assert asyncio.run(main()).fault is verdict


def test_a_reply_that_another_has_signed(tmp_path: Path) -> None:
    async def main() -> Faulted:
        async with forger(tmp_path) as (miner, order, signed, exchange):
            with pytest.raises(Refused, match="signed by"):
                await miner.post("reply", signed.digest, sign_message(MALLORY, answer(order, signed.digest)))
            with pytest.raises(Faulted) as caught:
                await exchange
            return caught.value

    assert asyncio.run(main()).fault is Fault.FORGED


def test_a_reply_twice_is_one_and_another_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with forger(tmp_path) as (miner, order, signed, exchange):
            digest, reply = signed.digest, answer(order, signed.digest)
            for _ in range(2):
                await miner.post("reply", digest, sign_message(MINER, reply))
            with pytest.raises(Refused, match="another reply"):
                await miner.post("reply", digest, sign_message(MINER, answer(order, digest, loss=2.0)))
            await miner.put(digest, reply.payload_digest, len(STATE), STATE)
            await exchange
            await miner.post("reply", digest, sign_message(MINER, reply))  # its answer may have been lost
            await miner.put(digest, reply.payload_digest, len(STATE), STATE)
            with pytest.raises(Refused, match="no such order is under way"):
                await miner.post("reply", "0" * 64, sign_message(MINER, reply))

    asyncio.run(main())


@pytest.mark.parametrize("payload", [STATE[::-1], STATE[:-1] + b"!"], ids=["reversed", "last"])
def test_a_payload_of_another_digest_has_to_come_again(tmp_path: Path, payload: bytes) -> None:
    async def main() -> None:
        async with forger(tmp_path) as (miner, order, signed, exchange):
            reply = answer(order, signed.digest)
            await miner.post("reply", signed.digest, sign_message(MINER, reply))
            with pytest.raises(Refused) as refused:
                await miner.put(signed.digest, reply.payload_digest, len(STATE), payload)
            assert refused.value.held == {reply.payload_digest: 0}
            await miner.put(signed.digest, reply.payload_digest, len(STATE), STATE)
            await exchange

    asyncio.run(main())


def test_what_is_not_of_the_order_is_not_given(tmp_path: Path) -> None:
    async def main() -> Faulted:
        async with forger(tmp_path) as (miner, _, signed, exchange):
            with pytest.raises(Refused) as refused:
                await miner.get(signed.digest, NOTHING)
            assert refused.value.status == 400
            with pytest.raises(Faulted) as caught:
                await exchange
            return caught.value

    assert asyncio.run(main()).fault is Fault.MALFORMED


def test_another_process_of_this_hotkey_answers_for_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with forger(tmp_path) as (miner, order, signed, exchange):
            copy_of_run, digest, reply = Forger(miner.peer), signed.digest, answer(order, signed.digest)
            for call in (
                copy_of_run.next(),
                copy_of_run.get(digest, order.update.refs[0].digest),
                copy_of_run.post("working", digest, sign_message(MINER, Echo().status())),
                copy_of_run.post("refusal", digest, sign_message(MINER, reply)),
                copy_of_run.post("reply", digest, sign_message(MINER, reply)),
                copy_of_run.put(digest, reply.payload_digest, len(STATE), STATE),
            ):
                with pytest.raises(Refused, match="another process is at work") as refused:
                    await call
                assert refused.value.status == 409
            await miner.post("reply", digest, sign_message(MINER, reply))
            await miner.put(digest, reply.payload_digest, len(STATE), STATE)
            await exchange

    asyncio.run(main())


def test_an_order_that_it_has_from_before_a_restart_is_handed_out_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with validator() as (network, at), caller(at) as peer:
            await (miner := Forger(peer)).announce()
            order = make_order(deadline_s=120)
            digest, exchange = network.sign(order).digest, begun(network, order, tmp_path / "p")
            async with asyncio.timeout(60):
                assert (await miner.next(taken=digest)).digest == digest
            reply = answer(order, digest)
            await miner.post("reply", digest, sign_message(MINER, reply))
            await miner.put(digest, reply.payload_digest, len(STATE), STATE)
            await exchange

    asyncio.run(main())


def test_who_is_told_to_stop_while_a_letter_is_taken_stops() -> None:
    async def main() -> None:
        signed = sign_message(VALIDATOR, make_order())
        for steps in range(8):
            mailbox = PullQueue(MINER.ss58_address, Limits())
            with mailbox.heard():
                telling = asyncio.create_task(mailbox.deliver(signed))
                assert await mailbox.next(NOTHING, 60) == signed
                polling = asyncio.create_task(mailbox.next(signed.digest, 60))
                for _ in range(steps):
                    await asyncio.sleep(0)
                ended, _ = telling.done(), telling.cancel()
                await asyncio.wait({telling})
                assert ended or telling.cancelled(), steps
                polling.cancel()
                await asyncio.wait({polling})

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/v1/next?session=x&taken={zeros}&wait=1", 400),
        ("GET", "/v1/next?session={other}&taken={zeros}&wait=1", 409),
        ("GET", "/v1/next?session={own}&taken={zeros}&wait=-1", 400),
        ("GET", "/v1/next?session={own}", 400),
        ("GET", "/v1/blob?session={own}&order={zeros}&digest={zeros}&offset=0", 404),
        ("GET", "/v1/blob?session={own}&order={order}&digest={zeros}&offset=99999999999999999", 400),
        ("GET", "/v1/blob?order={order}&digest={zeros}&offset=0", 400),
        ("PUT", "/v1/payload?session={own}&order={order}&digest={zeros}&bytes=1&offset=2", 416),
        ("PUT", "/v1/payload?session={own}&order={order}&digest={zeros}&bytes=0&offset=0", 409),
        ("POST", "/v1/next?session={own}&taken={zeros}&wait=1", 405),
        ("GET", "/v1/order", 404),
    ],
)
def test_odd_requests(tmp_path: Path, method: str, target: str, status: int) -> None:
    async def main() -> None:
        async with forger(tmp_path) as (miner, _, signed, exchange):
            names = {"zeros": "0" * 64, "other": "1" * 32, "own": miner.session, "order": signed.digest}
            target_ = target.format(**names)
            with pytest.raises((Refused, Unproven)) as refused:
                await miner.peer.call(method, target_, "refusal", blob=b"" if method == "PUT" else None)
            error = refused.value
            assert error.status == status if isinstance(error, Refused) else f"refused with {status}" in str(error)
            assert not exchange.done() or method == "GET"

    asyncio.run(main())


def test_who_has_not_announced_itself_gets_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with forger(tmp_path) as (miner, _, signed, exchange), caller(miner.peer.endpoint, MALLORY) as mallory:
            stranger = Forger(mallory)
            for call in (
                stranger.next(),
                stranger.post("working", signed.digest, sign_message(MALLORY, Echo(MALLORY.ss58_address).status())),
                stranger.put(signed.digest, "0" * 64, 1, b"!"),
            ):
                with pytest.raises(Refused, match="announce yourself first"):
                    await call
            assert not exchange.done()

    asyncio.run(main())
