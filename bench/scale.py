"""What a miner and round cost the validator, by the number of miners: CPU and memory.

    python -m bench.scale

The real validator's parts (Market, Dendrite, Store: all signed, hashed, synced to disk) in this process, and miners
that compute nothing in a few others (bench/crowd.py), over loopback sockets. Each round a miner gets its order, lacks
the state, gets it, gets the order again, is polled for its reply, gives its payload and takes its receipt.

CPU is this process's, all threads, the kernel's part included, without what decodes and sums the payloads; medians of
rounds. State and payload are 10 KB. Above 128 miners there are no sockets: the miners are in this process too
(EmulatedNetwork), and the time of their methods is subtracted, but not that of their signatures. Peak is that of the
resident set, pages of files included, above what it was before the first round; state and payload are 4 MB.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from bittensor.sp_core import Keypair

from bench import Figure
from bench.crowd import Parrot, miner_key
from bench.transport import forget_peak, memory
from pilot.aggregation import load_aggregator
from pilot.app import cli
from pilot.codec.dense import Dense
from pilot.common.limits import Limits
from pilot.market.round import Market, Network, RoundPolicy
from pilot.ranking import load_ranker
from pilot.simulation.network import EmulatedNetwork
from pilot.simulation.virtual_time import run as run_virtual
from pilot.storage.run_store import RunStore
from pilot.training.learner import Learner
from pilot.transport.client.dendrite import Dendrite, Endpoint
from tasks.optimizer import AdamWConfig
from tasks.quadratic import Quadratic, QuadraticConfig

VALIDATOR = Keypair.create_from_uri("//Validator")
PROCESSES = 4  # for the miners
WORK_S = 0.2
WARM_UP = 3  # rounds
SOCKETS = {16: 40, 64: 16, 128: 10}  # miners: rounds
LOOPBACK = {256: 8, 1024: 4}
SMALL, LARGE = 2560, 1 << 20  # parameters: 10 KB, 4 MB

F = TypeVar("F", bound=Callable[..., Any])


class Meter:
    """CPU seconds of the functions that it was put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: F) -> F:
        def measured(*arguments: Any, **keywords: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds += time.thread_time() - began

        return measured  # type: ignore[return-value]


class MeteredCodec(Dense):
    def __init__(self, meter: Meter) -> None:
        super().__init__(torch.float32)
        self.decode = meter.around(super().decode)  # type: ignore[method-assign]


@contextmanager
def crowd(count: int) -> Iterator[list[int]]:
    """The ports of so many miners, in other processes."""
    each = -(-count // PROCESSES)
    command = [sys.executable, "-m", "bench.crowd"]
    with ExitStack() as stack:
        miners = []
        for first in range(0, count, each):
            size = str(min(each, count - first))
            miners.append(
                subprocess.Popen([*command, str(first), size, str(WORK_S)], stdout=subprocess.PIPE, text=True)
            )
            stack.callback(miners[-1].kill)
        yield [port for miner in miners if miner.stdout for port in json.loads(miner.stdout.readline())]


def make_market(
    folder: Path, network: Network, store: RunStore, dimension: int, decoding: Meter, worker: ThreadPoolExecutor | None
) -> Market:
    task = Quadratic.prepare(QuadraticConfig(dimension=dimension, samples=16), seed=0, cache=folder / "cache")
    optimizer = AdamWConfig()
    return Market(
        RoundPolicy(run="scale", batches=1, deadline_s=120.0, patience=1, codec_up="fp32", codec_down="fp32"),
        task,
        Learner(task, optimizer, torch.device("cpu")),
        network,
        store,
        load_ranker("accepted_work"),
        decoding.around(load_aggregator("mean")),
        lambda name: MeteredCodec(decoding),
        lambda step, units: task.settings(optimizer, step, 1000, 1),
        worker,
    )


async def play(market: Market, rounds: int, miners: int, excluded: Sequence[Meter]) -> list[float]:
    """So many more rounds, whose every reply must be accepted: the CPU of each in ms a miner, but the metered."""
    last, spent, found = market.round + rounds, [time.process_time() - sum(m.seconds for m in excluded)], []
    await market.open_rounds(last)
    while market.in_flight:
        await market.run_round(last)
        spent.append(time.process_time() - sum(m.seconds for m in excluded))
        found.append(1000 * (spent[-1] - spent[-2]) / miners)
        [head] = market.store.committed(market.round - 1)
        if head.metrics["miners"] != miners:
            raise RuntimeError(f"not every reply was accepted: {head.metrics}")
    await market.finish()
    return found


async def over_sockets(folder: Path, ports: Sequence[int], rounds: int, dimension: int) -> tuple[float, float]:
    """CPU in ms a miner and round, and the peak above the base in MB."""
    decoding = Meter()
    endpoints, limits = [Endpoint("127.0.0.1", port) for port in ports], Limits()
    with (
        closing(RunStore.create(folder / "run", {"task": "quadratic"}, keep=2)) as store,
        ThreadPoolExecutor(1, "tensors") as worker,
    ):
        room = partial(store.spool.reserve, limits=limits)
        network = Dendrite(VALIDATOR, endpoints, {}, lambda _: None, "quadratic", print, limits, room)
        market = make_market(folder, network, store, dimension, decoding, worker)
        await network.start()
        try:
            assert await network.wait_for_peers(len(ports), 60) == len(ports)
            cli.settle_memory()  # as validator.py does
            base = forget_peak()
            ms = await play(market, WARM_UP + rounds, len(ports), [decoding])
            return median(ms[WARM_UP:]), (memory("VmHWM") - base) / 1e6
        finally:
            await market.close()
            await network.close()


async def over_loopback(folder: Path, count: int, rounds: int) -> float:
    """CPU in ms a miner and round."""
    decoding, mining = Meter(), Meter()
    keypairs = {key.ss58_address: key for key in map(miner_key, range(count))}
    services = {hotkey: Parrot(hotkey, "quadratic", 0.0) for hotkey in keypairs}
    for service in services.values():
        for method in ("accept_order", "open_blob", "read_payload", "accept_receipt"):
            setattr(service, method, mining.around(getattr(service, method)))
    with closing(RunStore.create(folder / "run", {"task": "quadratic"}, keep=2)) as store:
        network = EmulatedNetwork(VALIDATOR, services, keypairs, latency_s=0.01)
        market = make_market(folder, network, store, SMALL, decoding, None)
        ms = await play(market, 1 + rounds, count, [decoding, mining])
        await market.close()
    return median(ms[1:])


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pilot-bench-", dir=os.environ.get("PILOT_BENCH_DIR")) as name:
        yield Path(name)


def main() -> None:
    torch.set_num_threads(1)
    for miners, rounds in SOCKETS.items():
        with scratch() as folder, crowd(miners) as ports:
            ms, _ = asyncio.run(over_sockets(folder, ports, rounds, SMALL))
        Figure(f"scale.cpu_ms_per_miner_round.{miners}", ms, "ms")
    for miners, rounds in LOOPBACK.items():
        with scratch() as folder:
            ms = run_virtual(over_loopback(folder, miners, rounds))
        Figure(f"scale.cpu_ms_per_miner_round.{miners}", ms, "ms")
    for miners in SOCKETS:
        with scratch() as folder, crowd(miners) as ports:
            _, peak = asyncio.run(over_sockets(folder, ports, 3, LARGE))
        Figure(f"scale.peak_mb.{miners}", peak, "MB")


if __name__ == "__main__":
    main()
