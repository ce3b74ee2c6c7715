"""Test the simulated world: a real market and real miners of the quadratic task, on traces in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilot.codec import BITS, known_codecs
from pilot.codec import COSTS as CODEC_COSTS
from pilot.market.scheduling import RoundPolicy
from pilot.simulation.costs import CostConfig, measure
from pilot.simulation.link_model import LinkSpec
from pilot.simulation.traces import HOUR_S, Interval, make_trace
from pilot.simulation.virtual_time import run
from pilot.simulation.world import Conditions, World, WorldState
from pilot.storage.run_store import RunStore
from pilot.training.ranges import Cursor, merge, size
from protocol import Range, Receipt
from tasks.optimizer import AdamWConfig
from tasks.quadratic import Quadratic, QuadraticConfig

torch.set_num_threads(1)
POLICY = RoundPolicy("simulated", 4, 300.0, 1 << 30, "fp32", "fp32", round_s=60.0)
COSTS = CostConfig(batch=2.0, spread=0.3, evaluate=0.0)
LINK = LinkSpec(up_bps=100e6, down_bps=100e6, latency_s=0.05)
SCALE = 4000.0  # 41 MB of state
STEADY = [Interval(f"m{n}", 0.0, 1e6) for n in range(3)]


def play(
    folder: Path,
    intervals: Sequence[Interval],
    seconds: float,
    costs: CostConfig = COSTS,
    ending: Any = "notice",
    eval_every: int = 0,
    link: LinkSpec = LINK,
    **policy: Any,
) -> list[WorldState]:
    async def main() -> list[WorldState]:
        task = Quadratic.prepare(QuadraticConfig(), seed=0, cache=folder / "cache")
        conditions = Conditions(costs, link, ending, SCALE, eval_every=eval_every)
        world = World(folder, task, AdamWConfig(), replace(POLICY, **policy), conditions, intervals, 50)
        return [state async for state in world.play(seconds)]

    return run(main())


def accepted(folder: Path) -> list[Range]:
    store = RunStore.open(folder / "run", keep=2)
    done = [r for record in store.committed(0) for s in record.receipts for r in Receipt.parse(s.body).done]
    head = store.head()
    assert head is not None
    left = Cursor.loads(head.cursor)
    store.close()
    assert size(done) == sum(r.stop - r.start for r in merge(done))  # each index once
    assert merge([*done, *left.returned]) == (Range(0, left.next),)  # and none is lost
    return done


def test_computing_and_transfers_take_the_time_that_the_costs_say(tmp_path: Path) -> None:
    states = play(tmp_path, STEADY, 630.0)
    end = states[-1]
    assert 10 <= end.rounds <= 12
    assert end.accepted == end.batches == size(accepted(tmp_path))
    assert end.work == 8 * end.accepted
    assert 0.8 < end.utilisation(states[1]) < 1 - 2 * 3.3 / 60  # 41 MB each way take 3.3 s of each minute
    speeds = [COSTS.speed(0, f"m{n}") for n in range(3)]
    assert end.computing_s == pytest.approx(end.batches * 2.0 * 3 / sum(speeds), rel=0.05)
    assert states[-2].bytes_up == pytest.approx(3 * states[-2].rounds * 41e6, rel=0.01)
    assert end.evaluation["val_loss"] < 0.9 * states[0].loss
    assert (end.preemptions, end.faults) == (0, {})


def test_two_plays_are_the_same(tmp_path: Path) -> None:
    trace = make_trace("flaky", 3, 1200.0, seed=3)
    link = replace(LINK, jitter_s=0.1, loss=0.05)
    first = play(tmp_path / "a", trace, 1200.0, ending="cut", eval_every=3, link=link)
    second = play(tmp_path / "b", trace, 1200.0, ending="cut", eval_every=3, link=link)
    assert repr(first) == repr(second)  # as text, where NaN is NaN
    assert any(m.evaluation for m in first[:-1])


def test_with_overlap_miners_compute_all_the_time(tmp_path: Path) -> None:
    states = play(tmp_path, STEADY, 600.0, overlap=1)
    assert states[-2].utilisation(states[1]) > 0.97
    accepted(tmp_path)


def test_a_miner_with_notice_hands_over_what_it_has_done(tmp_path: Path) -> None:
    trace = [Interval("m0", 0.0, 1e6)]
    for start in (0.0, 250.0, 500.0):
        trace += [Interval("m1", start, start + 137.0), Interval("m2", start + 40.0, start + 181.0)]
    states = play(tmp_path, trace, 930.0)
    end = states[-1]
    assert end.preemptions == 6
    assert end.batches - end.accepted <= end.preemptions  # at most one a preemption
    assert not end.faults
    accepted(tmp_path)


def test_a_killed_miner_loses_only_its_round(tmp_path: Path) -> None:
    trace = [Interval("m0", 0.0, 1e6), Interval("m1", 0.0, 130.0, ending="kill"), Interval("m1", 400.0, 1e6)]
    end = play(tmp_path, trace, 700.0)[-1]
    assert end.preemptions == 1
    assert end.faults == {"SILENT": 1}
    lost = end.batches - end.accepted
    assert 1 <= lost <= 15  # what a round's first ten seconds hold, or a bit more
    accepted(tmp_path)


def test_a_miner_works_on_while_its_link_is_cut(tmp_path: Path) -> None:
    trace = [Interval("m0", 0.0, 1e6), Interval("m1", 0.0, 100.0, ending="cut"), Interval("m1", 150.0, 1e6)]
    end = play(tmp_path, trace, 400.0)[-1]
    assert end.preemptions == 0
    assert end.faults == {"SILENT": 1}
    accepted(tmp_path)


def test_hours_without_miners_do_not_end_the_run(tmp_path: Path) -> None:
    trace = [Interval("m0", 0.0, 100.0), Interval("m0", 3 * HOUR_S, 3 * HOUR_S + 500.0)]
    states = play(tmp_path, trace, 4 * HOUR_S)
    assert states[-1].time == pytest.approx(4 * HOUR_S, abs=30)
    assert states[-1].accepted > 200
    accepted(tmp_path)


def test_a_trace_names_speeds_and_links(tmp_path: Path) -> None:
    slow = Interval("slow", 0.0, 1e6, speed=0.5, bandwidth_mbps=20.0, latency_ms=500.0)
    end = play(tmp_path, [slow], 600.0)[-1]
    assert end.computing_s == pytest.approx(4.0 * end.batches)
    assert 0.3 < end.utilisation() < 1 - 2 * 16.4 / 60


def test_an_error_in_a_miner_ends_the_simulation(tmp_path: Path) -> None:
    async def main() -> None:
        task = Quadratic.prepare(QuadraticConfig(), seed=0, cache=tmp_path / "cache")
        world = World(tmp_path, task, AdamWConfig(), POLICY, Conditions(COSTS, LINK), STEADY, 50)

        def sabotage() -> None:
            worker = world.machines[0].worker
            assert worker is not None
            worker.replica.blobs = None  # type: ignore[assignment]

        asyncio.get_running_loop().call_at(90.0, sabotage)
        async for _ in world.play(HOUR_S):
            pass

    with pytest.raises((AttributeError, TypeError)):
        run(main())


def test_costs_are_charged_to_the_virtual_clock() -> None:
    spent: list[tuple[str, float]] = []

    async def main() -> float:
        costs = CostConfig(batch=3.0, load=0.5, evaluate=7.0)
        charge = costs.charge(2.0, 100.0, lambda phase, seconds: spent.append((phase, seconds)))
        for phase, amount in (("batch", 4.0), ("load", 0.01), ("evaluate", 1.0)):
            await charge(phase, amount)
        broken = asyncio.create_task(charge("batch", 1.0))
        await asyncio.sleep(1.0)
        broken.cancel()
        await asyncio.gather(broken, return_exceptions=True)
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(6.0 + 0.5 + 7.0 + 1.0)
    assert spent == [("batch", 6.0), ("load", 0.5), ("evaluate", 7.0), ("batch", 1.0)]


def test_measure_returns_every_cost(tmp_path: Path) -> None:
    task = Quadratic.prepare(QuadraticConfig(), seed=0, cache=tmp_path)
    measured = measure(task, AdamWConfig(), "fp32", "bf16")
    assumed = {"spread", "measure", "score"}
    assert {*assumed, *measured} == set(CostConfig.__dataclass_fields__)
    assert all(seconds > 0 for seconds in measured.values())
    assert replace(CostConfig(), **measured).batch < 1.0


@pytest.mark.parametrize("wrong", [{"batch": 0.0}, {"load": -1.0}, {"step": float("nan")}, {"spread": float("inf")}])
def test_impossible_costs_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"--costs.{next(iter(wrong))}"):
        CostConfig(**wrong)


def test_costs_follow_the_codecs_unless_given() -> None:
    costs = CostConfig(verify=0.5).for_codecs("ternary-rc", "2bit")
    assert costs.verify == 0.5
    for seconds in (costs.load, costs.encode, costs.broadcast, costs.aggregate):
        assert seconds is not None
        assert seconds > 0
    assert costs.validator.encode == costs.broadcast != costs.encode
    assert CODEC_COSTS.keys() == BITS.keys() == set(known_codecs())
