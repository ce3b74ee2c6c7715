"""Read --axons-file and --admit again when they change: where miners are, and which may register."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pilot.interfaces import Refused
from pilot.transport.auth import is_hotkey
from pilot.transport.client.dendrite import Dendrite
from pilot.transport.client.peer import Endpoint, parse_endpoint
from protocol import Hotkey, one_line

CHECK_S = 1.0  # between two looks at a file
EVERYONE = "everyone"


class WatchedFile:
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
        text = self._path.read_text(encoding="utf-8", errors="replace")
        self._read = stamp
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return [(number, line) for number, line in enumerate(lines, 1) if line]


class ListFile:
    """The good lines of a file. Each bad line is reported once, and not used."""

    def __init__(self, lines: WatchedFile, say: Callable[[str], None], check: Callable[[str], object]) -> None:
        """`check` raises ValueError for a bad line."""
        self._lines, self._say, self._check = lines, say, check
        self._reported: set[str] = set()

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
                problem = one_line(str(error))
                bad.add(problem)
                if problem not in self._reported:
                    self._say(f"{self._lines.name}, line {number}: {problem}; the line is not used")
        self._reported = bad
        return good


class AxonsFile:
    """The endpoints in --axons-file; `follow` keeps a network's in step with them."""

    def __init__(self, path: Path, tls: bool, say: Callable[[str], None]) -> None:
        """Raises ValueError where there is no such file."""
        self._parse = partial(parse_endpoint, tls=tls)
        self._file = ListFile(WatchedFile("--axons-file", path, "a miner"), say, self._parse)
        self.endpoints: tuple[Endpoint, ...] = ()
        self._reload()

    def _reload(self) -> None:
        self.endpoints = tuple(dict.fromkeys(self._parse(line) for line in self._file.entries()))

    async def follow(self, network: Dendrite, others: tuple[Endpoint, ...], check_s: float = CHECK_S) -> None:
        """For ever. `others` are in the network anyway."""
        while True:
            await asyncio.sleep(check_s)
            if not self._file.changed():
                continue
            before = set(self.endpoints)
            try:
                self._reload()
            except OSError:  # gone again since
                continue
            for endpoint in before - set(self.endpoints) - set(others):
                network.remove(endpoint)
            for endpoint in self.endpoints:
                if endpoint not in before and endpoint not in others:
                    network.add(endpoint)


class Admission:
    """The miners that --admit lets register and pull. The file is checked for changes at each call."""

    def __init__(self, admit: str, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        """Raises ValueError where there is no such file."""
        self._file: ListFile | None = None  # of everyone
        self._clock, self._checked_at, self._hotkeys = clock, clock(), frozenset[str]()
        if admit != EVERYONE:
            self._file = ListFile(WatchedFile("--admit", Path(admit), "an ss58 address"), say, _check_address)
            self._hotkeys = frozenset(self._file.entries())

    def admits(self, hotkey: Hotkey) -> bool:
        if self._file is None:
            return True
        if self._clock() - self._checked_at >= CHECK_S:
            self._checked_at = self._clock()
            if self._file.changed():
                with contextlib.suppress(OSError):  # gone again since
                    self._hotkeys = frozenset(self._file.entries())
        return hotkey in self._hotkeys

    def check(self, caller: Hotkey) -> None:
        """Raises Refused 403 for one that may not call."""
        if not self.admits(caller):
            raise Refused(403, f"{one_line(caller)} is not among those that this validator's --admit names")

    def admit(self, caller: Hotkey) -> None:
        self.check(caller)


def _check_address(line: str) -> None:
    if not is_hotkey(line):
        raise ValueError(f"{one_line(line)!r} is no ss58 address")
