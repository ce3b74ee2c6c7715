"""What the marketplace costs: validator and one miner on this machine against plain training with the same threads.

    python -m bench.overhead         # GPT-2 124M, some ten minutes; figures as JSON lines, the rest on stderr

Everything is durable and as a user has it: real processes, loopback sockets, default snapshots. Rounds are timed
between commits in the ledger, steps by base_train itself; the two take turns. GPT-2's vocabulary is found through
PILOT_DATA.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path
from statistics import median

from bench import Figure

TURNS = 2  # market, baseline, market, baseline
ROUNDS = 4  # a turn, of which the first is a warm-up
COMPUTE_S = 25.0  # a round of GPT-2 124M: at most so much computing, and 20 at least
NANO_ROUNDS = 150


def flags(folder: Path, model: str) -> list[str]:
    common = ["--eval-every", "0", "--cache", str(folder / "cache"), "--threads", str(os.cpu_count())]
    if model == "nano":
        return [*common, "--gpt2.batch-size", "4"]
    data = os.environ.get("PILOT_DATA")
    vocabulary = ["--gpt2.vocabulary", f"{data}/gpt2_"] if data else []  # else from the hub
    return [*common, "--gpt2.model", model, *vocabulary, "--gpt2.max-bytes", "4000000", "--gpt2.eval-sequences", "1"]


def market(folder: Path, name: str, rounds: int, batches: int, model: str) -> list[float]:
    """Seconds from commit to commit."""
    command = [sys.executable, "src/validator.py", "--local", "1", "--run", name, "--runs", str(folder)]
    command += ["--rounds", str(rounds), "--batches", str(batches), "--wallet.path", str(folder / "wallets")]
    run([*command, *flags(folder, model)])
    return [after - before for before, after in itertools.pairwise(commits(folder / name))]


def commits(run: Path) -> list[float]:
    """When each round of a run was committed, in seconds since 1970; a validator may be at work on it."""
    with closing(sqlite3.connect(f"file:{run}/ledger.sqlite?mode=ro", uri=True)) as db:
        committed = db.execute("SELECT committed_at FROM rounds ORDER BY round").fetchall()
    return [datetime.fromisoformat(text).timestamp() for (text,) in committed]


def baseline(folder: Path, rounds: int, batches: int, model: str) -> list[float]:
    """Seconds a step."""
    log = folder / "baseline.jsonl"
    command = [sys.executable, "scripts/base_train.py", "--rounds", str(rounds), "--batches", str(batches)]
    run([*command, "--log", str(log), *flags(folder, model)])
    return [json.loads(line)["seconds"] for line in log.read_text().splitlines()][1:]


def run(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")


def disk_mb_s(folder: Path, megabytes: int = 500) -> float:
    """Writing and syncing as much as a payload of GPT-2 124M."""
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    with (folder / "disk").open("wb") as file:
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return megabytes / (time.perf_counter() - began)


def where_it_goes(folder: Path, name: str, step_s: float, round_s: float) -> None:
    """The round beside the step, part by part, on stderr: medians of one run."""
    with sqlite3.connect(folder / name / "ledger.sqlite") as db:
        rows = [json.loads(text) for (text,) in db.execute("SELECT metrics FROM rounds ORDER BY round")][1:]
    parts = re.findall(
        r"load ([\d.]+) s, compute ([\d.]+) s, encode ([\d.]+) s", (folder / name / "miners" / "M1.log").read_text()
    )[1:]
    load, compute, encode = (median(float(p[i]) for p in parts) for i in range(3))
    collect, learn = (median(row[key] for row in rows) for key in ("collect_s", "learn_s"))
    lines = {
        "plain training: a step": step_s,
        "marketplace: a round": round_s,
        "  miner: compute": compute,
        "  miner: load the state": load,
        "  miner: encode the gradient, hash it": encode,
        "  wire, spool, verify: orders, state down, gradient up": collect - load - compute - encode,
        "  validator: aggregate, step, encode the state, hash it": learn,
        "  validator: the rest (plan, order durable)": round_s - collect - learn,
    }
    for line, seconds in lines.items():
        print(f"{line:55} {seconds:7.3f} s  {seconds / round_s:6.1%}", file=sys.stderr)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pilot-bench-", dir=os.environ.get("PILOT_BENCH_DIR")) as name:
        folder = Path(name)
        nano_market = market(folder, "nano", NANO_ROUNDS, 1, "nano")[10:]
        nano_step = baseline(folder, NANO_ROUNDS, 1, "nano")[10:]
        fixed = 1000 * (median(nano_market) - median(nano_step))
        Figure("overhead.round_fixed_ms", fixed, "ms", "base_train, ms a step", 1000 * median(nano_step))

        one = min(baseline(folder, 4, 1, "small"))
        batches = max(1, math.floor(COMPUTE_S / one))
        print(f"rounds of {batches} micro-batches, {batches * one:.1f} s of computing", file=sys.stderr)
        rounds: list[float] = []
        steps: list[float] = []
        for turn in range(TURNS):
            rounds += market(folder, f"small{turn}", ROUNDS, batches, "small")
            steps += baseline(folder, ROUNDS, batches, "small")
        tokens = 1024 * batches
        where_it_goes(folder, f"small{TURNS - 1}", median(steps), median(rounds))
        print(f"disk: {disk_mb_s(folder):.0f} MB/s written and synced", file=sys.stderr)
        ours, plain = tokens / median(rounds), tokens / median(steps)
        Figure("overhead.tokens_per_s", ours, "tokens/s", "base_train", plain, ours / plain)


if __name__ == "__main__":
    main()
