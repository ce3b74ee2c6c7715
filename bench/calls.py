"""How far a reader jumps to follow one round: the function calls it makes below src/, and those into another file.

    python -m bench.calls

A validator and two miners run the task `quadratic` over HTTP on loopback: real processes, each under `sys.setprofile`
and `threading.setprofile`. A round lasts from one commit in the ledger to the next, at both sides. Calls are counted
from one commit in the steady state to that of 60 rounds later, and divided by 60; files are those that the median round
enters. None of these rounds has an evaluation, a snapshot or a digest.

A call is the first entry into a function, method or coroutine that is defined in a file below src/. Not counted:
resumed generators and coroutines, comprehensions, lambdas, modules and class bodies, and code without a file of its own
there, as dataclasses' constructors. A call crosses where the nearest caller below src/ is in another file. What asyncio
starts counts as called by whoever runs the event loop, and a thread's first call has no caller and crosses nothing.

This file knows no module of src/ but the two programs, so that it measures any layout of the rest.
"""

from __future__ import annotations

import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from types import CodeType, FrameType
from typing import Any

from bench import Figure
from bench.overhead import commits

SRC = Path(__file__).resolve().parent.parent / "src"
ROUNDS = 100
STEADY = slice(20, 81)  # commits, 60 rounds between: in 15 the list of steps in an order grows, and is cut back
MINERS = 2
START_S = 120.0
END_S = 60.0
READY = "serving "  # a miner's line when its axon listens: serving HOST:PORT@SS58
SUSPENDS = 0x20 | 0x80 | 0x200  # co_flags of generators, coroutines and asynchronous generators

Call = tuple[float, str, bool]  # when, in seconds since 1970; the file that is entered; whether it crosses


class Recorder:
    """Every call of this process, in all threads; `append` and a dict's look-ups are atomic."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.calls: list[Call] = []
        self.below: dict[str, bool] = {}  # file name: whether it is below src/

    def start(self) -> None:
        threading.setprofile(self.event)
        sys.setprofile(self.event)

    def event(self, frame: FrameType, event: str, arg: Any) -> None:
        """What the interpreter calls at each call, of Python and of C."""
        if event == "call":
            code = frame.f_code
            if self.is_ours(code.co_filename) and is_call(code, frame.f_lasti):
                caller = self.caller(frame)
                crosses = caller is not None and caller != code.co_filename
                self.calls.append((time.time(), code.co_filename, crosses))
        elif event == "c_call" and arg is os._exit:  # a miner's end, after which nothing runs
            self.save()

    def is_ours(self, file: str) -> bool:
        found = self.below.get(file)
        if found is None:
            found = self.below[file] = Path(file).is_relative_to(SRC)
        return found

    def caller(self, frame: FrameType) -> str | None:
        """The file of the nearest caller below src/."""
        back = frame.f_back
        while back is not None and not self.is_ours(back.f_code.co_filename):
            back = back.f_back
        return None if back is None else back.f_code.co_filename

    def save(self) -> None:
        sys.setprofile(None)
        self.out.write_bytes(pickle.dumps(self.calls[:]))


def is_call(code: CodeType, at: int) -> bool:
    """Whether an entry into `code` at this instruction is the first of a named function, rather than a resumption."""
    if code.co_name.startswith("<") or not code.co_flags & 0x2:  # 0x2: with locals of its own, as only functions have
        return False
    return not code.co_flags & SUSPENDS or code.co_code[at + 1] & 3 == 0  # RESUME's argument: 0 at the function's start


def child(out: str, program: str, *flags: str) -> None:
    """Runs src/<program>.py with these flags, as `python src/<program>.py` would, and saves its calls."""
    path = SRC / f"{program}.py"
    sys.argv = [str(path), *flags]
    sys.path[0] = str(SRC)
    recorder = Recorder(Path(out))
    recorder.start()
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        recorder.save()


def start(folder: Path, name: str, program: str, *flags: str) -> subprocess.Popen[bytes]:
    """A child, whose calls come to be in NAME.calls, its output in NAME.log."""
    command = [sys.executable, "-m", "bench.calls", "--child", str(folder / f"{name}.calls"), program, *flags]
    command += ["--wallet.name", name, "--wallet.path", str(folder / "wallets"), "--cache", str(folder / name)]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--threads", "1", "--device", "cpu"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def endpoint(process: subprocess.Popen[bytes], log: Path) -> str:
    """HOST:PORT@SS58 of a miner, once it serves."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.startswith(READY)]
        if lines and lines[0].endswith("\n"):
            return lines[0].removeprefix(READY).strip()
        time.sleep(0.05)
    sys.exit(f"{log.stem} did not start:\n{log.read_text()[-2000:]}")


def play(folder: Path) -> None:
    """A whole run, and its end."""
    miners = {f"M{i + 1}": ["--axon.port", "0", "--tasks", "quadratic"] for i in range(MINERS)}
    processes = {name: start(folder, name, "miner", *flags) for name, flags in miners.items()}
    try:
        axons = [endpoint(process, folder / f"{name}.log") for name, process in processes.items()]
        flags = ["--task", "quadratic", "--axons", *axons, "--run", "calls", "--runs", str(folder)]
        flags += ["--rounds", str(ROUNDS), "--eval-every", "0", "--snapshot-every", "1000", "--digest-every", "0"]
        processes["V"] = start(folder, "V", "validator", *flags)
        if processes["V"].wait():
            sys.exit((folder / "V.log").read_text()[-2000:])
        for name in miners:
            processes[name].send_signal(signal.SIGTERM)
            processes[name].wait(END_S)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def count(calls: list[Call], cuts: list[float]) -> tuple[float, float, float]:
    """A round's calls, and those that cross, on average between the cuts; the files that the median round enters."""
    calls = sorted(calls)
    at = [bisect_left(calls, cut, key=lambda call: call[0]) for cut in cuts]
    rounds = [calls[first:end] for first, end in pairwise(at)]
    return (
        mean(len(calls) for calls in rounds),
        mean(sum(crosses for _, _, crosses in calls) for calls in rounds),
        median(len({file for _, file, _ in calls}) for calls in rounds),
    )


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pilot-bench-", dir=os.environ.get("PILOT_BENCH_DIR")) as name:
        folder = Path(name)
        play(folder)
        cuts = commits(folder / "calls")[STEADY]
        for side, process in (("validator", "V"), ("miner", "M1")):
            calls: list[Call] = pickle.loads((folder / f"{process}.calls").read_bytes())
            total, crossings, files = count(calls, cuts)
            Figure(f"calls.{side}", total, "calls")
            Figure(f"calls.{side}_crossings", crossings, "calls")
            Figure(f"calls.{side}_files", files, "files")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
