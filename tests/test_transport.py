"""The axon and the dendrite over real sockets on loopback."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import pytest

from pilot.interfaces import Faulted, Refused
from pilot.transport.auth import verify_message
from pilot.transport.client.dendrite import Dendrite, Endpoint, parse_endpoint
from pilot.transport.server.axon import Axon
from protocol import Digest, Fault, Hotkey, Order, Reply, Status, Stop
from tests.echo import (
    MALLORY,
    MINER,
    STATE,
    TOKENS,
    VALIDATOR,
    Echo,
    blobs_of,
    dendrite,
    make_order,
    make_receipt,
    open_guard,
    served,
    serving,
    until,
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


async def fault(network: Dendrite, order: Order, path: Path, state: bytes = STATE) -> Faulted:
    with pytest.raises(Faulted) as caught:
        await network.exchange(order, network.sign(order), blobs_of(order, state), path)
    return caught.value


# --- an exchange ------------------------------------------------------------------------------------------------------


def test_an_order_pushes_its_blobs_once_and_brings_back_the_payload(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(miner := Echo()) as port, dendrite(port) as network:
            assert await network.wait_for_peer(5)
            assert network.peers() == (MINER.ss58_address,)
            order = make_order()
            signed = network.sign(order)
            first = await network.exchange(order, signed, blobs_of(order), tmp_path / "p")
            assert verify_message(first.signed, Reply, MINER.ss58_address) == first.reply
            assert first.reply.order == signed.digest
            assert (tmp_path / "p").read_bytes() == STATE
            assert first.bytes_up > len(STATE)
            assert first.bytes_down > len(STATE) + len(TOKENS)

            again = await network.exchange(order, signed, {}, tmp_path / "p")  # the miner has all blobs now
            assert again.bytes_down < len(STATE)
            receipt = make_receipt(order, signed.digest)
            stop = Stop(run=order.run, round=0, hotkey=order.hotkey, order=signed.digest)
            assert await network.deliver(order.hotkey, network.sign(receipt))
            assert await network.deliver(order.hotkey, network.sign(stop))
            assert (miner.receipts, miner.stops) == ([receipt], [stop])

    asyncio.run(main())


def test_twenty_megabytes_each_way_to_two_miners_at_once(tmp_path: Path) -> None:
    state = bytes(range(251)) * 80_000 + b"tail"

    async def main() -> None:
        other = Echo(MALLORY.ss58_address)
        async with served(Echo()) as a, served(other, MALLORY) as b, dendrite(a, b) as network:
            assert await network.wait_for_peers(2, 5) == 2
            orders = [make_order(state, hotkey=hotkey) for hotkey in network.peers()]
            await asyncio.gather(
                *(network.exchange(o, network.sign(o), blobs_of(o, state), tmp_path / o.hotkey) for o in orders)
            )
            assert [(tmp_path / o.hotkey).read_bytes() == state for o in orders] == [True, True]

    asyncio.run(main())


def test_a_long_poll_is_asked_again_until_the_work_is_done(tmp_path: Path) -> None:
    class Impatient(Echo):
        asked = 0

        async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
            self.asked += 1
            assert wait_s <= 20
            return await super().wait_for_reply(caller, order, wait_s) if self.asked > 3 else None

    async def main() -> None:
        async with served(miner := Impatient()) as port, dendrite(port) as network:
            await network.wait_for_peer(5)
            order = make_order()
            await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "p")
            assert miner.asked == 4

    asyncio.run(main())


def test_a_miner_restarted_in_mid_exchange_gets_its_order_again(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        order = make_order()
        async with dendrite(port) as network:
            before = Echo()
            before.held.clear()
            async with served(before, port=port):
                await network.wait_for_peer(5)
                task = asyncio.create_task(
                    network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "p")
                )
                await until(lambda: before.orders)
            async with served(after := Echo(), port=port):
                received = await task
            assert received.reply.round == order.round
            assert len(after.orders) == 1
            assert (tmp_path / "p").read_bytes() == STATE

    asyncio.run(main())


@pytest.mark.parametrize("offset_s", [3600, -3600])
def test_a_clock_that_is_an_hour_off_costs_one_refusal(tmp_path: Path, offset_s: int) -> None:
    async def main() -> None:
        def clock_ns() -> int:
            return time.time_ns() + offset_s * 10**9

        axon = Axon(Echo(), MINER, open_guard(), "127.0.0.1", 0, clock_ns=clock_ns)
        async with serving(axon) as port, dendrite(port) as network:
            await network.wait_for_peer(5)
            for round in range(2):
                order = make_order(round=round)
                await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "p")
            assert axon.refused[401] == 1

    asyncio.run(main())


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
        async with served(Dropping()) as port, dendrite(port) as network:
            await network.wait_for_peer(5)
            order = make_order()
            await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "p")
            assert (tmp_path / "p").read_bytes() == STATE

    asyncio.run(main())


def test_a_miner_s_own_bug_is_logged_there_and_hidden_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Echo):
        def accept_order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
            raise RuntimeError("a secret path")

    async def main() -> None:
        async with served(Broken()) as port, dendrite(port, away_s=0.1) as network:
            await network.wait_for_peer(5)
            faulted = await fault(network, make_order(), tmp_path / "p")
            assert faulted.fault is Fault.SILENT
            assert "secret" not in faulted.reason

    asyncio.run(main())
    assert "a secret path" in caplog.text
    assert "Traceback" in caplog.text


def test_no_reply_by_the_deadline_is_late(tmp_path: Path) -> None:
    async def main() -> None:
        miner = Echo()
        miner.held.clear()
        async with served(miner) as port, dendrite(port) as network:
            await network.wait_for_peer(5)
            assert (await fault(network, make_order(deadline_s=1.0), tmp_path / "p")).fault is Fault.LATE
            assert network.peers() == (MINER.ss58_address,)

    asyncio.run(main())


def test_a_miner_that_went_away_is_silent_and_is_used_when_it_returns(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        async with dendrite(port, away_s=0.3) as network:
            async with served(Echo(), port=port):
                assert await network.wait_for_peer(5)
            assert (await fault(network, make_order(), tmp_path / "p")).fault is Fault.SILENT
            assert network.peers() == ()
            assert not await network.deliver(MINER.ss58_address, network.sign(make_receipt(make_order(), "0" * 64)))
            assert not await network.wait_for_peer(0.1)
            async with served(Echo(), port=port):
                assert await network.wait_for_peer(5)

    asyncio.run(main())


@pytest.mark.parametrize(("away_s", "deadline_s"), [(0.2, 600.0), (600.0, 0.2)])
def test_nobody_there_is_silent(away_s: float, deadline_s: float, tmp_path: Path) -> None:
    async def main() -> None:
        async with dendrite(free_port(), away_s=away_s) as network:
            assert not await network.wait_for_peer(0.1)
            assert (await fault(network, make_order(deadline_s=deadline_s), tmp_path / "p")).fault is Fault.SILENT

    asyncio.run(main())


def test_a_miner_that_accepts_connections_and_says_nothing_is_silent(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        async with dendrite(port) as network:
            async with served(Echo(), port=port):
                await network.wait_for_peer(5)
            connections = []
            server = await asyncio.start_server(lambda _, writer: connections.append(writer), "127.0.0.1", port)
            assert (await fault(network, make_order(deadline_s=0.5), tmp_path / "p")).fault is Fault.SILENT
            assert connections
            for writer in connections:
                writer.close()
            server.close()

    asyncio.run(main())


def test_a_refusal_s_fault_is_the_verdict(tmp_path: Path) -> None:
    class Busy(Echo):
        def accept_order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
            raise Refused(409, "another\x1b[2J validator", Fault.BUSY)

    async def main() -> None:
        async with served(Busy()) as port, dendrite(port) as network:
            await network.wait_for_peer(5)
            faulted = await fault(network, make_order(), tmp_path / "p")
            assert faulted.fault is Fault.BUSY
            assert "another?[2J validator" in faulted.reason  # nothing of a peer's reaches a terminal

    asyncio.run(main())


def test_a_disk_that_fills_up_costs_the_reply_and_is_said(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    said: list[str] = []

    async def main() -> None:
        async with served(Echo()) as port, dendrite(port, said=said) as network:
            await network.wait_for_peer(5)
            order = make_order()
            with pytest.raises(Faulted, match="disk is full") as faulted:
                await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "full")
            assert faulted.value.fault is Fault.VALIDATOR_FAILED
            assert not (tmp_path / "full").is_symlink()  # what came of it is cleared away
            await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "p")

    asyncio.run(main())
    assert len(said) == 1
    assert MINER.ss58_address in said[0]


def test_a_spool_that_cannot_be_written_is_our_fault(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(Echo()) as port, dendrite(port) as network:
            await network.wait_for_peer(5)
            order = make_order()
            with pytest.raises(FileNotFoundError):
                await network.exchange(order, network.sign(order), blobs_of(order), tmp_path / "no" / "folder")

    asyncio.run(main())


# --- who is there -----------------------------------------------------------------------------------------------------


def test_first_contact_pins_and_another_hotkey_is_refused_once() -> None:
    async def main() -> None:
        port = free_port()
        pins: dict[str, str] = {}
        said: list[str] = []

        def network(pinned: dict[str, str]) -> Dendrite:
            return Dendrite(
                VALIDATOR, [parse_endpoint(str(port))], pinned, pins.update, "echo", said.append, hello_interval_s=0.02
            )

        first = network({})
        await first.start()
        async with served(Echo(), port=port):
            assert await first.wait_for_peer(5)
        await first.close()
        assert pins == {f"127.0.0.1:{port}": MINER.ss58_address}

        second = network(pins)
        await second.start()
        async with served(Echo(MALLORY.ss58_address), MALLORY, port):
            await until(lambda: said)
            assert not await second.wait_for_peer(0.2)
        assert len(said) == 1
        assert MALLORY.ss58_address in said[0]
        assert MINER.ss58_address in said[0]
        async with served(Echo(), port=port):
            assert await second.wait_for_peer(5)
        await second.close()

    asyncio.run(main())


def test_one_miner_at_two_endpoints_counts_once() -> None:
    async def main() -> None:
        said: list[str] = []
        async with served(Echo()) as a, served(Echo()) as b, dendrite(a, b, said=said) as network:
            await until(lambda: said)
            assert await network.wait_for_peers(2, 0.2) == 1
            assert len(said) == 1
            assert "the same miner" in said[0]

    asyncio.run(main())


def test_a_miner_that_does_not_do_the_task_is_said_once() -> None:
    async def main() -> None:
        said: list[str] = []
        async with served(Echo(tasks=("other",))) as port, dendrite(port, said=said) as network:
            await until(lambda: said)
            assert not await network.wait_for_peer(0.2)
            assert len(said) == 1
            assert "--tasks echo" in said[0]
            assert f"127.0.0.1:{port}" in said[0]

    asyncio.run(main())


def test_a_failure_of_ours_while_tending_surfaces(tmp_path: Path) -> None:
    async def main() -> None:
        def full(_: dict[str, str]) -> None:
            raise OSError("no space left")

        async with served(Echo()) as port:
            network = Dendrite(VALIDATOR, [Endpoint("127.0.0.1", port)], {}, full, "echo", print)
            await network.start()
            with pytest.raises(OSError, match="no space left"):
                await network.wait_for_peer(5)
            with pytest.raises(OSError, match="no space left"):
                await network.exchange(make_order(), network.sign(make_order()), {}, tmp_path / "p")
            await network.close()

    asyncio.run(main())


# --- what a user may write wrong --------------------------------------------------------------------------------------


def test_endpoints() -> None:
    ss58 = MINER.ss58_address
    assert parse_endpoint("8091") == Endpoint("127.0.0.1", 8091)
    assert parse_endpoint("localhost:8091") == Endpoint("localhost", 8091)
    assert parse_endpoint("[::1]:8091") == Endpoint("[::1]", 8091)
    assert parse_endpoint(f"10.0.0.7:8092@{ss58}") == Endpoint("10.0.0.7", 8092, ss58)
    assert parse_endpoint(f"[fd00::7]:8092@{ss58}") == Endpoint("[fd00::7]", 8092, ss58)
    assert str(parse_endpoint("8091")) == "127.0.0.1:8091"


@pytest.mark.parametrize(
    "text", ["", "0", "65536", "x", "80 91", "127.0.0.1:", ":8091", "-1", "8091@", "8091@5Grw", "²"]
)
def test_endpoints_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--axons ") as caught:
        parse_endpoint(text)
    assert "\n" not in str(caught.value)


def test_off_loopback_the_hotkey_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"--axons host:8092: .*write host:8092@<the miner's ss58 address>"):
        parse_endpoint("host:8092")


def test_a_busy_port_names_the_flag() -> None:
    async def main() -> None:
        async with served(Echo()) as port:
            with pytest.raises(ValueError, match=f"--axon.port {port}: already in use"):
                await Axon(Echo(), MINER, open_guard(), "127.0.0.1", port).start()

    asyncio.run(main())


def test_an_address_of_another_machine_names_the_flag() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match=r"--axon\.ip 203\.0\.113\.1: "):
            await Axon(Echo(), MINER, open_guard(), "203.0.113.1", 0).start()

    asyncio.run(main())
