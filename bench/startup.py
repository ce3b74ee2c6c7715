"""How long `--help` takes, how long the demo takes to its first round, and the memory of a miner at rest.

    python -m bench.startup

Each beside the imports that set its limit, as medians of interleaved runs. `--help` does without torch, a miner at rest
needs torch alone, and the demo's validator and miners also import Hugging Face's GPT-2.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench import Figure

RUNS = 7
SLOW_RUNS = 3
GPT2 = "from transformers import GPT2LMHeadModel"


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def seconds_to(line: str, *command: str) -> float:
    """Return how long a command takes to print a line that has this in it."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = any(line in each for each in process.stdout)
        took = time.perf_counter() - began
        process.terminate()
        process.stdout.read()
    if not found:
        raise SystemExit(f"{' '.join(command)} ended without a line of {line!r}")
    return took


def resident_mb(line: str, *command: str) -> float:
    """Return the resident memory of a command when it prints a line that has this in it."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while line not in process.stdout.readline():
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended without a line of {line!r}")
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.kill()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024 / 1e6


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
    with tempfile.TemporaryDirectory() as folder:
        own = ["--wallet.path", f"{folder}/wallets"]
        miner = ["src/miner.py", "--axon.port", "0", "--cache", f"{folder}/miner", *own]
        rest, floor = (
            resident_mb("serving", *miner),
            resident_mb("ok", "-c", "import time, torch; print('ok', flush=True); time.sleep(60)"),
        )
        Figure("startup.miner_at_rest_mb", round(rest), "MB", "import torch", round(floor), rest / floor)
        pairs = []
        for number in range(SLOW_RUNS):
            run = ["--runs", f"{folder}/runs", "--run", f"demo{number}", "--cache", f"{folder}/cache", *own]
            first = seconds_to("round 1/", "src/validator.py", "--config", "experiments/demo.json", *run)
            pairs.append((first, seconds("-c", GPT2)))
        first, imports = (median(each) for each in zip(*pairs[1:], strict=True))  # the first one also makes the tokens
        Figure("startup.first_round_s", first, "s", GPT2, imports, first / imports)


if __name__ == "__main__":
    main()
