"""Who may come and where they are, from files that are read again when they change: --axons-file and --admit."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pilot.interfaces import Refused
from pilot.transport.auth import is_bittensor_address
from pilot.transport.client.dendrite import Dendrite
from pilot.transport.client.peer import Endpoint, parse_endpoint
from protocol import Hotkey, one_line

LOOK_S = 1.0  # between two looks at a file
EVERYONE = "everyone"


class Lines:
    """A file's lines, without comments. Where it is missing for a moment, or half written, the last ones hold."""

    def __init__(self, flag: str, path: Path, what: str) -> None:
        """Raises ValueError where there is no such file."""
        self.name, self._path = f"{flag} {path}", path.expanduser()
        if not self._path.is_file():
            raise ValueError(f"{self.name}: no such file; make it, with {what} a line")
        self._read = self._seen = self._stamp()

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def changed(self) -> bool:
        """Another content has been there for two looks."""
        before, self._seen = self._seen, self._stamp()
        return self._seen is not None and self._seen == before != self._read

    def read(self) -> list[tuple[int, str]]:
        """Those with something in them, with their numbers. Raises OSError."""
        stamp = self._stamp()
        text = self._path.read_text(errors="replace")
        self._read = stamp
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return [(number, line) for number, line in enumerate(lines, 1) if line]


class Roster:
    """What a file lists, one to a line; a bad line is complained about, once, and the others are used."""

    def __init__(self, lines: Lines, say: Callable[[str], None], check: Callable[[str], object]) -> None:
        """`check` raises ValueError for a bad line."""
        self._lines, self._say, self._check = lines, say, check
        self._complained: set[str] = set()

    def changed(self) -> bool:
        return self._lines.changed()

    def entries(self) -> list[str]:
        """Raises OSError."""
        good, bad = [], set()
        for number, line in self._lines.read():
            try:
                self._check(line)
                good.append(line)
            except ValueError as error:
                complaint = one_line(str(error))
                bad.add(complaint)
                if complaint not in self._complained:
                    self._say(f"{self._lines.name}, line {number}: {complaint}; the line is not used")
        self._complained = bad
        return good


class AxonsFile:
    """--axons-file: follows the file in what a network's endpoints are."""

    def __init__(self, path: Path, tls: bool, say: Callable[[str], None]) -> None:
        """Raises ValueError where there is no such file."""
        self._parse = partial(parse_endpoint, tls=tls)
        self._roster = Roster(Lines("--axons-file", path, "a miner"), say, self._parse)
        self.endpoints: tuple[Endpoint, ...] = ()
        self._look()

    def _look(self) -> None:
        self.endpoints = tuple(dict.fromkeys(self._parse(line) for line in self._roster.entries()))

    async def follow(self, network: Dendrite, others: tuple[Endpoint, ...], look_s: float = LOOK_S) -> None:
        """For ever. `others` are in the network anyway."""
        while True:
            await asyncio.sleep(look_s)
            if not self._roster.changed():
                continue
            before = set(self.endpoints)
            try:
                self._look()
            except OSError:  # gone again since
                continue
            for endpoint in before - set(self.endpoints) - set(others):
                network.remove(endpoint)
            for endpoint in self.endpoints:
                if endpoint not in before and endpoint not in others:
                    network.add(endpoint)


class Admission:
    """--admit: who may announce itself and pull. Its file is looked at when somebody calls."""

    def __init__(self, admit: str, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        """Raises ValueError where there is no such file."""
        self._roster: Roster | None = None  # of everyone
        self._clock, self._looked, self._hotkeys = clock, clock(), frozenset[str]()
        if admit != EVERYONE:
            self._roster = Roster(Lines("--admit", Path(admit), "an ss58 address"), say, _check_address)
            self._hotkeys = frozenset(self._roster.entries())

    def admits(self, hotkey: Hotkey) -> bool:
        if self._roster is None:
            return True
        if self._clock() - self._looked >= LOOK_S:
            self._looked = self._clock()
            if self._roster.changed():
                with contextlib.suppress(OSError):  # gone again since
                    self._hotkeys = frozenset(self._roster.entries())
        return hotkey in self._hotkeys

    def check(self, caller: Hotkey) -> None:
        """Raises Refused 403 for one that may not call."""
        if not self.admits(caller):
            raise Refused(403, f"{one_line(caller)} is not among those that this validator's --admit names")

    def admit(self, caller: Hotkey) -> None:
        self.check(caller)


def _check_address(line: str) -> None:
    if not is_bittensor_address(line):
        raise ValueError(f"{line!r} is no ss58 address")
