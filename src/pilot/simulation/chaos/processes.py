"""A marketplace of real processes, each behind a bad line, and what can go wrong with them (chaos_schedule.KINDS)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from pathlib import Path

from pilot.simulation.chaos.proxy import Line, line_to
from pilot.simulation.chaos.schedule import VALIDATOR, Event
from pilot.storage import LEDGER

ROOT = Path(__file__).resolve().parents[4]
CLOCK = Path(__file__).with_name("clock.py")
RUN = "chaos"
PATIENCE_S = 120.0  # for a process to start or to end, on a busy machine
FULL = (4096, resource.RLIM_INFINITY)  # bytes up to which a file may be written: no room for anything
ROOM = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
FULL_ROUNDS = 5  # that a full spool lasts
SERVES = r"^serving "
PULLS = r"^tasks "
TRAINS = r"miners are there"
YOUNG_S = 5.0  # a program that began so lately may end on SIGTERM without a word


class Failure(Exception):
    """A process did what no event explains. Text: which, and its last words."""


class Program:
    """A command that is started again and again. Its output goes to one log, through this process: a full disk is the
    program's, not its log's."""

    def __init__(self, name: str, program: str, flags: Sequence[str], ready: str, log: Path) -> None:
        self.name, self.ready, self.log = name, ready, log
        self._command = [str(ROOT / "src" / program), *flags]
        self.skew_s = 0.0
        self.turn = asyncio.Lock()  # one event at a time
        self.starts, self.ready_at = 0, 0.0
        self.ended_alone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._meant_to_end = True
        self._process: asyncio.subprocess.Process | None = None
        self._lines: list[str] = []  # of this start
        self._reading: asyncio.Task[None] | None = None

    async def start(self, *flags: str) -> None:
        clock = [str(CLOCK), str(self.skew_s)] if self.skew_s else []
        self._lines, self._meant_to_end, self.starts = [], False, self.starts + 1
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, *clock, *self._command, *flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self._reading = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with self.log.open("a") as log:
            print(f"--- start {self.starts}, process {process.pid}, clock {self.skew_s:+g} s", file=log, flush=True)
            async for line in process.stdout:
                self._lines.append(line.decode(errors="replace").rstrip())
                print(self._lines[-1], file=log, flush=True)
        code = await process.wait()
        if not self._meant_to_end and not self.ended_alone.done():
            self.ended_alone.set_result(f"{self.name} ended by itself, exit code {code}; {self.last_words()}")

    def last_words(self, count: int = 15) -> str:
        return "\n  ".join([f"{self.log} ends:", *self._lines[-count:]])

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def code(self) -> int | None:
        return self._process.returncode if self._process else None

    def said(self, pattern: str) -> bool:
        """Since its last start."""
        return any(re.search(pattern, line) for line in self._lines)

    def send(self, number: signal.Signals) -> None:
        if self.running:
            os.kill(self.pid, number)

    def limit(self, size: tuple[int, int]) -> None:
        """Bytes that its files may have."""
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, size)

    def may_end(self, yes: bool = True) -> None:
        self._meant_to_end = yes

    async def end(self, number: signal.Signals) -> int:
        """Its exit code."""
        self.may_end()
        self.send(number)
        return await self.wait()

    async def wait(self) -> int:
        assert self._process is not None
        try:
            return await asyncio.wait_for(self._process.wait(), PATIENCE_S)
        except TimeoutError:
            raise Failure(f"{self.name} did not end in {PATIENCE_S:g} s; {self.last_words()}") from None

    async def wait_until_ready(self) -> None:
        """Until it says so, or ends."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while self.running and not self.said(self.ready):
                    await asyncio.sleep(0.05)
                self.ready_at = time.monotonic()
                return
        raise Failure(f"{self.name} was not ready in {PATIENCE_S:g} s; {self.last_words()}")


