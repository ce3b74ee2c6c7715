"""Download a file over HTTP: resume it, retry it, and check it before it gets its name."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import aiohttp

LONGEST_WAIT_S = 60.0
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=30)
HOPELESS = {400, 401, 403, 404, 410, 451}
SHA256 = re.compile(r"[0-9a-f]{64}")
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class DownloadError(Exception):
    """Say in one line why a file could not be downloaded."""


class _Failed(Exception):
    """An attempt failed; the next one may succeed."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # the server's Retry-After


@dataclass(frozen=True)
class Patience:
    """How many attempts may bring no new byte of a file, and how long to wait between attempts."""

    attempts: int = 5
    wait_s: float = 1.0

    def before(self, attempt: int) -> float:
        """Return the seconds to wait before attempt 1, 2, …: doubled each time, times a random factor."""
        return min(LONGEST_WAIT_S, self.wait_s * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


@dataclass
class File:
    """A file to download. `sha256` is given, or learned from the server; `check` raises ValueError."""

    url: str
    path: Path
    check: Callable[[Path], object]
    sha256: str | None = None
    size: int | None = None  # bytes, once the server has sent it

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")


async def fetch(
    session: aiohttp.ClientSession, file: File, patience: Patience, progress: Callable[[File, int], None]
) -> None:
    """Download the file, continuing what an earlier call left. Calls `progress(file, held)` as it grows.

    Raises DownloadError if it is not available, or another process is downloading it; a partial file stays for later.
    """
    try:
        with _locked(file.part) as part:
            await _patiently(session, file, part, patience, progress)
    except OSError as error:
        raise DownloadError(f"{file.path.name}: {error.strerror or error}") from None


async def _patiently(
    session: aiohttp.ClientSession,
    file: File,
    part: BinaryIO,
    patience: Patience,
    progress: Callable[[File, int], None],
) -> None:
    attempt, best = 0, _end(part)
    while True:
        try:
            await _attempt(session, file, part, progress)
            return
        except (_Failed, aiohttp.ClientError, TimeoutError) as error:
            failure = error
        held = _end(part)
        attempt = 1 if held > best else attempt + 1
        best = max(best, held)
        if attempt >= patience.attempts:
            raise DownloadError(f"{file.path.name}: {_reason(failure)}; given up after {attempt} attempts")
        asked = failure.wait_s if isinstance(failure, _Failed) else 0.0
        await asyncio.sleep(max(asked, patience.before(attempt)))


async def _attempt(
    session: aiohttp.ClientSession, file: File, part: BinaryIO, progress: Callable[[File, int], None]
) -> None:
    held = _end(part)
    headers = {"Range": f"bytes={held}-"} if held else {}
    # "identity", so that lengths and ranges count the file's own bytes
    async with session.get(file.url, headers=headers | {"Accept-Encoding": "identity"}, timeout=TIMEOUT) as response:
        _learn(file, response)
        if response.status == 416:  # the file is complete, or longer than the server's
            if file.size is None or held != file.size:
                _restart(part)
                raise _Failed(f"{held} bytes are not a part of it")
        elif response.status in (200, 206):
            _seek(file, part, response)
            async for chunk in response.content.iter_any():
                part.write(chunk)
                progress(file, part.tell())
        else:
            _refused(file, response)
    part.flush()
    held = _end(part)
    if file.size is not None and held != file.size:
        raise _Failed(f"{held} of {file.size} bytes")  # if too long, the next attempt gets HTTP 416
    await asyncio.to_thread(_finish, file, part)
    progress(file, held)


def _learn(file: File, response: aiohttp.ClientResponse) -> None:
    """Learn size and digest from this response or its redirects: the hub sends them before it redirects."""
    file.size = response.content_length if response.status == 200 else None
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status in (206, 416) and total.isdecimal():
        file.size = int(total)
    for answer in (*response.history, response):
        tag = answer.headers.get("X-Linked-ETag", "").removeprefix("W/").strip('"')
        if file.sha256 is None and SHA256.fullmatch(tag):
            file.sha256 = tag
        linked = answer.headers.get("X-Linked-Size", "")
        if linked.isdecimal():
            file.size = int(linked)


def _seek(file: File, part: BinaryIO, response: aiohttp.ClientResponse) -> None:
    """Seek to where the response's bytes begin: the file's end, or 0 if the server ignores ranges."""
    if response.status == 200:
        if response.content_length not in (None, file.size):
            raise _Failed(f"{response.content_length} bytes, not {file.size}")
        _restart(part)
        return
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != _end(part):
        _restart(part)
        raise _Failed("the server answers with another range than was asked for")


def _refused(file: File, response: aiohttp.ClientResponse) -> None:
    reason = f"HTTP {response.status} {response.reason or ''}".strip()
    if response.status in HOPELESS:
        raise DownloadError(f"{file.path.name}: {reason} from {file.url}")
    after = response.headers.get("Retry-After", "")
    raise _Failed(reason, min(LONGEST_WAIT_S, float(after)) if after.isdecimal() else 0.0)


def _finish(file: File, part: BinaryIO) -> None:
    """Check the whole file and give it its name; delete a wrong one, which resuming could not repair."""
    try:
        if file.sha256 is not None and (found := sha256(file.part)) != file.sha256:
            raise ValueError(f"sha256 is {found[:12]}, not {file.sha256[:12]}")
        file.check(file.part)
    except ValueError as error:
        _restart(part)
        raise _Failed(f"wrong bytes ({error})") from None
    os.fsync(part.fileno())
    os.replace(file.part, file.path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open the partial file for appending, locked against other processes; delete it if it is empty at the end."""
    with _open_locked(path) as part:
        try:
            yield part
        finally:
            part.flush()
            if path.exists() and not _end(part):
                path.unlink()


def _open_locked(path: Path) -> BinaryIO:
    while True:
        part = path.open("ab")
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            part.close()
            raise DownloadError(f"{path.name}: another process is at it") from None
        if _is(path, part):
            return part
        part.close()  # finished and renamed by its holder in the meantime


def _is(path: Path, part: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(part.fileno()))
    except FileNotFoundError:
        return False


def _end(part: BinaryIO) -> int:
    return part.seek(0, os.SEEK_END)


def _restart(part: BinaryIO) -> None:
    part.seek(0)
    part.truncate()


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
