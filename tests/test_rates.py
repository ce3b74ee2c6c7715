"""What a miner's line carries, as its validator measures it: meters, real sockets, and the emulated network."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from pilot.interfaces import MinerState
from pilot.simulation.chaos.proxy import proxy_to
from pilot.simulation.link_model import LinkSpec
from pilot.simulation.network import EmulatedNetwork
from pilot.simulation.virtual_time import run
from pilot.transport.client.remote_miner import Meter
from protocol import Hotkey
from tests.echo import MINER, VALIDATOR, Echo, blobs_of, dendrite, make_order, member, served
from tests.test_pull import there, validator

BIG = os.urandom(4 << 20)
SLOW = 8e6  # bytes a second: what the proxy lets through, at most
KEY: Hotkey = MINER.ss58_address


def test_a_meter_takes_the_median_of_the_last_transfers() -> None:
    meter = Meter()
    assert meter.bps == 0
    for seconds in (1.0, 2.0, 100.0):
        meter.add(1e6, seconds)
    assert meter.bps == 8e6 / 2
    for _ in range(Meter.LAST):
        meter.add(1e6, 4.0)
    assert meter.bps == 8e6 / 4


def test_small_transfers_do_not_count_beside_large_ones() -> None:
    meter = Meter()
    meter.add(1e3, 0.1)  # all that is there
    assert meter.bps == 8e4
    for _ in range(3):
        meter.add(1e6, 1.0)
        meter.add(1e3, 0.1)
        meter.add(1e6, 0.0)  # no time is no rate
    assert meter.bps == 8e6


def test_the_emulated_network_measures_what_its_links_are(tmp_path: Path) -> None:
    async def main() -> tuple[MinerState, ...]:
        links = {KEY: LinkSpec(up_bps=20e6, down_bps=100e6, latency_s=0.05)}
        network = EmulatedNetwork(VALIDATOR, {KEY: Echo()}, {KEY: MINER}, links=links, scale=10.0)
        order = make_order(BIG, deadline_s=100)
        assert network.miner_states()[0].up_bps == 0
        await network.exchange(order, network.sign(order), blobs_of(order, BIG), tmp_path / "p")
        return network.miner_states()

    (link,) = run(main())
    assert link.down_bps == pytest.approx(100e6, rel=0.05)
    assert link.up_bps == pytest.approx(20e6, rel=0.05)
    assert link.latency_s == pytest.approx(0.1)


@pytest.mark.parametrize("pulls", [True, False], ids=["pull", "push"])
def test_a_real_line_is_measured(pulls: bool, tmp_path: Path) -> None:
    """On a line that lets so much through: not more than that was measured, whatever a buffer swallows at once."""

    async def main() -> MinerState:
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            if pulls:
                network, at = await enter(validator())
                line, near = await enter(proxy_to(at.port))
                await enter(member(Echo(), replace(at, port=near)))
            else:
                line, near = await enter(proxy_to(await enter(served(Echo()))))
                network = await enter(dendrite(near))
            await there(network)
            line.bytes_per_s = SLOW
            order = make_order(BIG)
            await network.exchange(order, network.sign(order), blobs_of(order, BIG), tmp_path / "p")
            (link,) = network.miner_states()
            return link

    link = asyncio.run(main())
    assert 0 < link.down_bps < 1.5 * 8 * SLOW
    assert 0 < link.up_bps < 1.5 * 8 * SLOW
