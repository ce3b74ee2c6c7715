"""What a miner keeps between rounds: blobs by digest, the validator it serves, and the receipts it got.

    <cache>/blobs/<kind>/<digest>     verified once, when stored
    <cache>/validator                 the pinned hotkey
    <cache>/receipts.jsonl            one signed receipt a line
    <cache>/residual.safetensors      error feedback, where orders ask for it (pilot.storage.residuals)

Model states are no part of it: a miner holds the one it works on in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from collections import deque
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pilot.common.files import TEMPORARY, make_folder, replacing, sync_file
from pilot.interfaces import VerifiedWriter
from pilot.storage.residuals import ResidualFile
from protocol import BlobRef, Digest, Hotkey, ProtocolError, Receipt, Signed

LAST_RECEIPTS = 64

_HOTKEY: TypeAdapter[str] = TypeAdapter(Hotkey)


class FileBlobWriter(VerifiedWriter):
    """Receives a blob into a temporary file, which takes its name with `commit`."""

    def __init__(self, ref: BlobRef, path: Path) -> None:
        super().__init__(ref)
        self._path = path
        descriptor, name = tempfile.mkstemp(suffix=TEMPORARY, dir=path.parent)
        self._temporary = Path(name)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # tells a live writer's file from one that a killed process left

    def commit(self) -> None:
        super().commit()
        self._file.close()
        sync_file(self._path.parent)

    def abort(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _append(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    def _keep(self) -> None:
        os.fsync(self._file.fileno())
        os.replace(self._temporary, self._path)

    def _restart(self) -> None:
        super()._restart()
        self._file.seek(0)
        self._file.truncate()


class FileMinerStore:
    """A miner's folder. Blobs may be read and written from any thread, and by several miners that share the folder."""

    def __init__(self, folder: Path) -> None:
        self._blobs = make_folder(folder / "blobs")
        self._pin = folder / "validator"
        self._receipts = folder / "receipts.jsonl"
        self._last: deque[Digest] | None = None  # receipts; None: not looked at yet
        self._adding = threading.Lock()
        self.residuals = ResidualFile(folder / "residual.safetensors")
        for leftover in self._blobs.glob("*/*" + TEMPORARY):
            _delete_unless_written(leftover)

    def blob(self, ref: BlobRef) -> Path | None:
        """The blob's file, verified when it was stored; None where it is not here. A truncated one is deleted."""
        path = self._blob_path(ref)
        if not path.is_file():
            return None
        if path.stat().st_size != ref.bytes:
            path.unlink(missing_ok=True)
            return None
        return path

    def store(self, ref: BlobRef) -> FileBlobWriter:
        """Begin to store a blob; it is here when the writer's `commit` returns."""
        path = self._blob_path(ref)
        make_folder(path.parent)
        return FileBlobWriter(ref, path)

    def pin(self) -> Hotkey | None:
        """The validator that this miner serves. Raises ValueError where its file is damaged."""
        if not self._pin.is_file():
            return None
        text = self._pin.read_text(errors="replace").strip()
        try:
            return _HOTKEY.validate_python(text)
        except ValidationError:
            raise ValueError(f"{self._pin}: {text[:60]!r} is no hotkey; pin a validator anew with --unpin") from None

    def set_pin(self, hotkey: Hotkey) -> None:
        with replacing(self._pin) as file:
            file.write(_HOTKEY.validate_python(hotkey).encode() + b"\n")

    def unpin(self) -> None:
        self._pin.unlink(missing_ok=True)

    def add_receipt(self, signed: Signed) -> bool:
        """Keep the validator's signed word on what became of a reply. False where it is one of the last ones again."""
        with self._adding:
            torn = self._last is None and self._is_torn()
            if self._last is None:
                self._last = deque((kept.digest for kept in self.receipts()), LAST_RECEIPTS)
            if signed.digest in self._last:
                return False
            with open(self._receipts, "ab") as file:
                if torn:
                    file.write(b"\n")
                file.write(signed.model_dump_json().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._last.append(signed.digest)
            return True

    def _is_torn(self) -> bool:
        """A killed process wrote half of a line."""
        if not self._receipts.is_file() or not self._receipts.stat().st_size:
            return False
        with open(self._receipts, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"

    def receipts(self) -> list[Signed]:
        """The last ones, oldest first; what is none is passed over."""
        if not self._receipts.is_file():
            return []
        kept = []
        with open(self._receipts, "rb") as file:
            for line in deque(file, LAST_RECEIPTS):
                with contextlib.suppress(ProtocolError):
                    signed = Signed.parse(line)
                    Receipt.parse(signed.body)
                    kept.append(signed)
        return kept

    def _blob_path(self, ref: BlobRef) -> Path:
        return self._blobs / ref.kind / ref.digest


def _delete_unless_written(path: Path) -> None:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        path.unlink(missing_ok=True)
