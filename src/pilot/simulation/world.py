"""Run a real marketplace in a simulated world: only the network, the clock and the time that work takes are simulated.

trace ──▶ machines: start miners, stop or kill them, or cut their links, when the trace says so
             │ restore, drop
market ◀──▶ loopback, one link per miner ◀──▶ workers        all under `pilot.simulation.network.run`
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bittensor.sp_core import Keypair

from pilot.aggregation import load_aggregator
from pilot.codec import load_codec
from pilot.common.units import fp32_megabytes
from pilot.market.round import Market
from pilot.market.scheduling import RoundPolicy
from pilot.ranking import load_ranker
from pilot.simulation.costs import CostConfig
from pilot.simulation.link_model import LinkSpec
from pilot.simulation.network import EmulatedNetwork
from pilot.simulation.traces import Ending, Interval
from pilot.storage.miner_store import FileMinerStore
from pilot.storage.run_store import RunStore
from pilot.training.diloco import round_settings
from pilot.training.learner import Learner
from pilot.training.ranges import size
from pilot.worker.worker import Worker
from protocol import MAX_SERVED_BYTES, DataSpec, Hotkey, Receipt, TaskSpec
from tasks import TASKS, Task

CPU = torch.device("cpu")
SNAPSHOT_EVERY = 20  # rounds
UNLIMITED = 1 << 40  # rounds


@dataclass(frozen=True)
class Conditions:
    """The costs, links and endings that hold unless the trace says otherwise."""

    costs: CostConfig
    link: LinkSpec = field(default_factory=LinkSpec)
    ending: Ending = "notice"
    scale: float = 1.0  # how many parameters, and bytes of states and payloads, each one stands for
    wire: tuple[float, float] | None = None  # another scale for the bytes, up and down
    seed: int = 0
    eval_every: int = 0  # rounds; 0: only at the end
    aggregation: str = "median_norm_mean"


@dataclass
class WorldState:
    """The state of the world after a round; sums are since the beginning."""

    time: float
    rounds: int
    up: int  # miners that are up
    available_s: float  # sum of the seconds that miners were up
    computing_s: float  # seconds of these spent on micro-batches
    batches: int  # micro-batches computed
    accepted: int  # micro-batches in the model
    work: int  # samples or tokens in them
    bytes_up: int
    bytes_down: int
    preemptions: int
    faults: dict[str, int]
    loss: float  # the miners' training loss in this round
    evaluation: dict[str, float]  # the model after this round, if it was evaluated

    def utilisation(self, since: WorldState | None = None) -> float:
        """Return the share of the miners' time that they spent on micro-batches."""
        computing, available = (since.computing_s, since.available_s) if since else (0.0, 0.0)
        return (self.computing_s - computing) / max(self.available_s - available, 1e-9)


class Machine:
    """A miner of the trace, through all its intervals."""

    def __init__(self, name: str, intervals: Sequence[Interval], speed: float) -> None:
        self.name, self.intervals, self.speed = name, intervals, speed
        self.keypair = Keypair.create_from_uri(f"//{name}")
        self.hotkey: Hotkey = self.keypair.ss58_address
        self.worker: Worker | None = None  # the running process's worker, connected or not
        self.computing_s = 0.0
        self.batches = 0

    def add_time(self, phase: str, seconds: float) -> None:
        if phase == "batch":
            self.batches += 1
            self.computing_s += seconds

    def available_s(self, now: float) -> float:
        return sum(max(0.0, min(i.end, now) - i.start) for i in self.intervals)

    def up(self, now: float) -> bool:
        return any(i.start <= now < i.end for i in self.intervals)


