"""Charge the time that computing takes in a simulation to the virtual clock, from a table of costs.

The defaults were measured once with `measure`, on one core of a server: GPT-2 "small" with 256 tokens on one sequence
of 1,024 tokens, and an optimizer's step; `pilot.codec` has those of the codecs. A megabyte counts fp32 values, however
few bytes encode them, and of the model that is simulated, however small the one that runs.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from pilot.codec import COSTS, CodecCost
from pilot.common.units import fp32_megabytes
from pilot.training.executor import Charge
from protocol import digest

if TYPE_CHECKING:
    import torch

    from tasks import Task

COUNTED = ("batch", "score", "evaluate")  # phases that cost seconds each; all others cost seconds per megabyte


@dataclass(frozen=True)
class CostConfig:
    """Seconds that each phase takes (pilot.training.executor), at a miner of speed 1 and at the validator.

    None stands for the value that was measured for the codec.
    """

    batch: float = 9.0
    """Seconds per micro-batch."""

    load: float | None = None
    """Seconds per megabyte of model, to load a delta or a state into a miner's model."""

    encode: float | None = None
    """Seconds per megabyte of gradient, to encode it and hash the bytes, at a miner."""

    broadcast: float | None = None
    """Seconds per megabyte of model, to encode its change, at the validator."""

    verify: float | None = None
    """Seconds per megabyte of gradient, to check a reply, at the validator."""

    aggregate: float | None = None
    """Seconds per megabyte of all gradients together, to add them up."""

    step: float = 0.0003
    """Seconds per megabyte of parameters, for the optimizer's step."""

    measure: float = 0.0003
    """Seconds per megabyte of all gradients together, for the measures that the ranker asks for."""

    score: float = 0.0
    """Seconds per order, for the ranker."""

    digest: float = 0.00025
    """Seconds per megabyte of model, for the digest of its state."""

    evaluate: float = 2.5
    """Seconds per evaluation."""

    spread: float = 0.3
    """Standard deviation of the logarithm of the miners' speeds, whose median is 1."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (0 <= value < math.inf and (value or name != "batch")):
                raise ValueError(f"--costs.{name} {value}: must be {'above 0' if name == 'batch' else '0 or more'}")

    def for_codecs(self, up: str, down: str) -> Self:
        """Return the costs with each None replaced by what these codecs take."""
        taken = codec_phases(COSTS[up], COSTS[down])
        return replace(self, **{name: value for name, value in taken.items() if getattr(self, name) is None})

    @property
    def validator(self) -> Self:
        """Return the costs at the validator, whose encoding is that of the broadcast."""
        return replace(self, encode=self.broadcast)

    def charge(self, speed: float, scale: float, spent: Callable[[str, float], None]) -> Charge:
        """Return a function that lets the time of a phase pass in the running loop, and reports it to `spent`.

        A cancelled phase reports the time until then. `speed` applies to micro-batches, `scale` to megabytes.
        """

        async def charge(phase: str, amount: float) -> None:
            began = asyncio.get_running_loop().time()
            try:
                await asyncio.sleep(self.seconds(phase, amount, speed, scale))
            finally:
                spent(phase, asyncio.get_running_loop().time() - began)

        return charge

    def seconds(self, phase: str, amount: float, speed: float = 1.0, scale: float = 1.0) -> float:
        each: float | None = getattr(self, phase)
        assert each is not None, "call for_codecs first"
        return each * amount * (1 / speed if phase == "batch" else 1.0 if phase in COUNTED else scale)

    def speed(self, seed: int, miner: str) -> float:
        return math.exp(random.Random(f"{seed}/speed/{miner}").gauss(0.0, self.spread))

    def table(self) -> list[str]:
        lines = []
        for name, value in asdict(self).items():
            if name != "spread" and value is not None:
                unit = "s per micro-batch" if name == "batch" else "s" if name in COUNTED else "s per MB"
                lines.append(f"  {name:10} {value:9.5f} {unit}")
        return lines


def codec_phases(up: CodecCost, down: CodecCost) -> dict[str, float]:
    """Return the costs of the phases that depend on a codec."""
    return {
        "load": down.check + down.add,
        "encode": up.encode,
        "broadcast": down.encode + down.add,
        "verify": up.check,
        "aggregate": up.add,
    }


def measure_codec(name: str, tensors: Mapping[str, torch.Tensor]) -> CodecCost:
    """Measure a codec on these tensors: the best of three, in CPU seconds, which other processes do not affect."""
    import torch

    from pilot.codec import load_codec

    codec, specs = load_codec(name), {key: t.shape for key, t in tensors.items()}
    payload, into = codec.encode(tensors), {key: torch.zeros_like(t) for key, t in tensors.items()}
    phases = (
        lambda: digest("payload", codec.encode(tensors)),
        lambda: codec.check(payload, specs),
        lambda: codec.add(payload, into),
    )
    megabytes = fp32_megabytes(t.shape for t in tensors.values())
    return CodecCost(*(_best(phase, clock=time.process_time) / megabytes for phase in phases))


def measure(task: Task, optimizer: Any, codec_up: str, codec_down: str) -> dict[str, float]:
    """Measure each phase on this machine, with the task's own model and micro-batches: the best of three."""
    import torch

    from pilot.training.gradient import GradientAccumulator
    from pilot.training.learner import Learner

    learner = Learner(task, optimizer, torch.device("cpu"))
    accumulator = GradientAccumulator(task, task.build_model("cpu", initial=False))
    batch = _best(lambda: accumulator.add(0))
    gradient = accumulator.result().gradient
    settings = task.settings(optimizer, 0, 1, task.count(0))
    step = _best(lambda: learner.step({name: g.clone() for name, g in gradient.items()}, settings))
    return {
        "batch": batch,
        **codec_phases(measure_codec(codec_up, gradient), measure_codec(codec_down, gradient)),
        "step": step / fp32_megabytes(g.shape for g in gradient.values()),
        "digest": measure_codec("fp32", gradient).encode,
        "evaluate": _best(lambda: task.evaluate(learner.model), 1),
    }


def _best(function: Callable[[], object], times: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the least seconds that a function took."""
    took = []
    for _ in range(times):
        began = clock()
        function()
        took.append(clock() - began)
    return min(took)
