"""Run a marketplace of real processes, each miner behind a proxy, and inject faults (schedule.KINDS) into it."""

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

from pilot.common import interrupts
from pilot.common.logs import undated
from pilot.simulation.chaos.proxy import Proxy, proxy_to
from pilot.simulation.chaos.schedule import VALIDATOR, Event
from pilot.storage import LEDGER

ROOT = Path(__file__).resolve().parents[4]
CLOCK = Path(__file__).with_name("clock.py")
RUN = "chaos"
PATIENCE_S = 120.0  # for a process to start or to end, on a busy machine
DISK_FULL = (4096, resource.RLIM_INFINITY)  # bytes that a file may have: hardly any write succeeds
DISK_FREE = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
FULL_SPOOL_ROUNDS = 5
SERVES = r"^serving "
PULLS = r"^tasks "
TRAINS = r"miners are there"
YOUNG_S = 5.0  # for so long after its start a program may not handle SIGTERM yet


class Failure(Exception):
    """A process did something that no fault explains. The text names it and quotes the end of its log."""


class Program:
    """A program that is started again and again.

    Its output passes through this process into one log, which a full disk of the program does not affect.
    """

    def __init__(self, name: str, program: str, flags: Sequence[str], ready: str, log: Path) -> None:
        self.name, self.ready, self.log = name, ready, log
        self._command = [str(ROOT / "src" / program), *flags]
        self.skew_s = 0.0
        self.event_lock = asyncio.Lock()  # one fault at a time
        self.starts, self.ready_at = 0, 0.0
        self.unexpected_exit: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._may_end = True
        self._process: asyncio.subprocess.Process | None = None
        self._lines: list[str] = []  # since the last start
        self._reading: asyncio.Task[None] | None = None

    async def start(self, *flags: str) -> None:
        clock = [str(CLOCK), str(self.skew_s)] if self.skew_s else []
        self._lines, self._may_end, self.starts = [], False, self.starts + 1
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
                text = line.decode(errors="replace").rstrip()
                self._lines.append(undated(text))
                print(text, file=log, flush=True)
        code = await process.wait()
        if not self._may_end and not self.unexpected_exit.done():
            self.unexpected_exit.set_result(f"{self.name} exited unexpectedly with code {code}; {self.log_tail()}")

    def log_tail(self, count: int = 15) -> str:
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

    def printed(self, pattern: str) -> bool:
        """Return whether it printed a matching line since its last start."""
        return any(re.search(pattern, line) for line in self._lines)

    def send(self, number: signal.Signals) -> None:
        if self.running:
            os.kill(self.pid, number)

    def limit_files(self, size: tuple[int, int]) -> None:
        """Limit the bytes that each of its files may have."""
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, size)

    def allow_exit(self, yes: bool = True) -> None:
        self._may_end = yes

    async def end(self, number: signal.Signals) -> int:
        """Send a signal, wait for the exit, and return its code."""
        self.allow_exit()
        self.send(number)
        return await self.wait()

    async def wait(self) -> int:
        assert self._process is not None
        try:
            return await asyncio.wait_for(self._process.wait(), PATIENCE_S)
        except TimeoutError:
            raise Failure(f"{self.name} did not exit within {PATIENCE_S:g} s; {self.log_tail()}") from None

    async def wait_until_ready(self) -> None:
        """Wait until it prints that it is ready, or exits. Raises Failure after PATIENCE_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while self.running and not self.printed(self.ready):
                    await asyncio.sleep(0.05)
                self.ready_at = time.monotonic()
                return
        raise Failure(f"{self.name} was not ready within {PATIENCE_S:g} s; {self.log_tail()}")


class Marketplace:
    """A validator and miners in a folder, with a proxy for each miner. A context manager: no process outlives it.

    If there are enough miners, one pulls its orders and one announces itself; the others are listed, by the ports of
    their proxies, in the file for --axons-file.
    """

    def __init__(self, folder: Path, miners: int, validator_flags: Sequence[str], latency_s: float) -> None:
        self.folder, self._flags, self._latency_s = folder, validator_flags, latency_s
        self.names = [f"M{number + 1}" for number in range(miners)]
        self.proxies: dict[str, Proxy] = {}
        self.miners: dict[str, Program] = {}
        self._listed: dict[str, int] = {}  # port of the proxy, of miners in the axons file
        self._axons = folder / "axons.txt"
        self.run = folder / "runs" / RUN
        self._stack = AsyncExitStack()
        self.quiet = False  # no new fault may begin
        self.problems: list[str] = []

    async def __aenter__(self) -> Marketplace:
        hotkey = make_wallet(self.folder / "wallets")
        serve = free_port()
        for index, name in enumerate(self.names):
            port, connection = free_port(), self._connection(index)
            proxy, near = await self._stack.enter_async_context(proxy_to(port if connection == "listed" else serve))
            proxy.latency_s = self._latency_s
            self.proxies[name] = proxy
            flags = ["--wallet.name", name, "--wallet.path", str(self.folder / "wallets"), "--axon.port", str(port)]
            flags += ["--cache", str(self.folder / "miners" / name), "--device", "cpu", "--threads", "1"]
            flags += ["--parent", str(os.getpid()), "--grace", "5", "--tasks", "quadratic"]
            if connection == "listed":
                self._listed[name] = near
            else:
                flags += ["--validator", f"127.0.0.1:{near}@{hotkey}", *(["--pull"] if connection == "pull" else [])]
            ready = PULLS if connection == "pull" else SERVES
            self.miners[name] = Program(name, "miner.py", flags, ready, self.folder / f"{name}.log")
        self._write_axons(self._listed)
        flags = [*self._flags, "--wallet.name", VALIDATOR, "--wallet.path", str(self.folder / "wallets")]
        flags += ["--runs", str(self.run.parent), "--run", RUN, "--axons-file", str(self._axons)]
        flags += ["--serve.port", str(serve), "--admit", "everyone"]
        self.validator = Program(VALIDATOR, "validator.py", flags, TRAINS, self.folder / "validator.log")
        self._stack.enter_context(interrupts.undoing(self._kill_all))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._kill_all()
        await self._stack.aclose()

    def _kill_all(self) -> None:
        for program in self.programs:
            program.allow_exit()
            program.send(signal.SIGKILL)

    def _connection(self, index: int) -> str:
        """Return how the validator and this miner find each other."""
        left = len(self.names) - index
        return "pull" if left == 1 and index >= 2 else "announce" if left == 2 and index >= 2 else "listed"

    @property
    def programs(self) -> list[Program]:
        return [self.validator, *self.miners.values()]

    @property
    def caches(self) -> list[Path]:
        """Return the miners' own folders, with their receipts."""
        return [self.folder / "miners" / name / f"{name}.default" for name in self.names]

    async def start(self) -> None:
        """Start all at once, so that they import in parallel, and wait until all are ready."""
        await self.validator.start("--connect-timeout", str(PATIENCE_S))
        for miner in self.miners.values():
            await miner.start()
        for program in self.programs:
            await program.wait_until_ready()

    async def stop_miners(self) -> None:
        for miner in self.miners.values():
            if await miner.end(signal.SIGTERM):
                self.problems.append(f"{miner.name} exited with {miner.code} on SIGTERM; {miner.log_tail()}")

    def _write_axons(self, names: Sequence[str] | dict[str, int]) -> None:
        text = "".join(f"{self._listed[name]}  # {name}\n" for name in names)
        temporary = self._axons.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, self._axons)

    def slow_down(self, events: int) -> None:
        """Slow the proxies down with the number of open faults, so that rounds last while programs restart."""
        for proxy in self.proxies.values():
            proxy.latency_s = self._latency_s * (1 + 2 * events)

    # --- faults ---------------------------------------------------------------------------------------------------

    async def inject(self, event: Event) -> str:
        """Begin and end a fault. Returns its outcome in a few words."""
        if event.kind in ("reset", "stall"):
            return await self._disturb(event, self.proxies[event.target])
        program = self.validator if event.target == VALIDATOR else self.miners[event.target]
        async with program.event_lock:
            if not program.running:
                return "skipped: it had exited"
            if self.quiet:
                return "skipped: the last rounds have no faults"
            faults = {"pause": self._pause, "disk": self._disk, "kill": self._kill, "skew": self._kill}
            faults |= {"spool": self._spool, "stop": self._stop, "leave": self._stop}
            return await faults[event.kind.removesuffix(f"-{VALIDATOR}")](event, program)

    async def _disturb(self, event: Event, proxy: Proxy) -> str:
        if event.kind == "stall":
            proxy.open.clear()
        else:
            proxy.cut_after = int(event.amount)
            proxy.reset()
        await asyncio.sleep(event.seconds)
        proxy.cut_after = None
        proxy.open.set()
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
        await self.restart(program)
        return "back"

    async def _stop(self, event: Event, program: Program) -> str:
        young = time.monotonic() - program.ready_at < YOUNG_S
        code = await program.end(signal.SIGTERM)
        expected = {0, 130} if program is self.validator else {0}
        if code not in expected | ({-signal.SIGTERM} if young else set()):
            self.problems.append(f"{program.name} exited with {code} on SIGTERM; {program.log_tail()}")
        names = [name for name in self._listed if name != program.name]
        if program.name in self._listed:
            self._write_axons(names)
        await asyncio.sleep(event.seconds)
        self._write_axons(self._listed)
        await self.restart(program)
        return "back"

    async def _disk(self, event: Event, program: Program) -> str:
        """Fail its writes as a full disk does, by a limit on file sizes: EFBIG in place of ENOSPC."""
        program.allow_exit(program is self.validator)
        program.limit_files(DISK_FULL)
        await asyncio.sleep(event.seconds)
        program.limit_files(DISK_FREE)
        if program is not self.validator:
            return "survived"
        until = committed(self.run) + 2  # it may exit a little later because of a failed write
        while program.running and committed(self.run) < until:
            await asyncio.sleep(0.1)
        if program.running:
            program.allow_exit(False)
            return "survived"
        code = program.code
        await self.restart(program)
        return f"exited with {code}, resumed"

    async def _spool(self, event: Event, program: Program) -> str:
        """Resume the validator with so little room in the spool that it fills up at once or soon."""
        await program.end(signal.SIGKILL)
        files = list((self.run / "spool").glob("*/*"))
        size = sum(path.stat().st_size for path in files)
        payload = max((path.stat().st_size for path in files), default=0)
        limit = size + int(event.amount / 100 * payload * len(self.names)) + 1
        until = committed(self.run) + FULL_SPOOL_ROUNDS
        await self.restart(program, "--limits.spool-bytes", str(limit))
        while program.running and committed(self.run) < until:
            await asyncio.sleep(0.1)
        if program.running:
            await program.end(signal.SIGKILL)
            await asyncio.sleep(event.seconds)
            await self.restart(program)
        return f"{limit} bytes, then room again"

    async def restart(self, program: Program, *flags: str) -> None:
        """Start a program and wait until it is ready. A validator that finds no miner in time is started again."""
        while True:
            await program.start(*flags, *(["--resume"] if program is self.validator else []))
            program.allow_exit()
            await program.wait_until_ready()
            if program.running or program.code == 0:
                program.allow_exit(False)
                return
            if not program.printed("no miner answered"):
                raise Failure(f"{program.name} did not restart, exit code {program.code}; {program.log_tail()}")


def committed(run: Path) -> int:
    """Return the number of committed rounds, while the validator is running."""
    if not (run / LEDGER).exists():
        return 0
    with (
        contextlib.suppress(sqlite3.OperationalError),  # just being created, or the disk is full
        closing(sqlite3.connect(f"file:{run / LEDGER}?mode=ro", uri=True)) as db,
    ):
        return int(db.execute("SELECT count(*) FROM rounds").fetchone()[0])
    return 0


def make_wallet(folder: Path) -> str:
    """Create the validator's wallet and return its hotkey, which some miners need on their command line."""
    from pilot.transport.wallets import load_keypair

    return str(load_keypair(VALIDATOR, "default", str(folder), create=True, say=lambda line: None).ss58_address)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as vacated:
        return int(vacated.getsockname()[1])
