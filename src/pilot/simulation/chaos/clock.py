"""Run a program whose clock is wrong: python pilot/simulation/chaos/clock.py SECONDS PROGRAM.py FLAGS …

The program sees a time of day that is so many seconds ahead (negative: behind). Monotonic clocks are right.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path


def shift(seconds: float) -> None:
    """Shift time.time and time.time_ns. Call it before other imports: a module may keep a reference to the clock."""
    clock, clock_ns = time.time, time.time_ns
    time.time = lambda: clock() + seconds
    time.time_ns = lambda: clock_ns() + int(seconds * 1e9)


def main() -> None:
    seconds, program = float(sys.argv[1]), sys.argv[2]
    shift(seconds)
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(program).resolve().parent)  # as Python sets it for a program
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
