"""The blobs that a miner receives: states and deltas into memory that is reused, data into its store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from pilot.common.limits import Limits
from pilot.interfaces import BlobWriter, Refused, VerifiedWriter
from protocol import BlobRef, Digest, Hotkey

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

    def __init__(
        self,
        buffers: BlobBuffers,
        store: Callable[[BlobRef], BlobWriter],
        clock: Callable[[], float],
        limits: Limits,
    ) -> None:
        """`store` opens a writer for a blob that is not a state or a delta."""
        self._buffers, self._store, self._clock, self._limits = buffers, store, clock, limits
        self._wanted: dict[Digest, BlobRef] = {}
        self._writers: dict[Digest, BlobWriter] = {}
        self._owner: Hotkey | None = None  # the validator whose blobs are wanted
        self._since = self._moved_at = 0.0  # when it was first asked for them; when bytes last came
        self._bytes_seen = 0

    @property
    def sender(self) -> Hotkey | None:
        """Return the validator whose upload is under way. None: there is none, or nothing has come for a while."""
        if not self._wanted:
            return None
        now, held = self._clock(), sum(writer.held for writer in self._writers.values())
        if held != self._bytes_seen:
            self._bytes_seen, self._moved_at = held, now
        idle, whole = now - self._moved_at, now - self._since
        return self._owner if idle < self._limits.away_s and whole < self._limits.deadline_s else None

    def _want(self, owner: Hotkey, refs: Sequence[BlobRef]) -> None:
        """Note whose blobs are wanted now. The time in which they must come does not begin again with each order."""
        if owner != self._owner or not self._wanted:
            self._owner, self._since = owner, self._clock()
            self._moved_at, self._bytes_seen = self._since, 0
        self._wanted = {ref.digest: ref for ref in refs}

    def require(self, caller: Hotkey, needed: Sequence[BlobRef]) -> None:
        """Move the needed states and deltas to the buffers. Raises Refused with the missing ones if any is missing."""
        complete = {d: w for d, w in self._writers.items() if isinstance(w, BufferWriter) and w.complete}
        missing = [ref for ref in needed if ref.digest not in complete]
        self._want(caller, needed if missing else ())
        for ref in () if missing else needed:
            self._buffers.add(complete[ref.digest])
        for digest in self._writers.keys() - self._wanted.keys():
            self._writers.pop(digest).abort()
        if missing:
            held = {digest: writer.held for digest, writer in self._writers.items()}
            raise Refused(409, "send the blobs that are missing, then the order again", missing=missing, held=held)

    def expect(self, caller: Hotkey, ref: BlobRef) -> None:
        """Take one blob ahead of its order, unless others are expected; the next `require` uses or drops it."""
        if not self._wanted:
            self._want(caller, [ref])

    def open_writer(self, caller: Hotkey, ref: BlobRef, offset: int) -> BlobWriter:
        """Raises Refused if no order of the caller asked for the blob, or if another offset is due."""
        if caller != self._owner or self._wanted.get(ref.digest) != ref:
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
