"""A marketplace in an emulated world: the real market, store, miners and task; only network, clock and costs are not.

trace ──▶ machines: each starts a fresh miner, tells it to end (or kills it, or cuts its line), and so on
             │ restore, drop
market ◀──▶ loopback, a link a miner ◀──▶ workers            all under `pilot.simulation.network.run`
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
from pilot.simulation.network import Loopback
from pilot.simulation.traces import Ending, Interval
from pilot.storage.miner_store import FileMinerStore
from pilot.storage.run_store import RunStore
from pilot.training.diloco import round_settings
from pilot.training.learner import Learner
from pilot.training.ranges import size
from pilot.worker.worker import Worker
from protocol import MAX_SERVED_BYTES, DataSpec, Hotkey, Receipt
from tasks import TASKS, Task
from tasks.tokens import Tokens

CPU = torch.device("cpu")
SNAPSHOT_EVERY = 20  # rounds; payloads older than two snapshots are deleted
FOR_EVER = 1 << 40  # rounds: a world ends by its time


@dataclass(frozen=True)
class Conditions:
    """What holds where the trace says nothing."""

    costs: CostConfig
    link: LinkSpec = field(default_factory=LinkSpec)
    ending: Ending = "notice"
    scale: float = 1.0  # what a value of the model counts for, and a byte of state or payload
    wire: tuple[float, float] | None = None  # what these bytes count for instead, up and down
    seed: int = 0
    eval_every: int = 0  # rounds; 0: only in the end
    aggregation: str = "median_norm_mean"


@dataclass
class Moment:
    """How things stand after a round; sums are since the beginning."""

    time: float
    rounds: int
    up: int  # miners
    available_s: float  # seconds of miners being up
    computing_s: float  # of them computing micro-batches
    batches: int  # micro-batches computed
    accepted: int  # and in the model
    work: int  # samples or tokens in them
    bytes_up: int
    bytes_down: int
    preemptions: int
    faults: dict[str, int]
    loss: float  # as the miners saw it in this round
    evaluation: dict[str, float]  # of the model after this round, where it was evaluated

    def utilisation(self, since: Moment | None = None) -> float:
        """Seconds of computing in a second of being up."""
        computing, available = (since.computing_s, since.available_s) if since else (0.0, 0.0)
        return (self.computing_s - computing) / max(self.available_s - available, 1e-9)


class Machine:
    """One miner of the trace, through all its lives."""

    def __init__(self, name: str, intervals: Sequence[Interval], speed: float) -> None:
        self.name, self.intervals, self.speed = name, intervals, speed
        self.keypair = Keypair.create_from_uri(f"//{name}")
        self.hotkey: Hotkey = self.keypair.ss58_address
        self.worker: Worker | None = None  # of the process that is alive, with or without a line
        self.computing_s = 0.0
        self.batches = 0

    def spent(self, phase: str, seconds: float) -> None:
        if phase == "batch":
            self.batches += 1
            self.computing_s += seconds

    def available_s(self, now: float) -> float:
        return sum(max(0.0, min(i.end, now) - i.start) for i in self.intervals)

    def up(self, now: float) -> bool:
        return any(i.start <= now < i.end for i in self.intervals)


class World:
    """Make it inside the loop, then `play` it, once."""

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
        """`steps` is the length of the learning rate's schedule. Raises ValueError for data that cannot be served."""
        kind, served = task.spec().name, MAX_SERVED_BYTES >> 20
        if task.data_spec.tokens.bytes > MAX_SERVED_BYTES:
            raise ValueError(f"--{kind}.…: more than {served} MB of data, which no validator hands over; take less")
        self.conditions, self.folder, self.device = conditions, folder, device
        lives: dict[str, list[Interval]] = {}
        for interval in sorted(intervals, key=lambda i: i.start):
            lives.setdefault(interval.miner, []).append(interval)
        self.machines = [
            Machine(name, lives[name], conditions.costs.speed(conditions.seed, name)) for name in sorted(lives)
        ]
        self.store = RunStore.create(folder / "run", {"task": kind}, keep=2)
        keypairs = {machine.hotkey: machine.keypair for machine in self.machines}
        validator = Keypair.create_from_uri("//Validator")
        wire = conditions.wire or conditions.scale
        self.network = Loopback(validator, {}, keypairs, seed=conditions.seed, scale=wire)
        learner = Learner(task, optimizer, device, policy.broadcast, policy.codec_down)
        self.costs = conditions.costs.settled(policy.codec_up, policy.codec_down)
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
        self._totals: Counter[str] = Counter()  # of accepted work
        self._faults: Counter[str] = Counter()
        self._preemptions = 0
        self._evaluation: dict[str, float] = {}

    def _spent(self, phase: str, seconds: float) -> None:
        self.validator_s[phase] += seconds

    async def play(self, seconds: float, rounds: int = FOR_EVER) -> AsyncIterator[Moment]:
        """So many seconds of rounds, or so many rounds, a moment a round. Raises what failed at the market or at a
        miner."""
        market = self.market
        loop = asyncio.get_running_loop()
        lives = [asyncio.create_task(self._live(machine)) for machine in self.machines]
        loop.call_at(seconds, market.request_stop)
        try:
            await market.open_rounds(rounds)
            while market.in_flight:
                await market.run_round(rounds)
                self._raise_failures(lives)
                await self._look_after(last=market.stopping and not market.in_flight)
                yield self._moment()
                if not market.in_flight:
                    await market.open_rounds(rounds)
            await market.finish()
        finally:
            for life in lives:
                life.cancel()
            await asyncio.gather(*lives, return_exceptions=True)
            for machine in self.machines:
                self._end_worker(machine)
            await market.close()
            self.store.close()

    async def _look_after(self, last: bool) -> None:
        """As a validator does, with the miners at work on the next round already."""
        every, rounds = self.conditions.eval_every, self.market.round
        self._evaluation = await self.market.evaluate() if last or (every and rounds % every == 0) else {}
        if rounds % SNAPSHOT_EVERY == 0:
            self.market.save_snapshot(self.store.save_snapshot)

    def _raise_failures(self, lives: Sequence[asyncio.Task[None]]) -> None:
        for life in lives:
            if life.done():
                life.result()
        for machine in self.machines:
            if machine.worker is not None and machine.worker.failed.done():
                machine.worker.failed.result()

    def _moment(self) -> Moment:
        """Counts the round that was just committed."""
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
        return Moment(
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

    async def _live(self, machine: Machine) -> None:
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
        """A new process: it has what the one before it left on the disk."""
        cache = FileMinerStore(self.folder / "miners" / machine.name)
        speed = interval.speed or machine.speed
        return Worker(
            machine.hotkey,
            frozenset(TASKS),
            self.device,
            cache,
            partial(_find_tokens, cache),
            lambda line: None,
            asyncio.get_running_loop().time,
            charge=self.costs.charge(speed, self.conditions.scale, machine.spent),
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


def _find_tokens(cache: FileMinerStore, spec: DataSpec) -> Tokens:
    path = cache.blob(spec.tokens)
    assert path is not None  # the worker has asked for it
    return Tokens.open(path)


async def _sleep_until(time: float) -> None:
    await asyncio.sleep(time - asyncio.get_running_loop().time())
