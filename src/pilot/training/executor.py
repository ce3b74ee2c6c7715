"""Run long work in a thread and measure it, or charge virtual time for it by a cost model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")

Charge = Callable[[str, float], Awaitable[None]]  # waits for the virtual time that an amount of a phase takes


class TimedExecutor:
    """Runs functions one after the other and adds up the seconds of each phase.

    Phases and their amounts: `batch` (micro-batches), `evaluate` (1), and `load`, `encode`, `verify`, `measure`,
    `aggregate`, `step`, `score` (MB of the values in fp32). Functions take no virtual time; `charge` waits instead.
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
        """Add seconds that were measured elsewhere."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken
