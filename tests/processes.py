"""Real miner.py and validator.py processes on a tiny model: started, killed, restarted, and none left behind.

    with start_miner(tmp_path, "M1") as m1, start_validator(tmp_path, "--axons", m1.endpoint, "--rounds", "3") as v:
        assert v.wait() == 0

Everything lies in the folder that the test names: wallets, caches, runs, logs. A process takes seconds to import torch,
so start several at once: nothing here waits until it is asked for what only a ready process can tell.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

SRC = Path(__file__).resolve().parent.parent / "src"
PATIENCE_S = 90.0  # for anything at all on a busy machine; no test measures time with it
RUN = "tiny"  # the run's name, unless a flag says otherwise

T = TypeVar("T")


def eventually(probe: Callable[[], T | None], what: str, patience_s: float = PATIENCE_S) -> T:
    """The first value of `probe` that is neither None nor False. Fails the test, naming `what`, where none comes."""
    deadline = time.monotonic() + patience_s
    while True:
        found = probe()
        if found is not None and found is not False:
            return found
        assert time.monotonic() < deadline, f"in {patience_s:g} s: no {what}"
        time.sleep(0.02)


class Process:
    """A command in a session of its own, with its output in a file. Leaving the context kills the session."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command = command
        self.log = log
        self.start()

    def start(self) -> None:
        """Runs the command, again if need be; `said` begins anew."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # a test that asks the hub is a mistake
        with self.log.open("wb") as out:
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def said(self) -> str:
        """Its whole output up to now."""
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match, line by line, in its output. Fails the test where the process ends without."""

        def probe() -> re.Match[str] | None:
            ended = self._popen.poll() is not None  # before the look: its last words count
            found = re.search(pattern, self.said(), re.MULTILINE)
            assert found or not ended, f"{self.log.name} ended without {pattern!r}:\n{self.said()}"
            return found

        return eventually(probe, f"{pattern!r} in {self.log}")

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Its exit code; a signal's number, negative, where one killed it."""
        try:
            return self._popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.log.name} did not end in {patience_s:g} s:\n{self.said()}") from None

    def kill(self) -> None:
        """SIGKILL to this process alone: what it started is on its own."""
        self._popen.kill()
        self._popen.wait()

    def terminate(self) -> None:
        self._popen.terminate()

    def interrupt(self) -> None:
        """Ctrl-C: a terminal sends it to the program and to everything that it started."""
        os.killpg(self.pid, signal.SIGINT)

    def survivors(self) -> list[int]:
        """The processes of its session that still run."""
        return [pid for pid, session, state in _processes() if session == self.pid and state != "Z"]

    def close(self) -> None:
        for pid in self.survivors():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._popen.kill()
        self._popen.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Miner(Process):
    """A miner with a wallet and a cache of its own, `folder/<name>`."""

    def __init__(self, folder: Path, name: str, port: int, flags: tuple[str, ...]) -> None:
        self._endpoint: str | None = None
        own = ["--wallet.name", name, "--wallet.path", str(folder / "wallets"), "--cache", str(folder / name)]
        own += ["--device", "cpu", "--threads", "1", "--axon.port", str(port)]
        super().__init__(program("miner.py", *own, *flags), folder / f"{name}.log")

    @property
    def endpoint(self) -> str:
        """host:port@ss58. Waits until it serves."""
        if self._endpoint is None:
            self._endpoint = self.wait_for(r"^serving (\S+)$")[1]
        return self._endpoint

    @property
    def port(self) -> str:
        return self.endpoint.partition("@")[0].rpartition(":")[2]

    @property
    def hotkey(self) -> str:
        return self.endpoint.partition("@")[2]

    def restart(self, *flags: str) -> None:
        """Again on the same port, with the same wallet and cache, and `flags` besides."""
        self.command += ["--axon.port", self.port, *flags]
        self.close()
        self.start()


def tiny_flags(folder: Path) -> list[str]:
    """A validator's flags for a GPT-2 of 20,000 parameters on 60 KB of text, everything in `folder`."""
    from tests.tiny import tiny_config  # imports torch, which most mistakes on a command line do not need

    folder.mkdir(parents=True, exist_ok=True)
    task = tiny_config(folder)
    return [
        *("--gpt2.model", task.model, "--gpt2.text", task.text, "--gpt2.tokenizer", task.tokenizer),
        *("--gpt2.batch-size", str(task.batch_size), "--gpt2.eval-sequences", str(task.eval_sequences)),
        *("--gpt2.validation", str(task.validation), "--device", "cpu", "--threads", "1"),
        *("--wallet.name", "validator", "--wallet.path", str(folder / "wallets")),
        *("--cache", str(folder / "cache"), "--runs", str(folder / "runs"), "--run", RUN, "--limits.away-s", "3"),
        *("--connect-timeout", str(PATIENCE_S)),
    ]


def start_miner(folder: Path, name: str, port: int = 0, *flags: str) -> Miner:
    folder.mkdir(parents=True, exist_ok=True)
    return Miner(folder, name, port, flags)


def start_validator(folder: Path, *flags: str, log: str = "validator") -> Process:
    """On the tiny task. Later flags win over `tiny_flags`."""
    return Process(program("validator.py", *tiny_flags(folder), *flags), folder / f"{log}.log")


def run_validator(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    return run_program("validator.py", *tiny_flags(folder), *flags)


def program(name: str, *flags: str) -> list[str]:
    """The command of a program in src/."""
    return [sys.executable, str(SRC / name), *flags]


def run_program(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """With these flags alone, to its end, its two outputs apart."""
    return subprocess.run(
        program(name, *flags),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_S,  # whole runs, of hundreds of rounds
        check=False,
    )


def _processes() -> list[tuple[int, int, str]]:
    """Process id, session and state of all that there are (Linux's /proc; elsewhere nothing)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            found.append((int(path.parent.name), int(session), state))
    return found
