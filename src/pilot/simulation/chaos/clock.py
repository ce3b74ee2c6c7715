"""Runs a program whose clock is wrong: python pilot/simulation/chaos/clock.py SECONDS PROGRAM.py FLAGS …

What the program sees of the time of day is so many seconds ahead (negative: behind). Time that passes is as it is.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path


def shift(seconds: float) -> None:
    """Before anything else is imported: who took a reference to the clock keeps the right one."""
    clock, clock_ns = time.time, time.time_ns
    time.time = lambda: clock() + seconds
    time.time_ns = lambda: clock_ns() + int(seconds * 1e9)


def main() -> None:
    seconds, program = float(sys.argv[1]), sys.argv[2]
    shift(seconds)
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(program).resolve().parent)  # as Python does for a program
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
