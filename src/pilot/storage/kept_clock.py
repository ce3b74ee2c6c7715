"""A clock that does not go back across restarts: requests that a process has taken stay old for the next one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pilot.common.clock import SteadyClock
from pilot.common.files import replacing

LEASE_NS = 10 * 10**9  # how far ahead of the clock the file is written, so that it is written seldom
MOST_BACK_NS = 3 * 3600 * 10**9  # beyond which no caller's clock would fit


class KeptClock:
    """A `SteadyClock` that starts no earlier than where one with the same file was."""

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        """Raise ValueError if the machine's clock was set back by hours, or the file is damaged."""
        self._path = path
        try:
            self._kept_ns = int(path.read_bytes())
        except FileNotFoundError:
            self._kept_ns = 0
        except ValueError:
            raise ValueError(f"{path}: does not hold a time; delete it") from None
        back_ns = self._kept_ns - clock_ns()
        if back_ns > MOST_BACK_NS:
            raise ValueError(
                f"{path}: the clock of this machine was {back_ns / 3600e9:.1f} hours ahead when this was written; set "
                "the clock right, or delete the file if it was wrong then"
            )
        self._steady_ns = SteadyClock(clock_ns, least_ns=self._kept_ns)

    def __call__(self) -> int:
        now_ns = self._steady_ns()
        if now_ns >= self._kept_ns:
            self._kept_ns = now_ns + LEASE_NS
            with suppress(OSError), replacing(self._path, sync=False) as file:  # a full disk is reported by others
                file.write(str(self._kept_ns).encode())
        return now_ns
