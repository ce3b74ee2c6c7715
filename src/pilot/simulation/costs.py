"""What computing takes in an emulation: figures of a table, charged to the virtual clock, never elapsed time.

The defaults are what `measure` said once, on one core of a server: of GPT-2 "small" with 256 tokens, for one sequence
of 1,024 tokens and for an optimizer's step; and of each codec over 124 million values. A megabyte is one of the fp32
values that a phase is about, whatever small model stands for them, and however few bytes carry them.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pilot.common.units import fp32_megabytes
from pilot.training.executor import Charge
from protocol import digest

if TYPE_CHECKING:
    import torch

    from tasks import Task

COUNTED = ("batch", "score", "evaluate")  # by their number; all others by the megabyte


class CodecCost(NamedTuple):
    """Seconds a megabyte of fp32."""

    encode: float  # into bytes, and their digest
    check: float
    add: float  # to other tensors


CODECS = {
    "fp32": CodecCost(0.00025, 0.00017, 0.00010),
    "bf16": CodecCost(0.00015, 0.00015, 0.00015),
    "int8": CodecCost(0.00033, 0.00009, 0.00010),
    "int4": CodecCost(0.00025, 0.00012, 0.00013),
    "2bit": CodecCost(0.00037, 0.00012, 0.00014),
    "ternary-rc": CodecCost(0.00057, 0.00022, 0.00020),
    "1bit": CodecCost(0.00021, 0.00012, 0.00014),
    "topk64": CodecCost(0.00048, 0.00003, 0.00010),
}


@dataclass(frozen=True)
class CostConfig:
    """Seconds that a phase takes (pilot.training.executor), at a miner of speed 1 and at the validator. Where it says None, it is
    what was measured once of the codec."""

    batch: float = 9.0
    """Seconds a micro-batch."""

    load: float | None = None
    """Seconds a megabyte of model, from a delta's or a state's bytes into a miner's model."""

    encode: float | None = None
    """Seconds a megabyte of gradient, into bytes, and their digest, at a miner."""

    broadcast: float | None = None
    """Seconds a megabyte of model, its change into bytes, at the validator."""

    verify: float | None = None
    """Seconds a megabyte of gradient, to check a reply, at the validator."""

    aggregate: float | None = None
    """Seconds a megabyte of all gradients together, to add them up."""

    step: float = 0.0003
    """Seconds a megabyte of parameters, for the optimizer's step."""

    measure: float = 0.0003
    """Seconds a megabyte of all gradients together, for what the ranker asks for."""

    score: float = 0.0
    """Seconds an order, for the ranker."""

    digest: float = 0.00025
    """Seconds a megabyte of model, for the proof that miners have the same."""

    evaluate: float = 2.5
    """Seconds an evaluation."""

    spread: float = 0.3
    """The miners' speeds are lognormal about 1, with this standard deviation of their logarithm."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (0 <= value < math.inf and (value or name != "batch")):
                raise ValueError(f"--costs.{name} {value}: must be {'above 0' if name == 'batch' else '0 or more'}")

    def settled(self, up: str, down: str) -> Self:
        """With what these codecs take, where nothing else is said."""
        taken = codec_phases(CODECS[up], CODECS[down])
        return replace(self, **{name: value for name, value in taken.items() if getattr(self, name) is None})

    @property
    def validator(self) -> Self:
        """With the validator's own encoding in the place of the miners'."""
        return replace(self, encode=self.broadcast)

    def charge(self, speed: float, scale: float, spent: Callable[[str, float], None]) -> Charge:
        """Lets a phase's time pass in the running loop; `spent` hears of it, also where it is broken off.

        `speed` is of a miner's micro-batches. A megabyte counts for `scale` of them, as in the network.
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
        assert each is not None, "settled before use"
        return each * amount * (1 / speed if phase == "batch" else 1.0 if phase in COUNTED else scale)

    def speed(self, seed: int, miner: str) -> float:
        return math.exp(random.Random(f"{seed}/speed/{miner}").gauss(0.0, self.spread))

    def table(self) -> list[str]:
        lines = []
        for name, value in asdict(self).items():
            if name != "spread" and value is not None:
                unit = "s a micro-batch" if name == "batch" else "s" if name in COUNTED else "s a MB"
                lines.append(f"  {name:10} {value:9.5f} {unit}")
        return lines


def codec_phases(up: CodecCost, down: CodecCost) -> dict[str, float]:
    """What phases take that a codec decides."""
    return {
        "load": down.check + down.add,
        "encode": up.encode,
        "broadcast": down.encode + down.add,
        "verify": up.check,
        "aggregate": up.add,
    }


def measure_codec(name: str, tensors: Mapping[str, torch.Tensor]) -> CodecCost:
    """With these tensors, on this machine: the best of three, in seconds of one core, whatever else it is doing."""
    import torch

    from pilot.codec import load_codec

    codec, specs = load_codec(name), {key: t.shape for key, t in tensors.items()}
    payload, into = codec.encode(tensors), {key: torch.zeros_like(t) for key, t in tensors.items()}
    executor = (
        lambda: digest("payload", codec.encode(tensors)),
        lambda: codec.check(payload, specs),
        lambda: codec.add(payload, into),
    )
    megabytes = fp32_megabytes(t.shape for t in tensors.values())
    return CodecCost(*(_best(phase, clock=time.process_time) / megabytes for phase in executor))


def measure(task: Task, optimizer: Any, codec_up: str, codec_down: str) -> dict[str, float]:
    """What each phase takes on this machine, with the task's own model and micro-batches: the best of three."""
    import torch

    from pilot.training.gradient import GradientAccumulator
    from pilot.training.learner import Learner

    learner = Learner(task, optimizer, torch.device("cpu"))
    computation = GradientAccumulator(task, task.build_model("cpu", initial=False))
    batch = _best(lambda: computation.add(0))
    gradient = computation.result().gradient
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
    """Seconds."""
    took = []
    for _ in range(times):
        began = clock()
        function()
        took.append(clock() - began)
    return min(took)
