"""How long `--help` takes, beside importing torch, which it does without: medians of interleaved runs.

python -m bench.startup
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from bench import Figure

RUNS = 7


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    commands = {
        "validator": ("src/validator.py", "--help"),
        "miner": ("src/miner.py", "--help"),
        "torch": ("-c", "import torch"),
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(RUNS):
        for name, command in commands.items():
            times[name].append(seconds(*command))
    ours, torch = max(median(times["validator"]), median(times["miner"])), median(times["torch"])
    Figure("startup.help_s", ours, "s", "import torch", torch, ours / torch)


if __name__ == "__main__":
    main()
