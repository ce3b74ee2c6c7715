"""Measure the share of time left for computing with GPT-2's 124 million parameters at 100 Mbit/s and 50 ms one way.

    python -m bench.thin             # some minutes; details go to stderr

Rounds of a minute in virtual time: market, miners, codecs and files are the real ones, links and computing are
simulated. A small model stands for the large one: its payloads count for as many bytes as the real codec makes of
GPT-2's own tensors, each way (a vector's scales are not a matrix's), and encoding, checking and adding for as many
seconds as this machine takes for these, on one core.
Utilisation is the share of the miners' time spent on micro-batches, after two rounds.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bench import Figure
from pilot.app.build_validator import link_watch
from pilot.app.training_flags import RoundConfig
from pilot.codec import CodecCost, load_codec
from pilot.common.units import fp32_megabytes
from pilot.market.link_budget import Rate
from pilot.simulation.costs import CostConfig, codec_phases, measure_codec
from pilot.simulation.link_model import LinkSpec
from pilot.simulation.traces import HOUR_S, make_trace
from pilot.simulation.virtual_time import run
from pilot.simulation.world import Conditions, World
from tasks.optimizer import AdamWConfig
from tasks.quadratic import Quadratic, QuadraticConfig

MINERS = 4
SECONDS = HOUR_S / 2
BATCH_S = 0.5  # per micro-batch at a miner of speed 1
LINK = LinkSpec(up_bps=100e6, down_bps=100e6, latency_s=0.05)
RATE = Rate(LINK.up_bps, LINK.down_bps, 2 * LINK.latency_s)
SMALL = QuadraticConfig(dimension=1 << 16)  # large enough that headers hardly count
WARM_UP = 2  # rounds
# In DiLoCo with more micro-batches than a miner computes in a minute, so that the time ends a round.
MODES = {
    "gradient": RoundConfig(task="quadratic", round_seconds=60.0, rounds=1000),
    "diloco": RoundConfig(
        task="quadratic", round_seconds=60.0, rounds=1000, mode="diloco", batches=16, warmup_sync=0.0
    ),
}
MEMORY = Path("/dev/shm")


def gpt2() -> dict[str, torch.Tensor]:
    """Return random values like a gradient's, in the shapes of GPT-2's parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT2LMHeadModel(GPT2Config()).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    return {name: 1e-3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def count(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())


def size(codec: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of the payload."""
    return memoryview(load_codec(codec).encode(tensors)).nbytes


def play(config: RoundConfig, costs: CostConfig, parameters: int, sizes: tuple[int, int]) -> tuple[float, float, float]:
    """Return utilisation, and megabytes up and down per round and miner, for payloads of these `sizes`."""

    async def main(folder: Path) -> tuple[float, float, float]:
        task = Quadratic.prepare(SMALL, seed=0, cache=folder)
        scale = parameters / SMALL.dimension
        small = {"x": 1e-3 * torch.randn(SMALL.dimension, generator=torch.Generator().manual_seed(0))}
        up, down = (real / size(codec, small) for real, codec in zip(sizes, config.codecs, strict=True))
        trace = make_trace("steady", MINERS, 2 * SECONDS, seed=0)
        policy = config.policy("thin", 1 << 30)
        conditions = Conditions(costs, LINK, scale=scale, wire=(up, down))
        world = World(folder, task, AdamWConfig(), policy, conditions, trace, config.rounds)
        watch = world.market.watch = link_watch(config, world.market.learner, world.network.miner_states, say, scale)
        say(watch.budget.describe(RATE, "a link"))
        states = [state async for state in world.play(SECONDS)]
        first, last = states[WARM_UP - 1], states[-2]  # the last is cut short
        rounds = MINERS * (last.rounds - first.rounds)
        sent = ((last.bytes_up - first.bytes_up) / rounds, (last.bytes_down - first.bytes_down) / rounds)
        say(f"  {last}")
        return last.utilisation(first), sent[0] / 1e6, sent[1] / 1e6

    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        return run(main(Path(name)))


def main() -> None:
    torch.set_num_threads(1)
    tensors = gpt2()
    measured: dict[str, tuple[CodecCost, int]] = {}
    for name in sorted({name for config in MODES.values() for name in config.codecs}):
        each, length = measured[name] = measure_codec(name, tensors), size(name, tensors)
        cost = CodecCost(*(fp32_megabytes(t.shape for t in tensors.values()) * seconds for seconds in each))
        took = f"encode {cost.encode:.3f} s, check {cost.check:.3f} s, add {cost.add:.3f} s"
        say(f"{name}: {length / 1e6:.2f} MB; {took}")
    parameters = count(tensors)
    del tensors
    for mode, config in MODES.items():
        (up, up_bytes), (down, down_bytes) = (measured[name] for name in config.codecs)
        costs = replace(CostConfig(batch=BATCH_S, evaluate=0.0), **codec_phases(up, down))
        for overlap in (0, 1):
            sizes = up_bytes, down_bytes
            used, *sent = play(replace(config, overlap=overlap), costs, parameters, sizes)
            for megabytes, real in zip(sent, sizes, strict=True):
                assert 1e-6 * real < megabytes < 1.02e-6 * real, (
                    mode,
                    megabytes,
                    real,
                )  # orders and replies add a little
            suffix = "_overlap" if overlap else ""
            Figure(f"wire.utilisation_100mbit.{mode}{suffix}", used, "of the time")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
