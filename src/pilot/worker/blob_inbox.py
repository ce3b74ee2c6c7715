"""The blobs that a miner receives: states and deltas into memory that is reused, data into its store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from pilot.interfaces import BlobWriter, Refused, VerifiedWriter
from protocol import BlobRef, Digest

IN_MEMORY = ("state", "delta")  # kinds that go into the model, and need no file


class BufferWriter(VerifiedWriter):
    """Receives a state or a delta into memory, and hashes it on the way. `complete` after `commit`."""

    def __init__(self, ref: BlobRef, buffer: memoryview) -> None:
        super().__init__(ref)
        self.buffer = buffer
        self.complete = False

    def abort(self) -> None:
        """Do nothing: the memory is freed with its last user."""

    def _append(self, data: memoryview) -> None:
        target = np.frombuffer(self.buffer, np.uint8)[self.held : self.held + len(data)]
        np.copyto(target, np.frombuffer(data, np.uint8))  # releases the GIL; assigning to a memoryview does not

    def _keep(self) -> None:
        self.complete = True


class BlobBuffers:
    """The complete states and deltas that jobs still need, in memory."""

    def __init__(self) -> None:
        self._buffers: dict[Digest, memoryview] = {}
        self._spare: memoryview | None = None  # its pages are mapped already, so the kernel need not clear new ones

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._buffers

    def open_writer(self, ref: BlobRef) -> BufferWriter:
        buffer, self._spare = self._spare, None
        if buffer is None or len(buffer) != ref.bytes:
            buffer = np.empty(ref.bytes, np.uint8).data
        return BufferWriter(ref, buffer)

    def add(self, writer: BufferWriter) -> None:
        """Add the blob of a complete writer."""
        self._buffers[writer.ref.digest] = writer.buffer

    @property
    def sizes(self) -> dict[Digest, int]:
        """Return the bytes of each blob that is here."""
        return {digest: len(buffer) for digest, buffer in self._buffers.items()}

    def get(self, digest: Digest) -> memoryview | None:
        return self._buffers.get(digest)

    def retain(self, needed: Collection[Digest]) -> None:
        """Drop all others; the memory of one of them is used for the next blob of its size."""
        for digest in list(self._buffers):
            if digest not in needed:
                self._spare = self._buffers.pop(digest)


class BlobInbox:
    """Takes from the validator the blobs that the last refused order lacks, or one that it is told to expect.

    A transfer that breaks off is resumed: what is held of a blob stays while orders still need it.
    """

    def __init__(self, buffers: BlobBuffers, store: Callable[[BlobRef], BlobWriter]) -> None:
        """`store` opens a writer for a blob that is not a state or a delta."""
        self._buffers, self._store = buffers, store
        self._wanted: dict[Digest, BlobRef] = {}
        self._writers: dict[Digest, BlobWriter] = {}

    def require(self, needed: Sequence[BlobRef]) -> None:
        """Move the needed states and deltas to the buffers. Raises Refused with the missing ones if any is missing."""
        complete = {d: w for d, w in self._writers.items() if isinstance(w, BufferWriter) and w.complete}
        missing = [ref for ref in needed if ref.digest not in complete]
        self._wanted = {ref.digest: ref for ref in needed} if missing else {}
        for ref in () if missing else needed:
            self._buffers.add(complete[ref.digest])
        for digest in self._writers.keys() - self._wanted.keys():
            self._writers.pop(digest).abort()
        if missing:
            held = {digest: writer.held for digest, writer in self._writers.items()}
            raise Refused(409, "send the blobs that are missing, then the order again", missing=missing, held=held)

    def expect(self, ref: BlobRef) -> None:
        """Take one blob ahead of its order, unless others are expected; the next `require` uses or drops it."""
        if not self._wanted:
            self._wanted = {ref.digest: ref}

    def open_writer(self, ref: BlobRef, offset: int) -> BlobWriter:
        """Raises Refused if no order asked for the blob, or if another offset is due."""
        if self._wanted.get(ref.digest) != ref:
            raise Refused(409, f"no order asked for this {ref.kind}")
        writer = self._writers.get(ref.digest)
        if offset != (writer.held if writer else 0):
            held = {ref.digest: writer.held} if writer else {}
            raise Refused(409, f"another part of the {ref.kind} is held", missing=[ref], held=held)
        if writer is None:
            writer = self._writers[ref.digest] = self.new_writer(ref)
        return writer

    def new_writer(self, ref: BlobRef) -> BlobWriter:
        return self._buffers.open_writer(ref) if ref.kind in IN_MEMORY else self._store(ref)

    @property
    def held(self) -> dict[Digest, int]:
        """Return how many bytes of each blob are here, those of broken transfers included."""
        return {digest: writer.held for digest, writer in self._writers.items()} | self._buffers.sizes

    @property
    def arriving(self) -> BufferWriter | None:
        """The state or delta that is arriving from the validator."""
        return next((w for w in self._writers.values() if isinstance(w, BufferWriter) and not w.complete), None)
