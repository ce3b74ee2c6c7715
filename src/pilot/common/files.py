"""Files that outlive a SIGKILL and a power cut: whole under their name, or not there at all."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pilot.common.hashing import Hasher

TEMPORARY = ".tmp"
CHUNK_BYTES = 1 << 20


def sync_file(path: Path) -> None:
    """Bring a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents where they are missing, each entry durable."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_file(folder.parent)
    return folder


NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full, or as full as this process may make it


@contextmanager
def replacing(path: Path, sync_folder: bool = True, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write under a temporary name; at the end of the block it is durable and takes the name `path` at once.

    Where the block raises, what lay under `path` stays and the temporary file goes. Without `sync_folder` it is the
    caller who makes the name durable, by `sync_file(path.parent)`; without `sync` it is whole, and nothing durable.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync and sync_folder:
        sync_file(path.parent)


def hash_rest(file: BinaryIO, hasher: Hasher) -> None:
    """Feed `hasher` from the file's position to its end, in constant memory."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        hasher.update(buffer[:count])


class FileLock:
    """Held by one process at a time; the kernel lets go of it when that process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        """Raises BlockingIOError, whose text is the holder's pid, where another holds it."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
