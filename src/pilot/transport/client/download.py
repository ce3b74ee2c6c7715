"""A payload's way into its file: room made while the miner computes, hashed as it comes, resumed where it broke off."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from typing_extensions import Buffer

from pilot.transport.streaming import CHUNK
from protocol import Digest, Hasher, ProtocolError

SMALL = 16 << 20  # bytes for which nothing needs to be made ready


class Download:
    """`held` bytes of the payload are in the file; where it is longer, it has room. For threads, one at a time.

    What an earlier process left in the file is taken for the payload's beginning. Should it turn out to be something
    else, `restart` begins anew.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b" if path.is_file() else "w+b", buffering=0)
        self._hasher = Hasher("payload")
        self.held = 0
        self.ended = False  # nobody needs what `prepare` would make ready
        self.found = False  # some of it was left by an earlier process
        self._expected: Digest | None = None
        self._size = 0

    def wants_preparing(self, size: int) -> bool:
        """Whether `prepare` has anything to do."""
        return size > SMALL or os.fstat(self._file.fileno()).st_size > 0

    def prepare(self, size: int) -> None:
        """Take what is there; have blocks on the disk and pages in memory ready for `size` bytes in all.

        A system clears each page before its first use: at 500 MB that takes a disk's cache 0.1 to 1 s, which is better
        spent before the payload is there. Where memory is scarce it is left to the writes.
        """
        if self.ended:
            return
        self._take_what_is_left()
        if size > SMALL and hasattr(os, "posix_fallocate"):
            with contextlib.suppress(OSError):  # no room for the largest, or not on this file system: writes will tell
                os.posix_fallocate(self._file.fileno(), 0, size)
                if _free_memory() > 2 * size:
                    self._touch()

    def _take_what_is_left(self) -> None:
        end = self._data_end()
        self._file.seek(0)
        buffer = memoryview(bytearray(CHUNK))
        while self.held < end:
            count = self._file.readinto(buffer[: min(CHUNK, end - self.held)])
            self._hasher.update(buffer[:count])
            self.held += count
        self.found = self.held > 0

    def _data_end(self) -> int:
        """The bytes up to the last that is not zero: what follows may be room that was never written to."""
        start = end = os.fstat(self._file.fileno()).st_size
        while start:
            start = max(0, end - CHUNK)
            self._file.seek(start)
            if data := self._file.read(end - start).rstrip(b"\0"):
                return start + len(data)
            end = start
        return 0

    def _touch(self) -> None:
        buffer = bytearray(CHUNK)
        self._file.seek(self.held)
        while self._file.readinto(buffer):
            pass
        self._file.seek(self.held)

    def expect(self, digest: Digest, size: int) -> None:
        """What the payload is; where it was expected to be another, or holds more than that, nothing is held."""
        if self.held > size or self._expected not in (None, digest):
            self.restart()
        self._expected, self._size = digest, size

    def restart(self) -> None:
        self.held, self.found, self._hasher = 0, False, Hasher("payload")

    def write(self, chunk: Buffer) -> None:
        data = memoryview(chunk).cast("B")
        if self.held + len(data) > self._size:
            raise ProtocolError(f"payload: more than the {self._size} bytes signed")
        self._file.seek(self.held)
        while data:
            count = self._file.write(data)
            self._hasher.update(data[:count])
            self.held += count
            data = data[count:]

    def finish(self) -> bool:
        """Whether this is the payload, whole; then the file is no longer than it."""
        if self.held != self._size or self._hasher.hexdigest() != self._expected:
            return False
        self._file.truncate(self._size)
        return True

    def close(self) -> None:
        self._file.close()


def _free_memory() -> int:
    """Bytes that nobody uses, not even for caches; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
