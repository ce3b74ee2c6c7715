"""A time of day that never goes back, for what must not become new again."""

from __future__ import annotations

import time
from collections.abc import Callable


class SteadyClock:
    """The machine's clock in nanoseconds. If that is set back, go on from there by the monotonic one."""

    def __init__(
        self,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        least_ns: int = 0,
    ) -> None:
        """`least_ns` is the earliest time that the clock starts at."""
        self._clock_ns, self._monotonic_ns = clock_ns, monotonic_ns
        self._ahead_ns = least_ns - monotonic_ns()  # of the monotonic clock; it only grows

    def __call__(self) -> int:
        monotonic_ns = self._monotonic_ns()
        self._ahead_ns = max(self._ahead_ns, self._clock_ns() - monotonic_ns)
        return monotonic_ns + self._ahead_ns
