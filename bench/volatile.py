"""Measure what a marketplace gets out of volatile machines, in virtual time. Takes some minutes.

    python -m bench.volatile         # figures as JSON lines on stdout, details on stderr

The market, miners and files are the real ones; each link has 100 Mbit/s and 50 ms one way, 42 MB of state go down and
42 MB of gradient up a round, uncompressed; micro-batches take a second at a miner of speed 1
(pilot.simulation.costs). So the figures are the same on every machine. Utilisation is the share of the miners' time
spent on micro-batches, after two rounds.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench import Figure
from pilot.market.scheduling import RoundPolicy
from pilot.simulation.costs import CostConfig
from pilot.simulation.link_model import LinkSpec
from pilot.simulation.traces import HOUR_S, Interval, make_trace
from pilot.simulation.virtual_time import run
from pilot.simulation.world import Conditions, World, WorldState
from tasks.optimizer import AdamWConfig
from tasks.quadratic import Quadratic, QuadraticConfig

MINERS = 9
STATE_BYTES = 42e6
LINK = LinkSpec(up_bps=100e6, down_bps=100e6, latency_s=0.05)
COSTS = CostConfig(batch=1.0, evaluate=0.0)
MINUTES = RoundPolicy("volatile", 4, 300.0, 1 << 30, "fp32", "fp32", round_s=60.0)  # as with --round-seconds 60
FIXED = RoundPolicy("volatile", 4, 300.0, 1 << 30, "fp32", "fp32")  # the defaults: four micro-batches per miner
SLOW = CostConfig(batch=10.0, evaluate=0.0)  # speeds come from the trace
WARM_UP = 2  # rounds
UP_S, AWAY_S = 600.0, 300.0
TRACES = {"spot": 4.0, "diurnal": 24.0, "flaky": 4.0}  # hours
MEMORY = Path("/dev/shm")


def play(
    policy: RoundPolicy, intervals: Sequence[Interval], seconds: float, costs: CostConfig = COSTS
) -> list[WorldState]:
    """A state a round."""

    async def main(folder: Path) -> list[WorldState]:
        task = Quadratic.prepare(QuadraticConfig(), seed=0, cache=folder)
        scale = STATE_BYTES / (4 * QuadraticConfig().dimension)
        world = World(folder, task, AdamWConfig(), policy, Conditions(costs, LINK, scale=scale), intervals, 200)
        return [state async for state in world.play(seconds)]

    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        states = run(main(Path(name)))
    say(f"  {states[-1]}")
    return states


def utilisation(states: Sequence[WorldState]) -> float:
    """Return the utilisation without the first two rounds and the last, which is cut short."""
    return states[-2].utilisation(states[WARM_UP - 1])


def preempted(seconds: float) -> list[Interval]:
    """Preempt another third of the miners every ten minutes, each with notice, for five minutes."""
    rng = random.Random(0)
    intervals = []
    for number in range(MINERS):
        start, taken = 0.0, UP_S * (1 + number % 3) + rng.uniform(0, 60)
        while start < seconds:
            intervals.append(Interval(f"m{number + 1}", start, min(taken, seconds), ending="notice"))
            start, taken = taken + AWAY_S, taken + 3 * UP_S
    return intervals


def accepted_per_hour(states: Sequence[WorldState]) -> float:
    return states[-1].work / states[-1].time * HOUR_S


def main() -> None:
    torch.set_num_threads(1)
    steady = make_trace("steady", MINERS, 2 * HOUR_S, seed=0)  # longer than the run, so that no miner leaves at its end
    say("rounds of a minute, all miners up")
    undisturbed = play(MINUTES, steady, HOUR_S)
    Figure("round.utilisation", utilisation(undisturbed), "of the time")
    say("the same with --overlap 1")
    Figure("round.utilisation_overlap", utilisation(play(replace(MINUTES, overlap=1), steady, HOUR_S)), "of the time")

    say("a third of the miners preempted every ten minutes, five minutes away")
    taken = play(MINUTES, preempted(2 * HOUR_S), HOUR_S)
    ours, peer = (m[-1].work / m[-1].available_s for m in (taken, undisturbed))
    Figure("round.accepted_preempted", ours / peer, "of the undisturbed", "undisturbed, samples/s", peer, ours / peer)
    lost = (taken[-1].batches - taken[-1].accepted) / taken[-1].preemptions
    Figure("round.lost_batches_per_preemption", lost, "micro-batches")

    sums = {"auto": 0.0, "fixed": 0.0}
    for kind, hours in TRACES.items():
        trace = make_trace(kind, MINERS, hours * HOUR_S, seed=0)
        for name in sums:
            per_hour = accepted_per_hour(play(replace(FIXED, auto=name == "auto"), trace, hours * HOUR_S, SLOW))
            say(f"{kind}, deadline {name}: {per_hour:,.0f} samples/h")
            sums[name] += per_hour / len(TRACES)
    auto, fixed = sums["auto"], sums["fixed"]
    Figure("deadline.auto_vs_fixed", auto, "samples/h", "fixed deadline", fixed, auto / fixed)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
