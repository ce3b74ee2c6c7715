"""Write files atomically, sync them to the disk, and lock them."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pilot.common import interrupts
from pilot.common.hashing import Hasher

TEMPORARY = ".tmp"  # the suffix of a file that is being written
CHUNK_BYTES = 1 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, or the process's file size limit


def sync_file(path: Path) -> None:
    """Write a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> Path:
    """Create `folder` and its missing parents durably, for this user alone, and return it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_file(folder.parent)
    return folder


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a folder that lasts for the block. It goes if a signal ends the program, too."""
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name,
        interrupts.undoing(partial(shutil.rmtree, name, ignore_errors=True)),
    ):
        yield Path(name)


@contextmanager
def replacing(path: Path, sync_folder: bool = True, sync: bool = True) -> Iterator[BinaryIO]:
    """Write a file under a temporary name; when the block ends, rename it to `path` atomically and durably.

    If the block raises, `path` stays as it was and the temporary file is deleted. What a killed process left is deleted
    by the next call for the same `path`, or by `delete_leftovers`. Without `sync_folder` the caller makes the new name
    durable with `sync_file(path.parent)`; without `sync` neither bytes nor name are durable.
    """
    delete_leftovers(path.parent, path.name)
    file = open_temporary(path)
    with file:
        try:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    if sync and sync_folder:
        sync_file(path.parent)


def open_temporary(path: Path) -> BinaryIO:
    """Create a file beside `path` with a name that no other writer has, locked for as long as it is open."""
    while True:
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
        file = open(temporary, "xb")  # noqa: SIM115 - the caller closes it
        with suppress(OSError):  # a file system without locks, where leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # deleted as a leftover before it was locked


def delete_leftovers(folder: Path, name: str = "") -> None:
    """Delete the temporary files that killed processes left in a folder, those of all files or of the file `name`."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(TEMPORARY)]
    for path in (folder / leftover for leftover in names if not name or leftover.startswith(f"{name}.")):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # gone, or no file of ours
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:  # its writer is alive
            continue
        finally:
            os.close(descriptor)


def mark_used(path: Path) -> None:
    """Note that a file of a cache is in use, for `evict`."""
    with suppress(OSError):  # deleted just now, or on a disk that is read only
        os.utime(path)


def evict(folder: Path, most_files: int, most_bytes: int, pattern: str = "*") -> None:
    """Delete the files of a cache that were least recently used, until the others are within both bounds."""
    found = []
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another process may delete it
            if not path.name.endswith(TEMPORARY):
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    kept = 0
    for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
        kept += size
        if number >= most_files or kept > most_bytes:
            path.unlink(missing_ok=True)


def delete(path: Path) -> None:
    """Delete a file, or what lies in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hash_rest(file: BinaryIO, hasher: Hasher) -> None:
    """Feed `hasher` from the file's position to its end, in constant memory."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        hasher.update(buffer[:count])


class FileLock:
    """A lock that one process holds at a time; the kernel releases it when that process ends."""

    def __init__(self, path: Path) -> None:
        """Take the lock. Raises BlockingIOError, whose text is the holder's pid, if another process holds it."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise BlockingIOError(pid or "unknown") from None
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._descriptor)