class Place:
    """Validator and miners in a folder, with their lines. A context manager: nothing of it is left behind.

    Of the miners one pulls its orders and one announces itself, where there are enough; the others are in a file of
    axons, by their lines' near ends.
    """

    def __init__(self, folder: Path, miners: int, validator_flags: Sequence[str], latency_s: float) -> None:
        self.folder, self._flags, self._latency_s = folder, validator_flags, latency_s
        self.names = [f"M{number + 1}" for number in range(miners)]
        self.lines: dict[str, Line] = {}
        self.miners: dict[str, Program] = {}
        self._near: dict[str, int] = {}  # a line's near end, of the miners in the file
        self._axons = folder / "axons.txt"
        self.run = folder / "runs" / RUN
        self._stack = AsyncExitStack()
        self.calm = False  # nothing begins any more
        self.problems: list[str] = []

    async def __aenter__(self) -> Place:
        hotkey = make_wallet(self.folder / "wallets")
        serve = free_port()
        for index, name in enumerate(self.names):
            port, way = free_port(), self.way(index)
            line, near = await self._stack.enter_async_context(line_to(port if way == "file" else serve))
            line.latency_s = self._latency_s
            self.lines[name] = line
            flags = ["--wallet.name", name, "--wallet.path", str(self.folder / "wallets"), "--axon.port", str(port)]
            flags += ["--cache", str(self.folder / "miners" / name), "--device", "cpu", "--threads", "1"]
            flags += ["--parent", str(os.getpid()), "--grace", "5", "--tasks", "quadratic"]
            if way == "file":
                self._near[name] = near
            else:
                flags += ["--validator", f"127.0.0.1:{near}@{hotkey}", *(["--pull"] if way == "pull" else [])]
            ready = PULLS if way == "pull" else SERVES
            self.miners[name] = Program(name, "miner.py", flags, ready, self.folder / f"{name}.log")
        self._write_axons(self._near)
        flags = [*self._flags, "--wallet.name", VALIDATOR, "--wallet.path", str(self.folder / "wallets")]
        flags += ["--runs", str(self.run.parent), "--run", RUN, "--axons-file", str(self._axons)]
        flags += ["--serve.port", str(serve), "--admit", "everyone"]
        self.validator = Program(VALIDATOR, "validator.py", flags, TRAINS, self.folder / "validator.log")
        return self

    async def __aexit__(self, *_: object) -> None:
        for program in self.programs:
            program.may_end()
            program.send(signal.SIGKILL)
        await self._stack.aclose()

    def way(self, index: int) -> str:
        """How the validator comes to know this miner."""
        left = len(self.names) - index
        return "pull" if left == 1 and index >= 2 else "announce" if left == 2 and index >= 2 else "file"

    @property
    def programs(self) -> list[Program]:
        return [self.validator, *self.miners.values()]

    @property
    def caches(self) -> list[Path]:
        """The miners' own, with their receipts."""
        return [self.folder / "miners" / name / f"{name}.default" for name in self.names]

    async def start(self) -> None:
        """All at once: they import while the others do."""
        await self.validator.start("--connect-timeout", str(PATIENCE_S))
        for miner in self.miners.values():
            await miner.start()
        for program in self.programs:
            await program.wait_until_ready()

    async def stop_miners(self) -> None:
        for miner in self.miners.values():
            if await miner.end(signal.SIGTERM):
                self.problems.append(f"{miner.name} ended with {miner.code} on SIGTERM; {miner.last_words()}")

    def _write_axons(self, names: Sequence[str] | dict[str, int]) -> None:
        text = "".join(f"{self._near[name]}  # {name}\n" for name in names)
        temporary = self._axons.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, self._axons)

    def slow_down(self, events: int) -> None:
        """The more is under way, the slower the lines, so that rounds do not run out while programs start again."""
        for line in self.lines.values():
            line.latency_s = self._latency_s * (1 + 2 * events)

    # --- what goes wrong ------------------------------------------------------------------------------------------

    async def suffer(self, event: Event) -> str:
        """The event and its end. What came of it, in a word."""
        if event.kind in ("reset", "stall"):
            return await self._bad_line(event, self.lines[event.target])
        program = self.validator if event.target == VALIDATOR else self.miners[event.target]
        async with program.turn:
            if not program.running:
                return "it had ended"
            if self.calm:
                return "too late: the last rounds are calm"
            happens = {"pause": self._pause, "disk": self._disk, "kill": self._kill, "skew": self._kill}
            happens |= {"spool": self._spool, "stop": self._stop, "leave": self._stop}
            return await happens[event.kind.removesuffix(f"-{VALIDATOR}")](event, program)

    async def _bad_line(self, event: Event, line: Line) -> str:
        if event.kind == "stall":
            line.open.clear()
        else:
            line.cut_after = int(event.amount)
            line.reset()
        await asyncio.sleep(event.seconds)
        line.cut_after = None
        line.open.set()
        return "over"

    async def _pause(self, event: Event, program: Program) -> str:
        program.send(signal.SIGSTOP)
        await asyncio.sleep(event.seconds)
        program.send(signal.SIGCONT)
        return "over"

    async def _kill(self, event: Event, program: Program) -> str:
        await program.end(signal.SIGKILL)
        await asyncio.sleep(event.seconds)
        if event.kind.startswith("skew"):
            program.skew_s = event.amount if program.skew_s != event.amount else 0.0
        await self.again(program)
        return "back"

    async def _stop(self, event: Event, program: Program) -> str:
        young = time.monotonic() - program.ready_at < YOUNG_S
        code = await program.end(signal.SIGTERM)
        polite = {0, 130} if program is self.validator else {0}
        if code not in polite | ({-signal.SIGTERM} if young else set()):
            self.problems.append(f"{program.name} ended with {code} on SIGTERM; {program.last_words()}")
        names = [name for name in self._near if name != program.name]
        if program.name in self._near:
            self._write_axons(names)
        await asyncio.sleep(event.seconds)
        self._write_axons(self._near)
        await self.again(program)
        return "back"

    async def _disk(self, event: Event, program: Program) -> str:
        """A limit on its files' size fails each write, as a full disk does, with EFBIG for ENOSPC."""
        program.may_end(program is self.validator)
        program.limit(FULL)
        await asyncio.sleep(event.seconds)
        program.limit(ROOM)
        if program is not self.validator:
            return "survived"
        until = committed(self.run) + 2  # of what it met it may still be about to end
        while program.running and committed(self.run) < until:
            await asyncio.sleep(0.1)
        if program.running:
            program.may_end(False)
            return "survived"
        code = program.code
        await self.again(program)
        return f"ended with {code}, resumed"

    async def _spool(self, event: Event, program: Program) -> str:
        """Stopped, and resumed with room for so little that the spool is full at once, or soon."""
        await program.end(signal.SIGKILL)
        files = list((self.run / "spool").glob("*/*"))
        size = sum(path.stat().st_size for path in files)
        payload = max((path.stat().st_size for path in files), default=0)
        limit = size + int(event.amount / 100 * payload * len(self.names)) + 1
        until = committed(self.run) + FULL_ROUNDS
        await self.again(program, "--limits.spool-bytes", str(limit))
        while program.running and committed(self.run) < until:
            await asyncio.sleep(0.1)
        if program.running:
            await program.end(signal.SIGKILL)
            await asyncio.sleep(event.seconds)
            await self.again(program)
        return f"{limit} bytes, then room again"

    async def again(self, program: Program, *flags: str) -> None:
        """Start it, until it is ready. A validator that finds no miner in time says so, and is started again."""
        while True:
            await program.start(*flags, *(["--resume"] if program is self.validator else []))
            program.may_end()
            await program.wait_until_ready()
            if program.running or program.code == 0:
                program.may_end(False)
                return
            if not program.said("no miner answered"):
                raise Failure(f"{program.name} did not start again, exit code {program.code}; {program.last_words()}")


def committed(run: Path) -> int:
    """Rounds, from a ledger that a validator writes at the same time."""
    if not (run / LEDGER).exists():
        return 0
    with (
        contextlib.suppress(sqlite3.OperationalError),  # it is being made, or its disk is full
        closing(sqlite3.connect(f"file:{run / LEDGER}?mode=ro", uri=True)) as db,
    ):
        return int(db.execute("SELECT count(*) FROM rounds").fetchone()[0])
    return 0


def make_wallet(folder: Path) -> str:
    """The validator's hotkey, which miners that announce themselves are told."""
    from pilot.transport.wallets import load_keypair

    return str(load_keypair(VALIDATOR, "default", str(folder), create=True, say=lambda line: None).ss58_address)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as vacated:
        return int(vacated.getsockname()[1])
