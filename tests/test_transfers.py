"""Bulk over bad lines: what was sent is not sent again, what is too slow is cut off, and the whole is verified."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pilot.common.limits import Limits
from pilot.interfaces import Faulted
from pilot.simulation.chaos.proxy import proxy_to
from protocol import Digest, Fault, Hotkey, Reply
from tests.echo import Echo, blobs_of, dendrite, make_order, served

BIG = os.urandom(12 << 20)
CUT = 3 << 20
IMPATIENT = replace(Limits(), rate_s=0.4, message_s=0.4, connect_s=0.4, away_s=0.8)


def test_both_directions_go_on_where_the_connection_broke(tmp_path: Path) -> None:
    async def main() -> None:
        order = make_order(BIG)
        async with served(miner := Echo()) as far, proxy_to(far) as (line, near), dendrite(near) as network:
            line.cut_after = CUT
            assert await network.wait_for_peer(5)
            received = await network.exchange(order, network.sign(order), blobs_of(order, BIG), tmp_path / "p")
        assert (tmp_path / "p").read_bytes() == BIG
        assert line.cuts >= 6  # of 12 MB, cut after each 3 MB, in either direction
        assert line.down < 1.5 * len(BIG)
        assert line.up < 1.5 * len(BIG)
        assert received.bytes_up < 1.5 * len(BIG)
        assert miner.deliveries >= 1

    asyncio.run(main())


def test_a_validator_that_was_stopped_in_mid_fetch_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        order = make_order(BIG)
        async with served(Echo()) as far, proxy_to(far) as (line, near):
            async with dendrite(near) as network:
                assert await network.wait_for_peer(5)
                signed = network.sign(order)
                line.bytes_per_s = 40e6
                task = asyncio.create_task(network.exchange(order, signed, blobs_of(order, BIG), tmp_path / "p"))
                while line.up < CUT:
                    await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.wait({task})
            there = (tmp_path / "p").stat().st_size
            assert 0 < there < len(BIG)
            before, line.bytes_per_s = line.up, None
            async with dendrite(near) as network:  # another process would come by another connection, just so
                assert await network.wait_for_peer(5)
                await network.exchange(order, signed, blobs_of(order, BIG), tmp_path / "p")
        assert (tmp_path / "p").read_bytes() == BIG
        assert line.up - before < len(BIG) - there + (1 << 20)

    asyncio.run(main())


@pytest.mark.parametrize("left", [b"?" * CUT, b"?" * len(BIG), b"?" * (len(BIG) + 1)], ids=["part", "same", "longer"])
def test_a_file_that_was_something_else_is_overwritten(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "p").write_bytes(left)

    async def main() -> None:
        order = make_order(BIG)
        async with served(Echo()) as port, dendrite(port) as network:
            assert await network.wait_for_peer(5)
            await network.exchange(order, network.sign(order), blobs_of(order, BIG), tmp_path / "p")

    asyncio.run(main())
    assert (tmp_path / "p").read_bytes() == BIG


def test_a_miner_that_was_restarted_in_mid_fetch_goes_on_under_its_hotkey(tmp_path: Path) -> None:
    async def main() -> None:
        order = make_order(BIG)
        async with served(Echo()) as far, proxy_to(far) as (line, near), dendrite(near) as network:
            assert await network.wait_for_peer(5)
            line.bytes_per_s = 40e6
            task = asyncio.create_task(
                network.exchange(order, network.sign(order), blobs_of(order, BIG), tmp_path / "p")
            )
            while line.up < CUT:
                await asyncio.sleep(0.01)
            async with served(Echo()) as elsewhere:  # it knows nothing, and computes the same again
                line.port, line.cut_after, line.bytes_per_s = elsewhere, None, None
                before = line.up
                line.hang_up()
                await task
        assert (tmp_path / "p").read_bytes() == BIG
        assert line.up - before < len(BIG) - CUT + (1 << 20)

    asyncio.run(main())


def test_a_payload_of_a_byte_a_second_is_cut_off(tmp_path: Path) -> None:
    async def main() -> Faulted:
        order = make_order(BIG)
        async with served(Echo()) as far, proxy_to(far) as (line, near), dendrite(near, limits=IMPATIENT) as network:
            assert await network.wait_for_peer(5)

            async def slow_down() -> None:
                while not line.up > CUT:
                    await asyncio.sleep(0.001)
                line.bytes_per_s = 10

            slowing = asyncio.create_task(slow_down())
            with pytest.raises(Faulted) as caught:
                await network.exchange(order, network.sign(order), blobs_of(order, BIG), tmp_path / "p")
            await slowing
        assert not (tmp_path / "p").exists()
        return caught.value

    faulted = asyncio.run(main())
    assert faulted.fault is Fault.SILENT


def test_a_blob_of_a_byte_a_second_is_cut_off_and_does_not_stand_in_the_way(tmp_path: Path) -> None:
    async def main() -> None:
        order = make_order(BIG)
        async with (
            served(miner := Echo(), limits=IMPATIENT) as far,
            proxy_to(far) as (line, near),
            dendrite(near, away_s=30) as network,
        ):
            assert await network.wait_for_peer(5)
            line.bytes_per_s = 5e5
            task = asyncio.create_task(
                network.exchange(order, network.sign(order), blobs_of(order, BIG), tmp_path / "p")
            )
            while line.down < 100_000:
                await asyncio.sleep(0.01)
            line.bytes_per_s = 10
            while not sum(writer.held for writer in miner.writers.values()):
                await asyncio.sleep(0.01)  # the miner has hung up on what trickles in, and keeps what it got
            line.bytes_per_s = None
            await task
        assert (tmp_path / "p").read_bytes() == BIG

    asyncio.run(main())


def test_a_newer_transfer_takes_over_from_a_dead_one(tmp_path: Path) -> None:
    """A half-open connection: the miner still waits for its bytes when the validator comes by another."""

    async def main() -> None:
        order = make_order(BIG)
        async with served(Echo()) as far, proxy_to(far) as (line, near), dendrite(near) as network:
            assert await network.wait_for_peer(5)
            line.bytes_per_s = 5e6
            dead = asyncio.create_task(
                network.exchange(order, network.sign(order), blobs_of(order, BIG), tmp_path / "dead")
            )
            while line.down < 1 << 20:
                await asyncio.sleep(0.01)
            line.bytes_per_s = 1e-3  # nothing comes through any more, and nobody hangs up
            async with dendrite(far) as second:
                assert await second.wait_for_peer(5)
                await second.exchange(order, second.sign(order), blobs_of(order, BIG), tmp_path / "p")
            dead.cancel()
            await asyncio.wait({dead})
        assert (tmp_path / "p").read_bytes() == BIG

    asyncio.run(main())


def test_a_payload_that_changes_between_two_parts_is_never_taken(tmp_path: Path) -> None:
    class Changing(Echo):
        async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
            reply = await super().wait_for_reply(caller, order, wait_s)
            self.blobs[self.orders[order].update.refs[0].digest] = BIG[:CUT] + bytes(len(BIG) - CUT)
            return reply

    async def main() -> Faulted:
        order = make_order(BIG)
        async with served(Changing()) as far, proxy_to(far) as (line, near), dendrite(near, away_s=1.0) as network:
            line.cut_after = 2 * CUT
            assert await network.wait_for_peer(5)
            with pytest.raises(Faulted, match="payload") as caught:
                await network.exchange(order, network.sign(order), blobs_of(order, BIG), tmp_path / "p")
        assert not (tmp_path / "p").exists()
        return caught.value

    assert asyncio.run(main()).fault is Fault.SILENT
