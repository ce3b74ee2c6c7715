"""Miners that pull, over real sockets: the same exchanges as with those that serve, by requests of the miner alone."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pilot.common.limits import Limits
from pilot.interfaces import Faulted, ReceivedReply, Refused
from pilot.simulation.chaos.proxy import proxy_to
from pilot.transport.auth import verify_message
from pilot.transport.client.dendrite import Dendrite
from pilot.transport.client.peer import Endpoint
from protocol import Digest, Fault, Hotkey, Order, Reply, Status, Stop
from tests.echo import (
    MINER,
    STATE,
    VALIDATOR,
    Echo,
    blobs_of,
    dendrite,
    desk,
    make_order,
    make_receipt,
    member,
    until,
)
from tests.test_transport import fault, free_port

BIG = os.urandom(12 << 20)
CUT = 3 << 20
QUICK = replace(Limits(), poll_s=1.0)


@asynccontextmanager
async def validator(
    port: int = 0, away_s: float = 30.0, clock_offset_s: int = 0
) -> AsyncIterator[tuple[Dendrite, Endpoint]]:
    def clock_ns() -> int:
        return time.time_ns() + clock_offset_s * 10**9

    limits = replace(QUICK, away_s=away_s)
    async with dendrite(limits=limits) as network, desk(network, port, limits=limits, clock_ns=clock_ns) as (_, at):
        yield network, at


async def there(network: Dendrite) -> None:
    assert await network.wait_for_peer(60)


def begun(network: Dendrite, order: Order, path: Path, state: bytes = STATE) -> asyncio.Task[ReceivedReply]:
    return asyncio.create_task(network.exchange(order, network.sign(order), blobs_of(order, state), path))


# --- an exchange ------------------------------------------------------------------------------------------------------


def test_order_blobs_reply_payload_stop_and_receipt(tmp_path: Path) -> None:
    async def main() -> None:
        order, taken = make_order(), []
        async with validator() as (network, at), member(miner := Echo(), at):
            await there(network)
            assert network.peers() == (MINER.ss58_address,)
            signed = network.sign(order)
            received = await network.exchange(
                order, signed, blobs_of(order), tmp_path / "p", accepted=lambda: taken.append(1)
            )
            assert verify_message(received.signed, Reply, MINER.ss58_address) == received.reply
            assert (received.reply.order, received.seconds > 0, taken) == (signed.digest, True, [1])
            assert (tmp_path / "p").read_bytes() == STATE
            assert received.bytes_up > len(STATE)
            assert received.bytes_down > len(STATE)
            await until(lambda: miner.deliveries == 1)

            again = make_order(round=1)
            second = await network.exchange(again, network.sign(again), {}, tmp_path / "p")
            assert second.bytes_down < len(STATE)  # it has all blobs now
            receipt = make_receipt(order, signed.digest)
            stop = Stop(run=order.run, round=0, hotkey=order.hotkey, order=signed.digest)
            assert await network.deliver(order.hotkey, network.sign(receipt))
            assert await network.deliver(order.hotkey, network.sign(stop))
            assert (miner.receipts, miner.stops) == ([receipt], [stop])
            [link] = network.miner_states()
            assert (link.endpoint, link.hotkey, link.batches_done) == ("pull", MINER.ss58_address, 4)

    asyncio.run(main())


def test_the_next_order_comes_while_the_last_payload_goes_up(tmp_path: Path) -> None:
    async def main() -> None:
        order, after = make_order(BIG), make_order(round=1)
        async with (
            validator() as (network, at),
            proxy_to(at.port) as (line, near),
            member(miner := Echo(), replace(at, port=near)),
        ):
            await there(network)
            first = begun(network, order, tmp_path / "a", BIG)
            await until(lambda: line.down > CUT)  # which is what goes up
            line.bytes_per_s = 4e6
            second = begun(network, after, tmp_path / "b")
            await until(lambda: len(miner.orders) == 2)
            assert not first.done()
            line.bytes_per_s = None
            await first
            await second
        assert (tmp_path / "a").read_bytes() == BIG
        assert (tmp_path / "b").read_bytes() == STATE

    asyncio.run(main())


def test_a_refusal_s_fault_is_the_verdict(tmp_path: Path) -> None:
    class Busy(Echo):
        def accept_order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
            raise Refused(409, "another\x1b[2J validator", Fault.BUSY)

    async def main() -> Faulted:
        async with validator() as (network, at), member(Busy(), at):
            await there(network)
            return await fault(network, make_order(), tmp_path / "p")

    faulted = asyncio.run(main())
    assert faulted.fault is Fault.BUSY
    assert "another?[2J validator" in faulted.reason


def test_a_miner_that_lost_the_state_gets_it_again(tmp_path: Path) -> None:
    class Dropping(Echo):
        dropped = False

        async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
            if not self.dropped:
                self.dropped = True
                self.blobs.clear()
                raise Refused(409, "the state is gone", missing=[self.orders[order].update.refs[0]])
            return await super().wait_for_reply(caller, order, wait_s)

    async def main() -> None:
        async with validator() as (network, at), member(Dropping(), at):
            await there(network)
            await begun(network, make_order(), tmp_path / "p")
        assert (tmp_path / "p").read_bytes() == STATE

    asyncio.run(main())


@pytest.mark.parametrize("offset_s", [3600, -3600])
def test_a_clock_that_is_an_hour_off_on_either_side(tmp_path: Path, offset_s: int) -> None:
    async def main() -> None:
        async with validator(clock_offset_s=offset_s) as (network, at), member(Echo(), at):
            await there(network)
            for round in range(2):
                await begun(network, make_order(round=round), tmp_path / "p")

    asyncio.run(main())


# --- what breaks ------------------------------------------------------------------------------------------------------


def test_both_directions_go_on_where_the_connection_broke(tmp_path: Path) -> None:
    async def main() -> None:
        order = make_order(BIG, deadline_s=120)
        async with validator() as (network, at), proxy_to(at.port) as (line, near):
            async with member(miner := Echo(), replace(at, port=near)):
                await there(network)
                line.cut_after = CUT
                received = await begun(network, order, tmp_path / "p", BIG)
                line.cut_after = None
                await until(lambda: miner.deliveries)
            assert (tmp_path / "p").read_bytes() == BIG
            assert line.cuts >= 3  # of 12 MB, cut after each 3 MB, in either direction
            assert line.down < 1.5 * len(BIG)
            assert line.up < 1.5 * len(BIG)
            assert received.bytes_up < 1.5 * len(BIG)

    asyncio.run(main())


def test_a_validator_that_was_restarted_in_mid_upload_gets_the_rest(tmp_path: Path) -> None:
    async def main() -> None:
        port, order = free_port(), make_order(BIG, deadline_s=120)
        async with proxy_to(port) as (line, near), member(miner := Echo(), endpoint(near)):
            async with validator(port) as (network, _):
                await there(network)
                signed = network.sign(order)
                first = asyncio.create_task(network.exchange(order, signed, blobs_of(order, BIG), tmp_path / "p"))
                await until(lambda: miner.orders)
                line.bytes_per_s = 20e6
                await until(lambda: line.down > CUT)
            with pytest.raises(asyncio.CancelledError):
                await first
            held = (tmp_path / "p").stat().st_size
            assert 0 < held < len(BIG)
            line.bytes_per_s, before = None, line.down
            async with validator(port) as (network, _):  # which nobody here told the miner
                await there(network)
                await network.exchange(order, signed, blobs_of(order, BIG), tmp_path / "p")
            assert (tmp_path / "p").read_bytes() == BIG
            assert line.down - before < len(BIG) - held + (1 << 20)
            assert len(miner.orders) == 1

    asyncio.run(main())


def endpoint(port: int) -> Endpoint:
    return Endpoint("127.0.0.1", port, VALIDATOR.ss58_address)


def test_a_file_that_was_something_else_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"?" * 100)

    async def main() -> None:
        async with validator() as (network, at), member(Echo(), at):
            await there(network)
            await begun(network, make_order(), tmp_path / "p")

    asyncio.run(main())
    assert (tmp_path / "p").read_bytes() == STATE


def test_a_miner_that_was_restarted_asks_again(tmp_path: Path) -> None:
    async def main() -> None:
        said: list[str] = []
        async with validator() as (network, at):
            before = Echo()
            before.held.clear()
            async with member(before, at):
                await there(network)
                exchange = begun(network, make_order(deadline_s=120), tmp_path / "p")
                await until(lambda: before.orders)
            async with member(after := Echo(), at, said=said):
                await exchange
            assert len(after.orders) == 1
        assert (tmp_path / "p").read_bytes() == STATE

    asyncio.run(main())


def test_a_miner_that_vanishes_gets_no_more_orders_and_is_silent(tmp_path: Path) -> None:
    async def main() -> Faulted:
        async with validator(away_s=8.0) as (network, at):
            async with member(miner := Echo(), at):
                miner.held.clear()
                await there(network)
                exchange = begun(network, make_order(deadline_s=120), tmp_path / "p")
                await until(lambda: miner.orders)
                assert await network.deliver(MINER.ss58_address, network.sign(make_receipt(make_order(), "0" * 64)))
            await until(lambda: not network.peers())
            assert not exchange.done()
            with pytest.raises(Faulted) as caught:
                await exchange
            assert not await network.deliver(MINER.ss58_address, network.sign(make_receipt(make_order(), "0" * 64)))
            return caught.value

    assert asyncio.run(main()).fault is Fault.SILENT


def test_no_reply_by_the_deadline_is_late_and_noted_when_it_comes(tmp_path: Path) -> None:
    async def main() -> None:
        async with validator() as (network, at), member(miner := Echo(), at):
            miner.held.clear()
            await there(network)
            order = make_order(deadline_s=1.5)
            assert (await fault(network, order, tmp_path / "p")).fault is Fault.LATE
            signed = next(d for d in miner.orders)
            again = network.sign(order)
            assert again.digest == signed
            assert await network.await_late_reply(order, again, 0.1) is None
            late = asyncio.create_task(network.await_late_reply(order, again, 60))
            miner.held.set()
            noted = await late
            assert noted is not None
            assert verify_message(noted, Reply, MINER.ss58_address).order == signed
            assert network.peers() == (MINER.ss58_address,)

    asyncio.run(main())


def test_of_two_processes_under_one_hotkey_one_is_used_and_the_other_told(tmp_path: Path) -> None:
    async def main() -> None:
        said: list[str] = []
        async with validator() as (network, at):
            second = Echo()
            async with member(first := Echo(), at):
                await there(network)
                async with member(second, at, said=said):
                    await until(lambda: said)
                    for round in range(3):
                        await begun(network, make_order(round=round), tmp_path / "p")
                    assert (len(first.orders), len(second.orders)) == (3, 0)
                    assert [line for line in said if "another process is at work under this hotkey" in line] == said
            async with member(second, at, said=said):  # the first is gone
                await begun(network, make_order(round=3, deadline_s=120), tmp_path / "p")
            assert len(second.orders) == 1

    asyncio.run(main())