class World:
    """A simulated marketplace. Make it inside the event loop, and `play` it once."""

    def __init__(
        self,
        folder: Path,
        task: Task,
        optimizer: Any,
        policy: RoundPolicy,
        conditions: Conditions,
        intervals: Sequence[Interval],
        steps: int,
        device: torch.device = CPU,
    ) -> None:
        """Build the market and the machines; the learning rate's schedule ends after `steps` rounds.

        Raises ValueError for data that is too large to be served.
        """
        kind, served = task.spec().name, MAX_SERVED_BYTES >> 20
        if any(ref.bytes > MAX_SERVED_BYTES for ref in task.data_spec.blobs.values()):
            raise ValueError(f"--{kind}.…: a validator serves at most {served} MB of data; use less")
        self.conditions, self.folder, self.device = conditions, folder, device
        intervals_of: dict[str, list[Interval]] = {}
        for interval in sorted(intervals, key=lambda i: i.start):
            intervals_of.setdefault(interval.miner, []).append(interval)
        self.machines = [
            Machine(name, intervals_of[name], conditions.costs.speed(conditions.seed, name))
            for name in sorted(intervals_of)
        ]
        self.store = RunStore.create(folder / "run", {"task": kind}, keep=2)
        keypairs = {machine.hotkey: machine.keypair for machine in self.machines}
        validator = Keypair.create_from_uri("//Validator")
        wire = conditions.wire or conditions.scale
        self.network = EmulatedNetwork(validator, {}, keypairs, seed=conditions.seed, scale=wire)
        learner = Learner(task, optimizer, device, policy.broadcast, policy.codec_down)
        self.costs = conditions.costs.for_codecs(policy.codec_up, policy.codec_down)
        self.state_mb = fp32_megabytes(p.shape for p in learner.parameters.values())
        self.validator_s: dict[str, float] = defaultdict(float)  # the validator's own seconds, by phase
        self.market = Market(
            policy,
            task,
            learner,
            self.network,
            self.store,
            load_ranker("accepted_work"),
            load_aggregator(conditions.aggregation),
            load_codec,
            round_settings(policy.diloco, task, optimizer, steps),
            charge=self.costs.validator.charge(1.0, conditions.scale, self._spent),
        )
        self._totals: Counter[str] = Counter()  # accepted work by miner
        self._faults: Counter[str] = Counter()
        self._preemptions = 0
        self._evaluation: dict[str, float] = {}

    def _spent(self, phase: str, seconds: float) -> None:
        self.validator_s[phase] += seconds

    async def play(self, seconds: float, rounds: int = UNLIMITED) -> AsyncIterator[WorldState]:
        """Play for so many seconds or rounds, and yield the state after each round.

        Raises the error of a market or a miner that failed.
        """
        market = self.market
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(self._follow_trace(machine)) for machine in self.machines]
        loop.call_at(seconds, market.request_stop)
        try:
            await market.open_rounds(rounds)
            while market.in_flight:
                await market.run_round(rounds)
                self._raise_failures(tasks)
                await self._evaluate_and_save(last=market.stopping and not market.in_flight)
                yield self._state()
                if not market.in_flight:
                    await market.open_rounds(rounds)
            await market.finish()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for machine in self.machines:
                self._end_worker(machine)
            await market.close()
            self.store.close()

    async def _evaluate_and_save(self, last: bool) -> None:
        """Evaluate and save snapshots like a validator, while the miners work on the next round."""
        every, rounds = self.conditions.eval_every, self.market.round
        self._evaluation = await self.market.evaluate() if last or (every and rounds % every == 0) else {}
        if rounds % SNAPSHOT_EVERY == 0:
            self.market.save_snapshot(self.store.save_snapshot)

    def _raise_failures(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            if task.done():
                task.result()
        for machine in self.machines:
            if machine.worker is not None and machine.worker.failed.done():
                machine.worker.failed.result()

    def _state(self) -> WorldState:
        """Add the round that was just committed to the sums, and return the state."""
        record = self.store.head()
        assert record is not None
        metrics = record.metrics
        for signed in record.receipts:
            receipt = Receipt.parse(signed.body)
            self._totals["accepted"] += size(receipt.done)
            if receipt.verdict != "ACCEPTED":
                self._faults[receipt.verdict] += 1
        for name in ("work", "bytes_up", "bytes_down"):
            self._totals[name] += int(metrics[name])
        now = asyncio.get_running_loop().time()
        return WorldState(
            time=now,
            rounds=record.round + 1,
            up=sum(machine.up(now) for machine in self.machines),
            available_s=sum(machine.available_s(now) for machine in self.machines),
            computing_s=sum(machine.computing_s for machine in self.machines),
            batches=sum(machine.batches for machine in self.machines),
            accepted=self._totals["accepted"],
            work=self._totals["work"],
            bytes_up=self._totals["bytes_up"],
            bytes_down=self._totals["bytes_down"],
            preemptions=self._preemptions,
            faults=dict(self._faults),
            loss=float(metrics.get("loss", math.nan)),
            evaluation=self._evaluation,
        )

    # --- machines -------------------------------------------------------------------------------------------------

    async def _follow_trace(self, machine: Machine) -> None:
        for interval in machine.intervals:
            await _sleep_until(interval.start)
            if machine.worker is None:
                machine.worker = self._start_worker(machine, interval)
            self.network.restore(machine.hotkey, machine.worker, self._link(interval))
            await _sleep_until(interval.end)
            ending = interval.ending or self.conditions.ending
            self._preemptions += ending != "cut"
            if ending == "notice":
                await machine.worker.leave(self.market.policy.grace_s)
            self.network.drop(machine.hotkey)
            if ending != "cut":
                self._end_worker(machine)

    def _start_worker(self, machine: Machine, interval: Interval) -> Worker:
        """Start a miner with the files that its previous process left."""
        cache = FileMinerStore(self.folder / "miners" / machine.name)
        speed = interval.speed or machine.speed
        return Worker(
            machine.hotkey,
            frozenset(TASKS),
            self.device,
            cache,
            partial(_open_blob, cache),
            lambda line: None,
            asyncio.get_running_loop().time,
            charge=self.costs.charge(speed, self.conditions.scale, machine.add_time),
        )

    def _end_worker(self, machine: Machine) -> None:
        if machine.worker is not None:
            machine.worker.close()
            machine.worker = None

    def _link(self, interval: Interval) -> LinkSpec:
        link = self.conditions.link
        if interval.bandwidth_mbps is not None:
            link = replace(link, up_bps=1e6 * interval.bandwidth_mbps, down_bps=1e6 * interval.bandwidth_mbps)
        if interval.latency_ms is not None:
            link = replace(link, latency_s=interval.latency_ms / 1e3)
        return link


def _open_blob(cache: FileMinerStore, task: TaskSpec, data: DataSpec, name: str) -> Path:
    path = cache.blob(data.blobs[name])
    assert path is not None  # the worker has fetched it
    return path


async def _sleep_until(time: float) -> None:
    await asyncio.sleep(time - asyncio.get_running_loop().time())
