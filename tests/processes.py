"""Start, kill and restart real miner.py and validator.py processes on a tiny model, and leave none behind.

    with start_miner(tmp_path, "M1") as m1, start_validator(tmp_path, "--axons", m1.endpoint, "--rounds", "3") as v:
        assert v.wait() == 0

Wallets, caches, runs and logs lie in the folder that the test names. A process takes seconds to import torch, so start
several at once: nothing here waits before it is asked for something that only a ready process knows.
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

from pilot.common.logs import undated

SRC = Path(__file__).resolve().parent.parent / "src"
PATIENCE_S = 90.0  # for anything at all on a busy machine; no test measures time with it
RUN = "tiny"  # the run's name, unless a flag says otherwise

T = TypeVar("T")


def eventually(probe: Callable[[], T | None], what: str, patience_s: float = PATIENCE_S) -> T:
    """Return the first value of `probe` that is neither None nor False. Fail the test, naming `what`, if none comes."""
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
        """Run the command, again if need be; `said` starts over."""
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
        """Return the whole output so far, without the times at the beginning of lines."""
        return undated(self.log.read_text(errors="replace"))

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the first match, line by line, in the output. Fail the test if the process ends without one."""

        def probe() -> re.Match[str] | None:
            ended = self._popen.poll() is not None  # before the look: its last words count
            found = re.search(pattern, self.said(), re.MULTILINE)
            assert found or not ended, f"{self.log.name} ended without {pattern!r}:\n{self.said()}"
            return found

        return eventually(probe, f"{pattern!r} in {self.log}")

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Return the exit code, or the negative number of the signal that killed the process."""
        try:
            return self._popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.log.name} did not end in {patience_s:g} s:\n{self.said()}") from None

    def kill(self) -> None:
        """Send SIGKILL to this process alone, not to those that it started."""
        self._popen.kill()
        self._popen.wait()

    def terminate(self) -> None:
        self._popen.terminate()

    def interrupt(self) -> None:
        """Send SIGINT to the program and to everything that it started, as a terminal does on Ctrl-C."""
        os.killpg(self.pid, signal.SIGINT)

    def survivors(self) -> list[int]:
        """Return the processes of its session that still run."""
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
        """Wait until the miner serves; return host:port@ss58."""
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
        """Restart on the same port, with the same wallet and cache, and with more `flags`."""
        self.command += ["--axon.port", self.port, *flags]
        self.close()
        self.start()


def tiny_flags(folder: Path) -> list[str]:
    """Return a validator's flags for a GPT-2 of 20,000 parameters on 60 KB of text, with all files in `folder`."""
    from tests.tiny import tiny_config  # imports torch, which most mistakes on a command line do not need

    folder.mkdir(parents=True, exist_ok=True)
    task = tiny_config(folder)
    return [
        *("--gpt2.model", task.model, "--gpt2.text", task.text, "--gpt2.tokenizer", task.tokenizer),
        *("--gpt2.batch-size", str(task.batch_size), "--gpt2.eval-sequences", str(task.eval_sequences)),
        *("--gpt2.validation", str(task.validation)),
        *common_flags(folder),
    ]


def quadratic_flags(folder: Path) -> list[str]:
    """Return a validator's flags for the quadratic task: its processes never import transformers, which takes 8 s."""
    task = ("--task", "quadratic", "--quadratic.dimension", "64", "--quadratic.batch-size", "4")
    return [*task, *common_flags(folder)]


def common_flags(folder: Path) -> list[str]:
    return [
        *("--device", "cpu", "--threads", "1", "--wallet.name", "validator", "--wallet.path", str(folder / "wallets")),
        *("--cache", str(folder / "cache"), "--runs", str(folder / "runs"), "--run", RUN, "--limits.away-s", "3"),
        *("--connect-timeout", str(PATIENCE_S)),
    ]


def start_miner(folder: Path, name: str, port: int = 0, *flags: str) -> Miner:
    folder.mkdir(parents=True, exist_ok=True)
    return Miner(folder, name, port, flags)


def start_validator(
    folder: Path, *flags: str, log: str = "validator", task: Callable[[Path], list[str]] = tiny_flags
) -> Process:
    """Start a validator with the flags of `task`, which later flags override."""
    return Process(program("validator.py", *task(folder), *flags), folder / f"{log}.log")


def run_validator(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a validator on the tiny task to its end."""
    return run_program("validator.py", *tiny_flags(folder), *flags)


def program(name: str, *flags: str) -> list[str]:
    """Return the command of a program in src/."""
    return [sys.executable, str(SRC / name), *flags]


def run_program(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a program with only these flags to its end, and capture its two outputs."""
    return subprocess.run(
        program(name, *flags),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_S,  # whole runs, of hundreds of rounds
        check=False,
    )


def _processes() -> list[tuple[int, int, str]]:
    """Return process id, session and state of every process (from Linux's /proc; elsewhere nothing)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            found.append((int(path.parent.name), int(session), state))
    return found
