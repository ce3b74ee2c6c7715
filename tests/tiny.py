"""A GPT-2 of 20,000 parameters on 60 KB of text, and a marketplace of real workers over the loopback network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bittensor.sp_core import Keypair
from transformers import GPT2Config as HubConfig
from transformers import GPT2LMHeadModel

from pilot.aggregation import load_aggregator
from pilot.codec import load_codec
from pilot.interfaces import MinerService
from pilot.market.round import Market, Network, RoundPolicy
from pilot.ranking import load_ranker
from pilot.simulation.network import EmulatedNetwork
from pilot.storage.miner_store import FileMinerStore
from pilot.storage.run_store import RunStore
from pilot.training.diloco import round_settings
from pilot.training.executor import Charge
from pilot.training.learner import Learner
from pilot.worker.worker import Worker
from protocol import DataSpec, Hotkey, Receipt, TaskSpec
from tasks import TASKS, Task
from tasks.gpt2 import GPT2, GPT2Config
from tasks.optimizer import AdamWConfig, adamw_settings

VALIDATOR = Keypair.create_from_uri("//Validator")
MINERS = [Keypair.create_from_uri(f"//Miner{i}") for i in range(8)]
CPU = torch.device("cpu")
torch.set_num_threads(1)  # more of them only get into each other's way on a model of this size
OPTIMIZER = AdamWConfig(lr=1e-3, warmup=2)
TERMS = RoundPolicy(run="tiny", batches=2, deadline_s=60.0, patience=3, codec_up="fp32", codec_down="fp32")
ROUNDS = 20
UNITS = 1 << 14  # tokens in a step, as nanochat's schedule counts them


def write_text(path: Path, size: int = 60_000) -> Path:
    """Words that a model can learn something from, the same each time."""
    rng = random.Random(0)
    words = ["the", "miner", "round", "gradient", "deadline", "ledger", "weights", "of", "and", "commits", "a"]
    path.write_text(" ".join(rng.choice(words) for _ in range(size // 5))[:size])
    return path


def save_model(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = HubConfig(n_layer=1, n_head=2, n_embd=32, n_positions=32, vocab_size=256, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    return folder


def tiny_config(folder: Path) -> GPT2Config:
    text, model = folder / "text.txt", folder / "model"
    if not model.exists():
        write_text(text)
        save_model(model)
    return GPT2Config(
        model=str(model), text=str(text), tokenizer="byte", batch_size=4, eval_sequences=8, validation=0.1
    )


def tiny_task(folder: Path) -> GPT2:
    folder.mkdir(parents=True, exist_ok=True)
    return GPT2.prepare(tiny_config(folder), seed=0, cache=folder / "cache", progress=lambda line: None)


def settings(step: int) -> dict[str, float]:
    return adamw_settings(OPTIMIZER, step, ROUNDS)


@dataclass
class Place:
    """One marketplace in this process: give `market` to a coroutine on a virtual loop."""

    market: Market
    store: RunStore
    network: EmulatedNetwork
    workers: dict[Hotkey, Worker]
    said: list[str]


def make_worker(
    folder: Path, keypair: Keypair, said: list[str], clock: Callable[[], float], charge: Charge | None = None
) -> Worker:
    cache = FileMinerStore(folder / keypair.ss58_address)

    def open_blob(task: TaskSpec, data: DataSpec, name: str) -> Path:
        path = cache.blob(data.blobs[name])
        assert path is not None
        return path

    return Worker(keypair.ss58_address, frozenset(TASKS), CPU, cache, open_blob, said.append, clock, charge=charge)


def batch_takes(seconds: float) -> Charge:
    """A micro-batch takes so much virtual time; nothing else takes any."""

    async def charge(phase: str, amount: float) -> None:
        await asyncio.sleep(seconds * amount if phase == "batch" else 0.0)

    return charge


def make_place(
    folder: Path,
    task: Task,
    network: Callable[[EmulatedNetwork], Network] = lambda loopback: loopback,
    wrap: Callable[[Worker], MinerService] = lambda worker: worker,
    store: RunStore | None = None,
    miners: Sequence[Keypair] = MINERS[:2],
    aggregation: str = "mean",
    ranker: str = "accepted_work",
    optimizer: Any = OPTIMIZER,
    batch_s: Sequence[float] = (),
    bits_per_s: float = float("inf"),
    **policy: object,
) -> Place:
    """Call it inside the loop. The run in `folder` is created, or opened where it exists.

    `batch_s`: virtual seconds that each miner's micro-batches take.
    """
    if store is None:
        run = folder / "run"
        store = RunStore.open(run, keep=2) if run.exists() else RunStore.create(run, {"task": "gpt2"}, keep=2)
    said: list[str] = []
    clock = asyncio.get_running_loop().time
    charges = [batch_takes(s) for s in batch_s] or [None] * len(miners)
    workers = {
        k.ss58_address: make_worker(folder / "miners", k, said, clock, c) for k, c in zip(miners, charges, strict=True)
    }
    services = {hotkey: wrap(worker) for hotkey, worker in workers.items()}
    keys = {k.ss58_address: k for k in miners}
    loopback = EmulatedNetwork(VALIDATOR, services, keys, latency_s=0.01, bandwidth_bps=bits_per_s)
    asked = replace(TERMS, **policy)
    keep = store.versions if asked.broadcast == "delta" else None
    market = Market(
        asked,
        task,
        Learner(task, optimizer, CPU, asked.broadcast, asked.codec_down, keep),
        network(loopback),
        store,
        load_ranker(ranker),
        load_aggregator(aggregation),
        load_codec,
        lambda round, units: round_settings(asked.diloco, task, optimizer, ROUNDS)(round, UNITS),
    )
    return Place(market, store, loopback, workers, said)


async def play(market: Market, rounds: int) -> None:
    """Rounds up to the number given, as validator.py does, without its looks at the model."""
    await market.open_rounds(rounds)
    while market.in_flight:
        await market.run_round(rounds)
    await market.finish()


def parameters(market: Market) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in market.learner.parameters.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def receipts(store: RunStore, round: int) -> dict[Hotkey, Receipt]:
    """What a committed round said of each miner."""
    [record] = [r for r in store.committed(round) if r.round == round]
    return {r.hotkey: r for r in (Receipt.parse(s.body) for s in record.receipts)}
