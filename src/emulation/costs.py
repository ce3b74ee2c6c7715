"""What computing takes in an emulation: figures of a table, charged to the virtual clock, never elapsed time.

The defaults are what `measure` said once of GPT-2 "small" with 256 tokens, 345 MB of fp32, on one core of a server: for
one sequence of 1,024 tokens and, of the rest, for a megabyte of a state or payload, whatever small model stands for it.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from typing_extensions import Buffer

from market.phases import Charge
from protocol import digest

if TYPE_CHECKING:
    import torch

    from tasks import Task

COUNTED = ("batch", "evaluate")  # by their number; all others by the megabyte


@dataclass(frozen=True)
class CostConfig:
    """Seconds that a phase takes (market.phases), at a miner of speed 1 and at the validator."""

    batch: float = 9.0
    """Seconds a micro-batch."""

    load: float = 0.0002
    """Seconds a megabyte of state, from its bytes into the model."""

    encode: float = 0.00023
    """Seconds a megabyte of gradient or state, into bytes, and their digest."""

    verify: float = 0.00022
    """Seconds a megabyte of a reply, at the validator."""

    aggregate: float = 0.00007
    """Seconds a megabyte of all replies together."""

    step: float = 0.0003
    """Seconds a megabyte of fp32 parameters, for the optimizer's step."""

    evaluate: float = 2.5
    """Seconds an evaluation."""

    spread: float = 0.3
    """The miners' speeds are lognormal about 1, with this standard deviation of their logarithm."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not 0 <= value < math.inf or (f.name == "batch" and not value):
                raise ValueError(f"--costs.{f.name} {value}: must be {'above 0' if f.name == 'batch' else '0 or more'}")

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
        each: float = getattr(self, phase)
        return each * amount * (1 / speed if phase == "batch" else 1.0 if phase in COUNTED else scale)

    def speed(self, seed: int, miner: str) -> float:
        return math.exp(random.Random(f"{seed}/speed/{miner}").gauss(0.0, self.spread))

    def table(self) -> list[str]:
        lines = []
        for f in fields(self):
            if f.name != "spread":
                unit = "s a micro-batch" if f.name == "batch" else "s" if f.name in COUNTED else "s a MB"
                lines.append(f"  {f.name:10} {getattr(self, f.name):9.5f} {unit}")
        return lines


def measure(task: Task, optimizer: Any, codec_up: str, codec_down: str) -> dict[str, float]:
    """What each phase takes on this machine, with the task's own model and micro-batches: the best of three."""
    import torch

    from aggregation import load_aggregator
    from aggregation.means import global_norm
    from codec import load_codec
    from market.learner import Learner, load_replica
    from market.verify import Contribution
    from market.work import Computation

    up, down = load_codec(codec_up), load_codec(codec_down)
    learner = Learner(task, optimizer, down, torch.device("cpu"))
    computation = Computation(task, task.build_model("cpu", initial=False))
    load = _best(lambda: load_replica(task, computation.model, down, learner.blob))
    batch = _best(lambda: computation.add(0))
    gradient = computation.result().gradient
    specs = {name: g.shape for name, g in gradient.items()}
    encode = _best(lambda: digest("payload", up.encode(gradient)))
    payload = up.encode(gradient)
    verify = _best(lambda: global_norm(up.decode(payload, specs)))
    norm = global_norm(gradient)
    one = Contribution("miner", (), task.count(0), norm, lambda: up.decode(payload, specs))
    mean = load_aggregator("median_norm_mean")
    aggregate = _best(lambda: mean([one, one]))
    settings = task.settings(optimizer, 0, 1, task.count(0))
    step = _best(lambda: learner.step({name: g.clone() for name, g in gradient.items()}, settings))
    parameters, state, sent = (n / 1e6 for n in (4 * _size(gradient), _bytes(learner.blob), _bytes(payload)))
    return {
        "batch": batch,
        "load": load / state,
        "encode": encode / sent,
        "verify": verify / sent,
        "aggregate": aggregate / (2 * parameters),
        "step": step / parameters,
        "evaluate": _best(lambda: task.evaluate(learner.model), 1),
    }


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())


def _bytes(data: Buffer) -> int:
    return memoryview(data).nbytes


def _best(function: Callable[[], object], times: int = 3) -> float:
    """Seconds."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        took.append(time.perf_counter() - began)
    return min(took)
