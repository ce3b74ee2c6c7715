"""Run the miners of --local N: processes on this machine, on free ports, for the length of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from pilot.common import interrupts
from pilot.common.logs import undated
from protocol import Health

READY = "serving "  # miner.py's line when its axon listens: serving HOST:PORT@SS58
START_S = 120.0


def ask_status(endpoint: str) -> Health:
    """Return the answer to GET /v1/status at host:port@ss58, bypassing any proxy of the environment."""
    url = f"http://{endpoint.partition('@')[0]}/v1/status"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=START_S) as answer:
            return Health.model_validate_json(answer.read())
    except urllib.error.HTTPError as unhealthy:
        return Health.model_validate_json(unhealthy.read())


def _lines(log: Path) -> list[str]:
    return undated(log.read_text(encoding="utf-8", errors="replace")).splitlines()


class LocalMiners:
    """Start miners at once, so that they import torch while the validator does. `endpoints` waits until they serve."""

    def __init__(self, count: int, folder: Path, task: str, device: str, threads: int) -> None:
        self.logs = [folder / f"M{i + 1}.log" for i in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        if count:
            folder.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        self._stack.enter_context(interrupts.undoing(self.terminate))
        threads = threads or max(1, (os.cpu_count() or 1) // max(1, count))
        for i, log in enumerate(self.logs):
            command = [
                *(sys.executable, str(Path(__file__).resolve().parents[2] / "miner.py")),
                *("--wallet.name", f"M{i + 1}", "--wallet.path", str(folder / "wallets")),
                *("--axon.port", "0", "--cache", str(folder / f"M{i + 1}"), "--tasks", task, "--unpin"),
                *("--device", device, "--threads", str(threads), "--parent", str(os.getpid())),
            ]
            with log.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
                )

    def endpoints(self, say: Callable[[str], None]) -> tuple[str, ...]:
        """Return host:port@ss58 of each miner once it serves. Raises ValueError with what one that ends said last."""
        found: list[str] = []
        deadline = time.monotonic() + START_S
        for process, log in zip(self.processes, self.logs, strict=True):
            while not (ready := [line for line in _lines(log) if line.startswith(READY)]):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ValueError(f"--local: {log.stem} did not start: {' '.join(_lines(log)[-1:])}; see {log}")
                time.sleep(0.05)
            endpoint = ready[-1].removeprefix(READY).strip()
            health = ask_status(endpoint)
            if not health.healthy:
                raise ValueError(f"--local: {log.stem} is not healthy: {health.state}; see {log}")
            found.append(endpoint)
            say(f"{log.stem} serves {endpoint}, {health.state}, process {process.pid}, log {log}")
        return tuple(found)

    def terminate(self) -> None:
        for process in self.processes:
            process.terminate()

    def stop(self) -> None:
        self.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._stack.close()

    def __enter__(self) -> LocalMiners:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
