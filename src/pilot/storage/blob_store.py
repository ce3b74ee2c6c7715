"""The states and deltas that lead to the newest version, a file each, so that a restart need not make them again.

    versions/<digest>    a delta, or the whole state of a snapshot, as miners get it

Files are written atomically, but they are durable only after `sync`, which the validator calls before each of its own
snapshots: a replay makes the blobs that come after one again.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from typing_extensions import Buffer

from pilot.common.files import CHUNK_BYTES, delete, hash_rest, make_folder, replacing, sync_file
from pilot.interfaces import BlobWriter
from protocol import BlobRef, Digest, Hasher


class FileBlobStore:
    """A folder of blobs by digest. A `pilot.interfaces.BlobStore`."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder)

    def put(self, ref: BlobRef, data: Buffer) -> Buffer:
        """Return the same bytes, memory-mapped. Raises OSError; then the file does not exist."""
        path = self._folder / ref.digest
        if path.is_dir():
            delete(path)
        with replacing(path, sync=False) as file:
            file.write(data)
        return _mapped(path)

    def get(self, ref: BlobRef) -> Buffer | None:
        """Return the bytes, memory-mapped; None if the file is missing or has another digest than its name says."""
        path, hasher = self._folder / ref.digest, Hasher(ref.kind)
        try:
            with open(path, "rb") as file:
                hash_rest(file, hasher)
        except (FileNotFoundError, IsADirectoryError):
            return None
        return _mapped(path) if hasher.hexdigest() == ref.digest else None

    def retain(self, digests: Collection[Digest]) -> None:
        for path in self._folder.iterdir():
            if path.name not in digests:
                delete(path)

    def sync(self) -> None:
        """Make every file durable."""
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # a temporary file has been renamed
                sync_file(path)
        sync_file(self._folder)


class FolderSource:
    """A folder of blobs by digest, on a mounted disk or object store, such as a validator's versions/.

    A `pilot.interfaces.BlobSource`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, ref: BlobRef, into: BlobWriter) -> None:
        with open(self._folder / ref.digest, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                into.write(chunk)


def _mapped(path: Path) -> Buffer:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
