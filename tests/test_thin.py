"""Test thin links in the simulated world: bytes sent with deltas and small codecs, and codecs that links choose."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from pilot.aggregation import load_aggregator
from pilot.app.build_validator import link_watch
from pilot.app.training_flags import CodecConfig, RoundConfig
from pilot.codec import bits, load_codec
from pilot.interfaces import RoundRecord
from pilot.market.round import Market
from pilot.ranking import load_ranker
from pilot.simulation.costs import CostConfig
from pilot.simulation.link_model import LinkSpec
from pilot.simulation.network import EmulatedNetwork
from pilot.simulation.traces import Interval
from pilot.simulation.virtual_time import run
from pilot.simulation.world import Conditions, World, WorldState
from pilot.storage.run_store import RunStore
from pilot.training.diloco import round_settings
from pilot.training.learner import Learner
from protocol import Order
from tasks.optimizer import AdamWConfig
from tasks.quadratic import Quadratic, QuadraticConfig
from tests.echo import VALIDATOR

torch.set_num_threads(1)
MINERS = 3
PARAMETERS = 124e6  # that the small model stands for
SMALL = QuadraticConfig(dimension=1 << 14, samples=64)
FLAGS = RoundConfig(task="quadratic", round_seconds=60.0, rounds=50, batches=4)
LINK = LinkSpec(up_bps=100e6, down_bps=100e6, latency_s=0.05)
COSTS = CostConfig(batch=2.0, spread=0.1, evaluate=0.0)


def play(
    folder: Path, flags: RoundConfig, seconds: float, link: LinkSpec = LINK
) -> tuple[list[WorldState], list[RoundRecord], list[str]]:
    """WorldStates, records, and what was said of the links."""
    said: list[str] = []
    scale = PARAMETERS / SMALL.dimension

    async def main() -> list[WorldState]:
        task = Quadratic.prepare(SMALL, seed=0, cache=folder / "cache")
        trace = [Interval(f"m{n}", 0.0, 1e6) for n in range(MINERS)]
        conditions = Conditions(COSTS, link, scale=scale)
        world = World(folder, task, AdamWConfig(), flags.policy("thin", 10), conditions, trace, flags.rounds)
        world.market.watch = link_watch(flags, world.market.learner, world.network.miner_states, said.append, scale)
        return [state async for state in world.play(seconds)]

    states = run(main())
    store = RunStore.open(folder / "run", keep=2)
    records = list(store.committed(0))
    store.close()
    return states, records, said


def orders(folder: Path, round: int) -> list[Order]:
    store = RunStore.open(folder / "run", keep=2)
    found = [Order.parse(signed.body) for signed in store.orders(round)]
    store.close()
    return found


def replayed(folder: Path, flags: RoundConfig) -> tuple[Market, RoundRecord]:
    """A market of a new process, from the run's records alone, and the last of these."""
    task = Quadratic.prepare(SMALL, seed=0, cache=folder / "cache")
    store = RunStore.open(folder / "run", keep=2)
    policy = flags.policy("thin", 10)
    learner = Learner(task, AdamWConfig(), torch.device("cpu"), policy.broadcast, policy.codec_down)

    async def main() -> Market:
        market = Market(
            *(policy, task, learner, EmulatedNetwork(VALIDATOR, {}, {}), store, load_ranker("accepted_work")),
            *(load_aggregator("median_norm_mean"), load_codec),
            round_settings(policy.diloco, task, AdamWConfig(), flags.rounds),
        )
        market.watch = link_watch(flags, learner, list, lambda line: None)
        await market.replay(0)
        return market

    market = asyncio.run(main())
    head = store.head()
    assert head is not None
    store.close()
    return market, head


@pytest.mark.parametrize("overlap", [0, 1])
def test_links_are_measured_and_a_restart_makes_the_same_versions(overlap: Literal[0, 1], tmp_path: Path) -> None:
    flags = replace(FLAGS, overlap=overlap)
    _, records, _ = play(tmp_path, flags, 600.0)
    assert len(records) >= 8
    assert {(r.codec_up, r.codec_down) for r in records} == {("ternary-rc", "2bit")}
    assert float(records[-1].metrics["link_up_mbps"]) == pytest.approx(100, rel=0.1)
    for record in records[:-1]:
        sent = orders(tmp_path, record.round)
        assert {(o.codec_up, o.codec_down) for o in sent} == {("ternary-rc", "2bit")}
    market, head = replayed(tmp_path, flags)
    assert market.learner.version == head.version


def test_deltas_and_small_codecs_leave_the_link_idle(tmp_path: Path) -> None:
    states, records, said = play(tmp_path, FLAGS, 600.0)
    rounds = MINERS * (records[-2].round - 1)
    up = sum(int(r.metrics["bytes_up"]) for r in records[2:-1]) / rounds
    down = sum(int(r.metrics["bytes_down"]) for r in records[2:-1]) / rounds
    assert up == pytest.approx(
        PARAMETERS * 1.725 / 8, rel=0.03
    )  # ternary-rc on a vector, which has no columns: blocks of 128
    assert down == pytest.approx(PARAMETERS * bits("2bit") / 8, rel=0.03)
    assert float(records[-1].metrics["utilisation_expected"]) > 0.88
    assert states[-2].utilisation(states[1]) > 0.8
    assert not said


def test_a_line_that_is_too_thin_is_said_once_with_what_would_help(tmp_path: Path) -> None:
    flags = replace(FLAGS, codec=CodecConfig(up="int8", down="2bit"), deadline=900.0)
    _, records, said = play(tmp_path, flags, 900.0, replace(LINK, up_bps=30e6))
    assert len(records) > 2
    (line,) = said
    assert line.startswith("communication takes ")
    assert "; --codec.up " in line
    assert "--codec.down" not in line


def test_diloco_in_the_emulated_world(tmp_path: Path) -> None:
    flags = replace(FLAGS, mode="diloco", tau=100, batches=1, warmup_sync=0.0, rounds=10)
    states, records, _ = play(tmp_path, flags, 600.0)
    assert {r.metrics["codec_up"] for r in records} == {"2bit"}
    assert all(order.inner_steps is not None for order in orders(tmp_path, 3))
    assert not states[-1].faults
    assert states[-1].accepted > 100
    assert states[-2].utilisation(states[1]) > 0.8
    market, head = replayed(tmp_path, flags)
    assert market.learner.version == head.version
