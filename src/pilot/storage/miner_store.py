"""The files that a miner keeps: blobs by digest, the validator that it serves, receipts, and error feedback.

    <cache>/blobs/<kind>/<digest>     verified when stored
    <cache>/validator                 the hotkey of the pinned validator
    <cache>/clock                     what the clock has not passed yet (pilot.storage.kept_clock)
    <cache>/receipts.jsonl            one signed receipt a line
    <cache>/residual.safetensors      error feedback, if orders ask for it (pilot.storage.residuals)

States and deltas of the model are not among them: a miner holds them in memory.
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
from typing_extensions import Buffer

from pilot.common.files import TEMPORARY, delete_leftovers, evict, make_folder, mark_used, replacing, sync_file
from pilot.common.limits import Limits
from pilot.interfaces import VerifiedWriter
from pilot.storage.residuals import ResidualFile
from protocol import BlobRef, Digest, Hotkey, ProtocolError, Receipt, Signed

LAST_RECEIPTS = 64
KEPT_BLOBS = 16  # of a kind: a run has one or two

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

    def write(self, chunk: Buffer) -> None:
        try:
            super().write(chunk)
        except ValueError:
            if self._file.closed:  # dropped while its bytes were on the way
                raise ProtocolError(f"this {self.ref.kind} is not wanted any more") from None
            raise

    def commit(self) -> None:
        if self._file.closed:
            raise ProtocolError(f"this {self.ref.kind} is not wanted any more")
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

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder, self._limits = folder, limits or Limits()
        self._blobs = make_folder(folder / "blobs")
        self._pin = folder / "validator"
        self._receipts = folder / "receipts.jsonl"
        self._last: deque[Digest] | None = None  # the last receipts; None: not read yet
        self._adding = threading.Lock()
        self.residuals = ResidualFile(folder / "residual.safetensors")
        for kind in self._blobs.iterdir():
            delete_leftovers(kind)

    def blob(self, ref: BlobRef) -> Path | None:
        """Return the blob's file, which was verified when stored; None if there is none. A truncated one is deleted."""
        path = self._blob_path(ref)
        if not path.is_file():
            return None
        if path.stat().st_size != ref.bytes:
            path.unlink(missing_ok=True)
            return None
        mark_used(path)
        return path

    def store(self, ref: BlobRef) -> FileBlobWriter:
        """Open a writer for a blob, which is stored when its `commit` returns."""
        path = self._blob_path(ref)
        make_folder(path.parent)
        evict(path.parent, KEPT_BLOBS - 1, self._limits.cache_bytes - ref.bytes)
        return FileBlobWriter(ref, path)

    def pin(self) -> Hotkey | None:
        """Return the validator that this miner serves. Raises ValueError if its file is damaged."""
        if not self._pin.is_file():
            return None
        text = self._pin.read_text(encoding="utf-8", errors="replace").strip()
        try:
            return _HOTKEY.validate_python(text)
        except ValidationError:
            raise ValueError(f"{self._pin}: {text[:60]!r} is no hotkey; pin a validator again with --unpin") from None

    def set_pin(self, hotkey: Hotkey) -> None:
        with replacing(self._pin) as file:
            file.write(_HOTKEY.validate_python(hotkey).encode() + b"\n")

    def unpin(self) -> None:
        self._pin.unlink(missing_ok=True)

    def add_receipt(self, signed: Signed) -> bool:
        """Keep a receipt, durably. Returns False if it is among the last ones already."""
        with self._adding:
            torn = self._last is None and self._is_torn()
            if self._last is None:
                self._last = deque((kept.digest for kept in self.receipts()), LAST_RECEIPTS)
            if signed.digest in self._last:
                return False
            line = signed.model_dump_json().encode() + b"\n"
            if self._receipts.is_file() and self._receipts.stat().st_size + len(line) > self._limits.receipts_bytes:
                self._keep_newer_half()
                torn = False
            with open(self._receipts, "ab") as file:
                if torn:
                    file.write(b"\n")
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._last.append(signed.digest)
            return True

    def _keep_newer_half(self) -> None:
        """Drop the older receipts, so that half of what they may take is free."""
        with open(self._receipts, "rb") as file:
            file.seek(-min(self._limits.receipts_bytes // 2, self._receipts.stat().st_size), os.SEEK_END)
            file.readline()  # the rest of a line
            kept = file.read()
        if kept and not kept.endswith(b"\n"):
            kept += b"\n"
        with replacing(self._receipts) as file:
            file.write(kept)

    def _is_torn(self) -> bool:
        """Return whether a killed process wrote half of a line."""
        if not self._receipts.is_file() or not self._receipts.stat().st_size:
            return False
        with open(self._receipts, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"

    def receipts(self) -> list[Signed]:
        """Return the last receipts, oldest first, without lines that are none."""
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
