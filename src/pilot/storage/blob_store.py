"""The bytes of the chain of versions, a file each: what a restart finds need not be made, or sent to anybody, again.

    versions/<digest>    a delta, or the whole state of a snapshot, as miners get it

Files appear whole. They are not durable by themselves: what comes after a snapshot of the validator a replay makes
again, so `sync` before one is all that a power cut leaves to be done.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from typing_extensions import Buffer

from pilot.common.files import hash_rest, make_folder, replacing, sync_file
from protocol import BlobRef, Digest, Hasher


class FileBlobStore:
    """A `pilot.interfaces.Keep`."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder)

    def put(self, ref: BlobRef, data: Buffer) -> Buffer:
        """The same bytes, mapped: their pages are the kernel's to drop. Raises OSError; then the file is not there."""
        path = self._folder / ref.digest
        with replacing(path, sync=False) as file:
            file.write(data)
        return _mapped(path)

    def get(self, ref: BlobRef) -> Buffer | None:
        """None where the file is not here, or is not what its name says."""
        path, hasher = self._folder / ref.digest, Hasher(ref.kind)
        try:
            with open(path, "rb") as file:
                hash_rest(file, hasher)
        except FileNotFoundError:
            return None
        return _mapped(path) if hasher.hexdigest() == ref.digest else None

    def retain(self, digests: Collection[Digest]) -> None:
        for path in self._folder.iterdir():
            if path.name not in digests:
                path.unlink()

    def sync(self) -> None:
        """Everything that is here is durable."""
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # it has taken its name since
                sync_file(path)
        sync_file(self._folder)


def _mapped(path: Path) -> Buffer:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
