"""Where work that takes long runs, and what its time is: a thread and its clock, or a cost model and virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")

Charge = Callable[[str, float], Awaitable[None]]  # lets the (virtual) time pass that a phase of this amount takes


class TimedExecutor:
    """Runs functions one after the other and adds up what each phase took.

    TimedExecutor, with their amounts: `batch` (micro-batches), `evaluate` (1); `load`, `encode`, `verify`, `aggregate`, `step`
    (MB of the fp32 values that it is about, however few bytes carry them). On a machine the functions take their time;
    under virtual time they take none, and
    `charge` lets pass what a cost model says.
    """

    def __init__(self, executor: Executor | None, clock: Callable[[], float], charge: Charge | None = None) -> None:
        self._executor, self.clock, self._charge = executor, clock, charge
        self._turn = asyncio.Lock()
        self._seconds: dict[str, float] = {}

    async def run(self, phase: str, amount: float, function: Callable[..., T], *arguments: object) -> T:
        async with self._turn:
            began = self.clock()
            result = await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
            if self._charge is not None:
                await self._charge(phase, amount)
            self.passed(phase, self.clock() - began)
            return result

    def passed(self, phase: str, seconds: float) -> None:
        """What was measured elsewhere counts too."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken
