"""Unsigned junk at a miner during its rounds, as fast as 50 connections can send it: how much longer a round takes.

    python -m bench.junk

Real processes. The rounds of a nano GPT-2 go on while phases with and without junk take turns; a round's time is that
from commit to commit. The sender, `wrk` where it is installed, else ours, keeps its connections where it is let, sends
the next request as soon as the last is answered, and connects anew where it is thrown out.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench import Figure
from bench.overhead import commits

CONNECTIONS = 50
PHASE_S = 12.0
PHASES = 3  # phases of each kind
SETTLE_S = 1.5  # seconds left out at the start of each phase
JUNK = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/order HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/order HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000,
    b"GET /v1/reply?order=%s&wait=9 HTTP/1.1\r\nHost: x\r\n\r\n" % (b"0" * 64),
    b"PUT /v1/blob?kind=state&digest=%s&bytes=9&offset=0 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    % (b"0" * 64),
]


def send(port: int, seconds: float) -> Counter[str]:
    """Junk over 50 connections: how often each status was answered, and connections that ended without an answer."""
    answers: Counter[str] = Counter()
    selector = selectors.DefaultSelector()

    def connect() -> None:
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", port))
        selector.register(connection, selectors.EVENT_WRITE)

    def drop(connection: socket.socket) -> None:
        selector.unregister(connection)
        connection.close()
        connect()

    for _ in range(CONNECTIONS):
        connect()
    sent = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for key, events in selector.select(0.1):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                if events & selectors.EVENT_WRITE:
                    connection.send(JUNK[sent % len(JUNK)])
                    sent += 1
                    selector.modify(connection, selectors.EVENT_READ)
                elif answer := connection.recv(1 << 16):
                    answers[answer[9:12].decode(errors="replace")] += 1
                    selector.modify(connection, selectors.EVENT_WRITE)
                else:
                    drop(connection)
            except OSError:
                answers["cut off"] += 1
                drop(connection)
    return answers


def junk(port: int) -> Counter[str]:
    wrk = shutil.which("wrk")
    if wrk is None:
        command = [sys.executable, "-m", "bench.junk", str(port)]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        return Counter({status: int(count) for status, count in re.findall(r"(.+): (\d+)\n", ended.stdout)})
    url = f"http://127.0.0.1:{port}/v1/order"
    command = [wrk, "-t2", f"-c{CONNECTIONS}", f"-d{PHASE_S:g}s", url]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    found = {name: int(n) for name, n in re.findall(r"(requests in|Non-2xx or 3xx responses:) *(\d+)", ended.stdout)}
    return Counter(found)


def still(process: subprocess.Popen[bytes], said: str) -> None:
    """A moment, in which the process has not ended."""
    time.sleep(0.1)
    if process.poll() is not None:
        sys.exit(said)


def resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def measure(folder: Path, miner: subprocess.Popen[bytes], port: int) -> None:
    quiet: list[float] = []
    noisy: list[float] = []
    answers: Counter[str] = Counter()
    memory = [resident_mb(miner.pid)]
    for phase in range(2 * PHASES):
        began = time.time()
        if phase % 2:
            answers += junk(port)
        else:
            time.sleep(PHASE_S)
        memory.append(resident_mb(miner.pid))
        times = [t for t in commits(folder / "junk") if began + SETTLE_S < t]
        (noisy if phase % 2 else quiet).extend(after - before for before, after in pairwise(times))
    print(f"answers: {dict(answers)}; the miner's memory by phase, MB: {[round(m) for m in memory]}", file=sys.stderr)
    print(f"rounds: {len(quiet)} quiet, {len(noisy)} under junk", file=sys.stderr)
    Figure("transport.under_junk", median(noisy), "s", "without junk, s", median(quiet), median(noisy) / median(quiet))
    Figure("transport.under_junk_memory_mb", max(memory) - memory[1], "MB")
    served = sum(count for status, count in answers.items() if status.startswith("2"))
    Figure("transport.under_junk_served", served, "requests", "refused", float(sum(answers.values()) - served))


def main() -> None:
    if len(sys.argv) > 1:
        for status, count in send(int(sys.argv[1]), PHASE_S).items():
            print(f"{status}: {count}")
        return
    with tempfile.TemporaryDirectory(prefix="pilot-bench-", dir=os.environ.get("PILOT_BENCH_DIR")) as name:
        folder = Path(name)
        common = ["--wallet.path", str(folder / "wallets"), "--threads", "1"]
        command = [sys.executable, "src/miner.py", "--axon.port", "0", "--cache", str(folder / "miner"), *common]
        log = folder / "miner.log"
        with log.open("w") as out, subprocess.Popen(command, stdout=out) as miner:
            while not (found := re.search(r"^serving (\S+)$", log.read_text(), re.MULTILINE)):
                still(miner, log.read_text())
            endpoint = found[1]
            command = [sys.executable, "src/validator.py", "--axons", endpoint, "--run", "junk", "--runs", str(folder)]
            command += ["--rounds", "100000", "--batches", "4", "--eval-every", "0", "--cache", str(folder / "cache")]
            with subprocess.Popen([*command, *common], stdout=subprocess.DEVNULL) as validator:
                try:
                    while not (folder / "junk" / "ledger.sqlite").exists() or len(commits(folder / "junk")) < 10:
                        still(validator, "the validator ended")
                    measure(folder, miner, int(endpoint.partition("@")[0].rpartition(":")[2]))
                finally:
                    validator.kill()
                    miner.kill()


if __name__ == "__main__":
    main()
