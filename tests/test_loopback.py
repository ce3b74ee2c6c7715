"""Virtual time, and the network inside one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from protocol import Fault, Reply, Stop, digest
from tests.echo import MALLORY, MINER, STATE, TOKENS, VALIDATOR, Echo, blobs_of, make_order, make_receipt
from transport.auth import unseal
from transport.loopback import Loopback, run
from values import Faulted

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


def network(*services: Echo, latency_s: float = 0.0, bandwidth_bps: float = float("inf")) -> Loopback:
    keypairs = {k.ss58_address: k for k in (MINER, MALLORY)}
    return Loopback(VALIDATOR, {s.hotkey: s for s in services}, keypairs, latency_s, bandwidth_bps)


def test_an_exchange_pushes_blobs_and_writes_the_payload(tmp_path: Path) -> None:
    async def main() -> None:
        miner = Echo(work_s=60)
        net = network(miner)
        order = make_order(deadline_s=100)
        signed = net.seal(order)
        received = await net.exchange(order, signed, blobs_of(order), tmp_path / "p")
        assert unseal(received.signed, Reply, MINER.ss58_address) == received.reply
        assert received.bytes_up > len(STATE)
        assert received.bytes_down > len(STATE) + len(TOKENS)
        assert net.now() == pytest.approx(60)
        receipt, stop = (
            make_receipt(order, signed.digest),
            Stop(run="test", round=0, hotkey=miner.hotkey, order="0" * 64),
        )
        assert await net.tell(miner.hotkey, net.seal(receipt))
        assert await net.tell(miner.hotkey, net.seal(stop))
        assert miner.receipts == [receipt]
        assert miner.stops == [stop]

    run(main())
    assert (tmp_path / "p").read_bytes() == STATE


def fault(tmp_path: Path, play: Callable[[Loopback], Coroutine[Any, Any, None]], net: Loopback, **order: Any) -> Fault:
    async def main() -> Fault:
        asked = make_order(**order)
        asyncio.get_running_loop().create_task(play(net))
        with pytest.raises(Faulted) as caught:
            await net.exchange(asked, net.seal(asked), blobs_of(asked), tmp_path / "p")
        return caught.value.fault

    return run(main())


async def nothing(_: Loopback) -> None:
    pass


def test_the_deadline_holds_in_virtual_time(tmp_path: Path) -> None:
    assert fault(tmp_path, nothing, network(Echo(work_s=61)), deadline_s=60) is Fault.LATE
    assert fault(tmp_path, nothing, network(Echo(work_s=DAY_S)), deadline_s=DAY_S / 2) is Fault.LATE


def test_bandwidth_and_latency_count(tmp_path: Path) -> None:
    bits = 8 * len(STATE)
    assert fault(tmp_path, nothing, network(Echo(), bandwidth_bps=bits), deadline_s=1.9) is Fault.LATE
    assert fault(tmp_path, nothing, network(Echo(), latency_s=1), deadline_s=3) is Fault.LATE


def test_a_miner_that_goes_in_mid_exchange_is_silent_and_can_return(tmp_path: Path) -> None:
    async def go(net: Loopback) -> None:
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
        assert not await net.tell(MINER.ss58_address, net.seal(make_receipt(make_order(), digest("order", b""))))

    run(main())


def test_two_runs_are_the_same(tmp_path: Path) -> None:
    async def main() -> list[tuple[float, str, int]]:
        events = []

        async def one(net: Loopback, miner: Echo, round: int) -> None:
            order = make_order(round=round, hotkey=miner.hotkey, deadline_s=30)
            try:
                got = await net.exchange(order, net.seal(order), blobs_of(order), tmp_path / f"{round}{miner.hotkey}")
                events.append((net.now(), miner.hotkey, got.reply.round))
            except Faulted as faulted:
                events.append((net.now(), f"{miner.hotkey}{faulted.fault}", round))

        miners = [Echo(work_s=7.3), Echo(MALLORY.ss58_address, work_s=3.1)]
        net = network(*miners, latency_s=0.013, bandwidth_bps=1e6)
        asyncio.get_running_loop().call_later(20, net.drop, MINER.ss58_address)
        await asyncio.gather(*(one(net, miner, round) for round in range(5) for miner in miners))
        return events

    first = run(main())
    assert len(first) == 10
    assert run(main()) == first
