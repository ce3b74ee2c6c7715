"""Simulate days of a marketplace in seconds: play a trace of miners that come and go, in virtual time.

python scripts/simulate.py --make spot                          # eight spot machines, a day, the quadratic task
python scripts/simulate.py --make diurnal --out homes.csv       # only make the trace
python scripts/simulate.py --trace homes.csv --deadline auto --overlap 1 --task gpt2 --measure
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pilot.common import interrupts

PROGRAM = "simulate.py"
if __name__ == "__main__":
    interrupts.catch(PROGRAM)

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from pilot.app import cli
from pilot.common.files import temporary_folder
from pilot.common.paths import naming
from pilot.common.units import fp32_megabytes
from pilot.simulation.flags import STATE_MB, SimulateConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pilot.simulation.traces import Interval
    from pilot.simulation.world import Conditions, World, WorldState
    from tasks import Task

LINES = 24  # rows of the table
HOUR_S = 3600.0
PATIENCE = 1 << 30  # rounds without a good reply, after which a market gives up
MEMORY = Path("/dev/shm")  # keeps files in memory: on a disk the thousands of fsync calls take most of the time


@cli.program(PROGRAM, SimulateConfig)
def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(SimulateConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    with cli.mistakes(PROGRAM):
        config.check()
        intervals = trace_of(config)
        if config.out is not None:
            write(config, config.out, intervals)
            return
        cli.set_threads(config.threads)
    from pilot.storage.run_store import DiskFull

    try:
        with folder_of(config) as folder:
            simulate(config, folder, intervals)
    except DiskFull:
        where = f"--keep {config.keep}" if config.keep else f"{MEMORY}, which holds the run without --keep"
        cli.fail(PROGRAM, f"{where}: the disk is full; free some space, or --keep the run on another disk", code=1)


def trace_of(config: SimulateConfig) -> tuple[Interval, ...]:
    from pilot.simulation.traces import make_trace, read_trace

    if config.trace is not None:
        return read_trace(config.trace)
    intervals = make_trace(config.make, config.miners, HOUR_S * (config.hours or 24), config.seed)
    if not intervals:
        raise ValueError(f"--make {config.make}: no miner is ever up; give more --miners, or more --hours")
    return intervals


def write(config: SimulateConfig, out: Path, intervals: Sequence[Interval]) -> None:
    from pilot.simulation.traces import write_trace

    try:
        write_trace(out, intervals)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write it ({error.strerror or error})") from None
    up_s = sum(i.end - i.start for i in intervals)
    print(f"{out}: {len(intervals)} intervals of {len({i.miner for i in intervals})} miners, ", end="")
    print(f"{up_s / HOUR_S:.1f} hours in all; simulate it with --trace {out}")


@contextmanager
def folder_of(config: SimulateConfig) -> Iterator[Path]:
    if config.keep is not None:
        config.keep.mkdir(parents=True)
        yield config.keep
        return
    with temporary_folder("pilot-simulate-", MEMORY if MEMORY.is_dir() else None) as folder:
        yield folder


def simulate(config: SimulateConfig, folder: Path, intervals: Sequence[Interval]) -> None:
    from pilot.simulation.costs import measure
    from pilot.simulation.virtual_time import run
    from tasks import load_task

    with cli.mistakes(PROGRAM), naming("--cache", config.cache):
        device, cache = cli.pick_device(config.device), config.cache.expanduser()
        task = load_task(config.task).prepare(
            getattr(config, config.task), seed=config.seed, cache=cache, device=device, progress=print
        )
    if config.measure:
        costs = measure(task, config.optimizer_flags, *config.codecs)
        config = replace(config, costs=replace(config.costs, **costs))
    began = time.perf_counter()
    states = run(play(config, folder, task, device, intervals))
    real_s = time.perf_counter() - began
    with naming("--plot", config.plot):
        plot(config.plot, states, task.unit, f"{config.task}: {config.trace or config.make}")
    summary = {**totals(states, task.unit), "real_seconds": round(real_s, 2)}
    print("\n".join(f"{name.replace('_', ' '):36} {value}" for name, value in summary.items()))
    print(f"plot in {config.plot}" + (f", run in {config.keep}" if config.keep else ""))
    print(json.dumps(summary))


async def play(
    config: SimulateConfig, folder: Path, task: Task, device: torch.device, intervals: Sequence[Interval]
) -> list[WorldState]:
    """Print the table as time goes on. Returns the state after each round."""
    from pilot.app.build_validator import link_watch
    from pilot.simulation.world import World

    seconds = HOUR_S * config.hours or max(i.end for i in intervals)
    steps = config.rounds or (math.ceil(seconds / config.round_seconds) if config.round_seconds else 200)
    with cli.mistakes(PROGRAM):
        policy, conditions = replace(config, rounds=steps).policy("simulation", PATIENCE), conditions_of(config, task)
        world = World(folder, task, config.optimizer_flags, policy, conditions, intervals, steps, device)
    world.market.watch = link_watch(config, world.market.learner, world.network.miner_states, print, conditions.scale)
    print("\n".join(introduction(config, world, task)))
    print(f"{'hours':>7} {'up':>5} {'util.':>6} {'MB up':>10} {'MB down':>10} {task.unit:>10} {'loss':>10}  faults")
    states: list[WorldState] = []
    shown: WorldState | None = None
    async for state in world.play(seconds):
        states.append(state)
        if state.time - (shown.time if shown else 0.0) >= seconds / LINES:
            print(line(state, shown), flush=True)
            shown = state
    return states


def conditions_of(config: SimulateConfig, task: Task) -> Conditions:
    from pilot.simulation.world import Conditions

    parameters = task.trainable(task.build_model("cpu", initial=False)).values()
    megabytes = fp32_megabytes(p.shape for p in parameters)
    wanted = config.state_mb or (STATE_MB if config.task == "quadratic" else megabytes)
    return Conditions(
        config.costs,
        config.link.spec(),
        config.ending,
        scale=wanted / megabytes,
        seed=config.seed,
        eval_every=config.eval_every,
        aggregation=config.aggregation,
    )


def introduction(config: SimulateConfig, world: World, task: Task) -> list[str]:
    """Return lines that describe the miners, the model, the links and the costs."""
    from pilot.market.link_budget import Rate

    link, scale, watch = config.link, world.conditions.scale, world.market.watch
    assert watch is not None
    rate = Rate(1e6 * link.up_mbps, 1e6 * link.down_mbps, 2e-3 * link.latency_ms)
    return [
        f"{len(world.machines)} miners of speed {', '.join(f'{m.speed:.2f}' for m in world.machines[:16])}"
        + (", …" if len(world.machines) > 16 else ""),
        f"a model of {scale * world.state_mb:.1f} MB in fp32"
        + (f" (the {config.task}'s {1000 * world.state_mb:.1f} KB, {scale:.0f} times)" if scale != 1 else ""),
        watch.budget.describe(rate, "a link"),
        f"link: {link.up_mbps:g} Mbit/s up, {link.down_mbps:g} down, {link.latency_ms:g} ms one way"
        + (f" and up to {link.jitter_ms:g} more" if link.jitter_ms else "")
        + (f", {link.loss:.1%} lost" if link.loss else ""),
        "costs, measured now:" if config.measure else "costs:",
        *world.costs.table(),
    ]


def line(state: WorldState, before: WorldState | None) -> str:
    """Format a row of the table: what happened since the row before it."""
    past = asdict(before) if before else defaultdict(int)
    up, down, work = (getattr(state, name) - past[name] for name in ("bytes_up", "bytes_down", "work"))
    faults = ", ".join(f"{count} {fault}" for fault, count in sorted(state.faults.items()))
    return (
        f"{state.time / HOUR_S:7.2f} {state.up:5} {state.utilisation(before):6.3f} {up / 1e6:10,.0f} "
        f"{down / 1e6:10,.0f} {work:10,} {state.loss:10.6f}  {faults}"
    )


def plot(path: Path, states: Sequence[WorldState], unit: str, title: str) -> None:
    """Plot miners, utilisation, accepted work and loss over the hours."""
    from pilot.display.plots import Panel, panel_plot

    pairs = list(zip([None, *states[:-1]], states, strict=True))
    work = [(s.work - (b.work if b else 0)) / max(s.time - (b.time if b else 0.0), 1e-9) for b, s in pairs]
    panels = [
        Panel("miners up", [s.up for s in states], steps=True),
        Panel("utilisation of these", [s.utilisation(before) for before, s in pairs]),
        Panel(f"accepted {unit} per second", work),
        Panel("training loss", [s.loss for s in states], from_zero=False),
    ]
    panel_plot(path, [s.time / HOUR_S for s in states], panels, title, "hours")


def totals(states: Sequence[WorldState], unit: str) -> dict[str, float | int | str]:
    """Return the figures of the whole run; the loss is that of the last model."""
    end = states[-1]
    row: dict[str, float | int | str] = {
        "virtual_seconds": round(end.time, 1),
        "rounds": end.rounds,
        "available_miner_seconds": round(end.available_s, 1),
        "utilisation": round(end.utilisation(), 4),
        f"accepted_{unit}": end.work,
        f"{unit}_per_available_miner_second": round(end.work / max(end.available_s, 1e-9), 4),
        "micro_batches_accepted": end.accepted,
        "micro_batches_lost": end.batches - end.accepted,
        "preemptions": end.preemptions,
        "bytes_up": end.bytes_up,
        "bytes_down": end.bytes_down,
    }
    return row | {f"faults_{name}": count for name, count in sorted(end.faults.items())} | end.evaluation


if __name__ == "__main__":
    main()
