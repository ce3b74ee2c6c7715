"""Virtual time, the network inside one process, and the links that it emulates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pilot.interfaces import Faulted
from pilot.simulation.link_model import EmulatedLink, LinkSpec
from pilot.simulation.network import EmulatedNetwork
from pilot.simulation.virtual_time import run
from pilot.transport.auth import verify_message
from protocol import Fault, Reply, Stop, digest
from tests.echo import MALLORY, MINER, STATE, TOKENS, VALIDATOR, Echo, blobs_of, make_order, make_receipt

DAY_S = 86400.0


def test_days_pass_at_once() -> None:
    async def main() -> float:
        await asyncio.sleep(30 * DAY_S)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert run(main()) == pytest.approx(30 * DAY_S, abs=1e-6)
    assert time.monotonic() - began < 10


def test_timers_fire_in_their_exact_order_and_at_their_times() -> None:
    seconds = [7.0, 0.1, 1e6 + 0.1, 3.3, 0.3, 1e6 + 0.2, 0.2, 2 * DAY_S, 1e-3]

    async def main() -> list[tuple[float, float]]:
        fired: list[tuple[float, float]] = []

        async def nap(s: float) -> None:
            await asyncio.sleep(s)
            fired.append((s, asyncio.get_running_loop().time()))

        await asyncio.gather(*map(nap, seconds))
        return fired

    fired = run(main())
    assert [s for s, _ in fired] == sorted(seconds)
    assert all(at == pytest.approx(s, rel=1e-12, abs=1e-9) for s, at in fired)


def test_time_passes_where_doubles_are_coarse() -> None:
    """After 1,000 days a double no longer holds a nanosecond: timers must fire all the same."""

    async def main() -> int:
        await asyncio.sleep(1000 * DAY_S)
        for _ in range(100):
            await asyncio.sleep(1e-9)
        return 1

    assert run(main()) == 1


def test_threads_run_in_turn_and_raise_where_they_are_awaited() -> None:
    async def main() -> list[int]:
        order: list[int] = []
        await asyncio.gather(*(asyncio.to_thread(order.append, n) for n in range(20)))
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return order

    assert run(main()) == list(range(20))


def test_a_deadlock_raises_instead_of_hanging() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="deadlock"):
        run(main())


def test_timeouts_expire_in_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(DAY_S):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(DAY_S)


def network(*services: Echo, latency_s: float = 0.0, bandwidth_bps: float = float("inf")) -> EmulatedNetwork:
    keypairs = {k.ss58_address: k for k in (MINER, MALLORY)}
    return EmulatedNetwork(VALIDATOR, {s.hotkey: s for s in services}, keypairs, latency_s, bandwidth_bps)


def test_an_exchange_pushes_blobs_and_writes_the_payload(tmp_path: Path) -> None:
    async def main() -> None:
        miner = Echo(work_s=60)
        net = network(miner)
        order = make_order(deadline_s=100)
        signed = net.sign(order)
        received = await net.exchange(order, signed, blobs_of(order), tmp_path / "p")
        assert verify_message(received.signed, Reply, MINER.ss58_address) == received.reply
        assert received.bytes_up > len(STATE)
        assert received.bytes_down > len(STATE) + len(TOKENS)
        assert net.now() == pytest.approx(60)
        receipt, stop = (
            make_receipt(order, signed.digest),
            Stop(run="test", round=0, hotkey=miner.hotkey, order="0" * 64),
        )
        assert await net.deliver(miner.hotkey, net.sign(receipt))
        assert await net.deliver(miner.hotkey, net.sign(stop))
        assert miner.receipts == [receipt]
        assert miner.stops == [stop]

    run(main())
    assert (tmp_path / "p").read_bytes() == STATE


def fault(
    tmp_path: Path, play: Callable[[EmulatedNetwork], Coroutine[Any, Any, None]], net: EmulatedNetwork, **order: Any
) -> Fault:
    async def main() -> Fault:
        asked = make_order(**order)
        asyncio.get_running_loop().create_task(play(net))
        with pytest.raises(Faulted) as caught:
            await net.exchange(asked, net.sign(asked), blobs_of(asked), tmp_path / "p")
        return caught.value.fault

    return run(main())


async def nothing(_: EmulatedNetwork) -> None:
    pass


def test_the_deadline_holds_in_virtual_time(tmp_path: Path) -> None:
    assert fault(tmp_path, nothing, network(Echo(work_s=61)), deadline_s=60) is Fault.LATE
    assert fault(tmp_path, nothing, network(Echo(work_s=DAY_S)), deadline_s=DAY_S / 2) is Fault.LATE


def test_bandwidth_and_latency_count(tmp_path: Path) -> None:
    bits = 8 * len(STATE)
    assert fault(tmp_path, nothing, network(Echo(), bandwidth_bps=bits), deadline_s=1.9) is Fault.LATE
    assert fault(tmp_path, nothing, network(Echo(), latency_s=1), deadline_s=3) is Fault.LATE


def test_a_miner_that_goes_in_mid_exchange_is_silent_and_can_return(tmp_path: Path) -> None:
    async def go(net: EmulatedNetwork) -> None:
        await asyncio.sleep(5)
        net.drop(MINER.ss58_address)

    net = network(Echo(work_s=60), Echo(MALLORY.ss58_address))
    assert fault(tmp_path, go, net, deadline_s=100) is Fault.SILENT
    assert net.peers() == (MALLORY.ss58_address,)
    assert fault(tmp_path, nothing, net) is Fault.SILENT
    net.restore(MINER.ss58_address)
    assert net.peers() == tuple(sorted((MINER.ss58_address, MALLORY.ss58_address)))


def test_waiting_for_a_peer() -> None:
    async def main() -> None:
        net = network(Echo())
        net.drop(MINER.ss58_address)
        assert not await net.wait_for_peer(10)
        assert net.now() == pytest.approx(10)
        asyncio.get_running_loop().call_later(5, net.restore, MINER.ss58_address)
        assert await net.wait_for_peer(10)
        assert net.now() == pytest.approx(15)
        net.drop(MINER.ss58_address)
        assert not await net.deliver(MINER.ss58_address, net.sign(make_receipt(make_order(), digest("order", b""))))

    run(main())


def test_two_runs_are_the_same(tmp_path: Path) -> None:
    async def main(folder: Path) -> list[tuple[float, str, int]]:
        folder.mkdir()  # what is left of a payload would be taken up
        events = []

        async def one(net: EmulatedNetwork, miner: Echo, round: int) -> None:
            order = make_order(round=round, hotkey=miner.hotkey, deadline_s=30)
            try:
                got = await net.exchange(order, net.sign(order), blobs_of(order), folder / f"{round}{miner.hotkey}")
                events.append((net.now(), miner.hotkey, got.reply.round))
            except Faulted as faulted:
                events.append((net.now(), f"{miner.hotkey}{faulted.fault}", round))

        miners = [Echo(work_s=7.3), Echo(MALLORY.ss58_address, work_s=3.1)]
        net = network(*miners, latency_s=0.013, bandwidth_bps=1e6)
        asyncio.get_running_loop().call_later(20, net.drop, MINER.ss58_address)
        await asyncio.gather(*(one(net, miner, round) for round in range(5) for miner in miners))
        return events

    first = run(main(tmp_path / "first"))
    assert len(first) == 10
    assert run(main(tmp_path / "second")) == first


# --- coming and going -------------------------------------------------------------------------------------------------


def test_a_change_is_heard_of_by_who_waits() -> None:
    async def main() -> list[float]:
        net, times = network(Echo()), []

        async def watch() -> None:
            for _ in range(3):
                await net.wait_for_change()
                times.append(net.now())

        watching = asyncio.create_task(watch())
        for pause, change in ((5, net.drop), (2, net.restore), (1, net.drop)):
            await asyncio.sleep(pause)
            change(MINER.ss58_address)
        await watching
        return times

    assert run(main()) == [5, 7, 8]


def test_a_miner_that_comes_back_as_another_process_ends_the_exchange_with_the_old_one(tmp_path: Path) -> None:
    fresh = Echo()

    async def replace(net: EmulatedNetwork) -> None:
        await asyncio.sleep(5)
        net.drop(MINER.ss58_address)
        net.restore(MINER.ss58_address, fresh)

    net = network(Echo(work_s=60))
    assert fault(tmp_path, replace, net, deadline_s=100) is Fault.SILENT

    async def again() -> None:
        order = make_order()
        await net.exchange(order, net.sign(order), blobs_of(order), tmp_path / "p")

    run(again())
    assert fresh.deliveries == 1


def test_the_same_process_behind_a_line_that_was_cut_goes_on_with_its_next_order(tmp_path: Path) -> None:
    miner = Echo()
    net = network(miner)
    net.drop(MINER.ss58_address)
    net.restore(MINER.ss58_address, link=LinkSpec(latency_s=2.0))

    async def main() -> float:
        order = make_order(deadline_s=60)
        await net.exchange(order, net.sign(order), blobs_of(order), tmp_path / "p")
        return net.now()

    assert run(main()) == pytest.approx(6 * 2 * 2.0)  # order, two blobs, order, reply, payload: there and back


def test_a_late_reply_is_the_miners_word_without_its_payload(tmp_path: Path) -> None:
    async def main() -> None:
        miner = Echo(work_s=60)
        net = network(miner)
        order = make_order(deadline_s=30)
        signed = net.sign(order)
        with pytest.raises(Faulted):
            await net.exchange(order, signed, blobs_of(order), tmp_path / "p")
        assert await net.await_late_reply(order, signed, 20) is None
        answer = await net.await_late_reply(order, signed, 100)
        assert answer is not None
        assert verify_message(answer, Reply, MINER.ss58_address).order == signed.digest
        assert miner.deliveries == 0
        other = make_order(round=7)
        assert await net.await_late_reply(other, net.sign(other), 100) is None  # the miner never heard of it
        net.drop(MINER.ss58_address)
        assert await net.await_late_reply(order, signed, 100) is None

    run(main())
    assert not (tmp_path / "p").exists()


# --- links ------------------------------------------------------------------------------------------------------------


def arrivals(spec: LinkSpec, *transfers: tuple[float, str, float], seed: int = 0) -> list[float]:
    """When each (start, direction, bytes) has arrived."""

    async def main() -> list[float]:
        link = EmulatedLink(spec, seed, "link")

        async def one(start: float, direction: Any, size: float) -> float:
            await asyncio.sleep(start)
            await link.travel(direction, size)
            return asyncio.get_running_loop().time()

        return await asyncio.gather(*(one(*transfer) for transfer in transfers))

    return run(main())


BYTE_A_SECOND = LinkSpec(up_bps=8, down_bps=8)


@pytest.mark.parametrize(
    ("transfers", "expected"),
    [
        ([(0, "up", 10)], [10]),
        ([(0, "up", 10), (0, "up", 10)], [20, 20]),
        ([(0, "up", 10), (0, "down", 10)], [10, 10]),
        ([(0, "up", 10), (5, "up", 10)], [15, 20]),  # 5 alone, 5 more in 10 s, the other then alone
        ([(0, "up", 10), (4, "up", 1), (20, "up", 3)], [11, 6, 23]),
        ([(0, "up", 0), (0, "up", 3)], [0, 3]),
    ],
)
def test_transfers_in_one_direction_share_its_bandwidth(
    transfers: list[tuple[float, str, float]], expected: list[float]
) -> None:
    assert arrivals(BYTE_A_SECOND, *transfers) == pytest.approx(expected)


def test_a_transfer_that_is_broken_off_leaves_its_share_to_the_others() -> None:
    async def main() -> float:
        link = EmulatedLink(BYTE_A_SECOND)
        broken = asyncio.create_task(link.travel("up", 1000))
        asyncio.get_running_loop().call_later(4, broken.cancel)
        await link.travel("up", 10)  # 2 until then, 8 alone
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(12)


@pytest.mark.parametrize(("size", "at"), [(1, 1), (2, 2), (3, 13), (10, 20), (11, 30 + 1), (12, 30 + 2)])
def test_nothing_moves_in_a_pause(size: float, at: float) -> None:
    pauses = ((2.0, 12.0), (20.0, 30.0))
    spec = LinkSpec(up_bps=8, pauses=pauses)
    assert arrivals(spec, (0, "up", size)) == pytest.approx([at])
    assert arrivals(LinkSpec(pauses=pauses), (5, "up", size), (15, "down", size)) == pytest.approx([12, 15])


def test_jitter_and_loss_cost_what_they_say_and_the_same_each_time() -> None:
    spec = LinkSpec(up_bps=8, latency_s=1.0, jitter_s=0.5, loss=0.25, timeout_s=3.0)
    messages = [(1000.0 * n, "up", 0.0) for n in range(2000)]
    times = arrivals(spec, *messages)
    taken = [time - start for time, (start, _, _) in zip(times, messages, strict=True)]
    assert min(taken) >= 1.0
    mean = sum(taken) / len(taken)
    assert mean == pytest.approx(1.0 + 0.25 + 3.0 * 0.25 / 0.75, abs=0.15)  # repeated 1/3 times on average
    assert times == arrivals(spec, *messages)
    assert times != arrivals(spec, *messages, seed=1)
    [bulk] = arrivals(LinkSpec(up_bps=8, loss=0.25, timeout_s=0.0), (0, "up", 300))
    assert bulk == pytest.approx(400)


@pytest.mark.parametrize(
    "wrong",
    [
        {"up_bps": 0.0},
        {"down_bps": float("nan")},
        {"latency_s": -1.0},
        {"loss": 1.0},
        {"pauses": ((3.0, 2.0),)},
        {"pauses": ((0.0, 5.0), (4.0, 6.0))},
    ],
)
def test_no_such_link(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"link|pauses"):
        LinkSpec(**wrong)


@pytest.mark.parametrize(("scale", "up", "down"), [(100, 100, 100), ((50.0, 150.0), 50, 150)])
def test_states_and_payloads_count_for_as_much_as_they_stand_for(
    scale: float | tuple[float, float], up: int, down: int, tmp_path: Path
) -> None:
    async def main() -> None:
        links = {MINER.ss58_address: LinkSpec(up_bps=8 * len(STATE), down_bps=8 * len(STATE))}
        net = EmulatedNetwork(
            VALIDATOR, {MINER.ss58_address: Echo()}, {MINER.ss58_address: MINER}, links=links, scale=scale
        )
        order = make_order(deadline_s=1000)
        received = await net.exchange(order, net.sign(order), blobs_of(order), tmp_path / "p")
        assert up * len(STATE) < received.bytes_up < (up + 1) * len(STATE)
        assert down * len(STATE) < received.bytes_down < (down + 1) * len(STATE)
        assert net.now() == pytest.approx(200, rel=0.01)
        assert received.seconds == net.now()

    run(main())
    assert (tmp_path / "p").read_bytes() == STATE
