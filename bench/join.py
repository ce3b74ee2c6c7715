"""Measure joining at round 1,000: the bytes until a newcomer has the model, and the seconds until it has worked on it.

    python -m bench.join

The 1,000 versions are made as by a validator, with 2-bit deltas of 10.6 million parameters on a random walk. A miner
that has only its data then gets an order for one micro-batch over loopback sockets, and a second one on the same
version. The difference is the cost of joining, which includes building the model and checking its digest. The peer is a
history without snapshots: the first state and all deltas.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from bittensor.sp_core import Keypair

from bench import Figure
from bench.roundtrip import save_model
from bench.scale import scratch
from pilot.common.limits import Limits
from pilot.storage.miner_store import FileMinerStore
from pilot.training.learner import Learner
from pilot.transport.auth import Guard
from pilot.transport.client.dendrite import Dendrite, Endpoint
from pilot.transport.server.axon import Axon
from pilot.worker.worker import Worker
from protocol import DataSpec, Order, Range, TaskSpec
from tasks import Task, load_task
from tasks.gpt2 import GPT2Config
from tasks.optimizer import AdamWConfig

ROUNDS = 1000
CODEC = "2bit"
VALIDATOR, MINER = (Keypair.create_from_uri(name) for name in ("//Validator", "//Miner"))


def prepare(folder: Path) -> Task:
    text = folder / "text.txt"
    text.write_text("the validator owns the model. " * 2000)
    config = GPT2Config(
        model=str(save_model(folder / "model")), text=str(text), tokenizer="byte", batch_size=1, eval_sequences=1
    )
    return load_task("gpt2").prepare(config, seed=0, cache=folder / "cache", device=torch.device("cpu"), progress=say)


def grow(learner: Learner) -> int:
    """Make 1,000 versions, and return the bytes of the first state and of all deltas."""
    steps = {n: 1e-3 * torch.randn(p.shape) for n, p in learner.parameters.items()}
    total = sum(step.bytes for step in learner.update.steps)
    for round in range(ROUNDS):
        with torch.no_grad():
            for name, p in learner.parameters.items():
                p.add_(steps[name].roll(round), alpha=(-1) ** round)  # as good as random steps, and cheaper
        learner.advance()
        total += learner.update.steps[-1].bytes
    return total


def order(task: Task, learner: Learner, round: int) -> Order:
    return Order(
        run="join",
        round=round,
        hotkey=MINER.ss58_address,
        version=learner.version,
        update=learner.update,
        state_digest=learner.state_digest(),
        task=task.spec(),
        data=task.data_spec,
        ranges=(Range(round, round + 1),),
        deadline_s=600.0,
        staleness=0,
        codec_up="fp32",
        codec_down=CODEC,
    )


def open_blob(cache: FileMinerStore, task: TaskSpec, data: DataSpec, name: str) -> Path:
    path = cache.blob(data.blobs[name])
    assert path is not None
    return path


async def join(folder: Path, task: Task, learner: Learner) -> Sequence[tuple[int, float]]:
    """Return bytes down and seconds of two orders."""
    cache = FileMinerStore(folder / "miner")
    worker = Worker(
        MINER.ss58_address, frozenset(["gpt2"]), torch.device("cpu"), cache, partial(open_blob, cache), lambda _: None
    )
    axon = Axon(worker, MINER, Guard(frozenset(), None, lambda _: None), "127.0.0.1", 0, None)
    endpoint = Endpoint("127.0.0.1", await axon.start())
    network = Dendrite(VALIDATOR, [endpoint], {}, lambda _: None, "gpt2", say, Limits())
    await network.start()
    found = []
    try:
        await network.wait_for_peer(60)
        writer = cache.store(task.data_spec.blobs["tokens"])
        writer.write(task.blobs()[task.data_digest])
        writer.commit()
        for round in range(2):
            request = order(task, learner, round)  # the second on the same version
            began = time.perf_counter()
            received = await network.exchange(request, network.sign(request), learner.blobs, folder / f"payload{round}")
            found.append((received.bytes_down, time.perf_counter() - began))
        return found
    finally:
        worker.close()
        await network.close()
        await axon.close()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with scratch() as folder:
        task = prepare(folder)
        learner = Learner(task, AdamWConfig(), torch.device("cpu"), "delta", CODEC)
        everything = grow(learner)
        (first, join_s), (second, warm_s) = asyncio.run(join(folder, task, learner))
    least = first - second
    Figure("wire.join_bytes", least, "bytes", f"all {ROUNDS:,} deltas", everything, least / everything)
    Figure("wire.join_s", join_s - warm_s, "s")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
