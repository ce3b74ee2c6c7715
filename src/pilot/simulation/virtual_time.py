"""An event loop whose clock jumps: days of virtual time pass at once, in the same order each time.

    run(simulation())

What a run does depends only on its inputs: there are no sockets, no threads and no waiting. (Signatures are the one
exception: sr25519 salts them, so envelopes differ from run to run, while their bodies and digests do not.)
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jump(selectors.DefaultSelector):
    """A selector that moves the clock to the next timer instead of sleeping until then."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            raise RuntimeError("deadlock: every task waits, and no timer is set")
        self.now = max(self.now + timeout, math.nextafter(self.now, math.inf))  # always some progress
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` starts at 0 and passes only when nothing is left to do before the next timer.

    `run_in_executor` (so `asyncio.to_thread` too) runs the function on the loop itself, in its turn. Real threads and
    sockets do not belong here: while they work, nothing is ready. Raises RuntimeError instead of waiting for ever.
    """

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)
        # The loop fires timers up to time() + this. At its own 1e-9 s that sum is time() itself from 194 days on, where
        # doubles are coarser, and a timer that is due would never fire.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self._jump.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        async def call() -> T:
            return func(*args)

        return self.create_task(call())


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` under virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
