"""What is on its way into a miner: states and deltas into memory that is used again, data into its cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from typing_extensions import Buffer

from pilot.interfaces import BlobWriter, Refused
from protocol import BlobRef, Digest, Hasher, ProtocolError, VersionStep


class BufferWriter:
    """A state or delta on its way into memory, hashed as it comes; `whole` once it is what the order named."""

    def __init__(self, ref: BlobRef, buffer: memoryview) -> None:
        self.ref, self.buffer = ref, buffer
        self.held = 0
        self.whole = False
        self.hasher = Hasher(ref.kind)

    def write(self, chunk: Buffer) -> None:
        data = memoryview(chunk).cast("B")
        end = self.held + len(data)
        if end > self.ref.bytes:
            self._restart()
            raise ProtocolError(f"{self.ref.kind}: more than the {self.ref.bytes} bytes promised")
        there = np.frombuffer(self.buffer, np.uint8)[self.held : end]
        np.copyto(there, np.frombuffer(data, np.uint8))  # lets go of the GIL, which a slice of memoryviews does not
        self.hasher.update(data)
        self.held = end

    def commit(self) -> None:
        if self.held != self.ref.bytes or self.hasher.hexdigest() != self.ref.digest:
            held, promised = self.held, self.ref.bytes
            self._restart()
            raise ProtocolError(f"{self.ref.kind}: {held} bytes that are not the {promised} that the order names")
        self.whole = True

    def _restart(self) -> None:
        self.held, self.hasher = 0, Hasher(self.ref.kind)

    def abort(self) -> None:
        """Nothing to clear away: the memory goes with its last user."""


class BlobBuffers:
    """Those that are here, whole, and that jobs still need."""

    def __init__(self) -> None:
        self._whole: dict[Digest, memoryview] = {}
        self._spare: memoryview | None = None  # pages that need no clearing again

    def __contains__(self, name: Digest) -> bool:
        return name in self._whole

    def writer(self, ref: BlobRef) -> BufferWriter:
        buffer, self._spare = self._spare, None  # a second writer of the same gets memory of its own
        if buffer is None or len(buffer) != ref.bytes:
            buffer = np.empty(ref.bytes, np.uint8).data
        return BufferWriter(ref, buffer)

    def adopt(self, writer: BufferWriter) -> None:
        """One that is whole."""
        self._whole[writer.ref.digest] = writer.buffer

    def get(self, name: Digest) -> memoryview | None:
        return self._whole.get(name)

    def keep(self, needed: Collection[Digest]) -> None:
        """The others' memory is the next one's."""
        for name in list(self._whole):
            if name not in needed:
                self._spare = self._whole.pop(name)


class BlobInbox:
    """The blobs that the last refused order lacks; nothing else is taken. What is held of one waits for its rest."""

    def __init__(self, states: BlobBuffers, store: Callable[[BlobRef], BlobWriter]) -> None:
        """`store` is for data and vocabularies."""
        self._states, self._store = states, store
        self._wanted: dict[Digest, BlobRef] = {}
        self._writers: dict[Digest, BlobWriter] = {}

    def ask(self, needed: Sequence[BlobRef]) -> None:
        """Raises Refused with those that are missing. States and deltas are taken together, with the last of all."""
        whole = {name: w for name, w in self._writers.items() if isinstance(w, BufferWriter) and w.whole}
        missing = [ref for ref in needed if ref.digest not in whole]
        self._wanted = {ref.digest: ref for ref in needed} if missing else {}
        for ref in () if missing else needed:
            self._states.adopt(whole[ref.digest])
        for name in self._writers.keys() - self._wanted.keys():
            self._writers.pop(name).abort()
        if missing:
            held = {name: writer.held for name, writer in self._writers.items()}
            raise Refused(409, "send the blobs that are missing, then the order again", missing=missing, held=held)

    def receive(self, ref: BlobRef, offset: int) -> BlobWriter:
        """Raises Refused where nobody asked for it, or it does not go on from where it broke off."""
        if self._wanted.get(ref.digest) != ref:
            raise Refused(409, f"no order asked for this {ref.kind}")
        writer = self._writers.get(ref.digest)
        if offset != (writer.held if writer else 0):
            held = {ref.digest: writer.held} if writer else {}
            raise Refused(409, f"another part of the {ref.kind} is held", missing=[ref], held=held)
        if writer is None:
            in_memory = ref.kind in ("state", "delta")
            writer = self._writers[ref.digest] = self._states.writer(ref) if in_memory else self._store(ref)
        return writer

    def missing(self, step: VersionStep) -> int:
        """Bytes of a step that are not here yet."""
        if step.digest in self._states:
            return 0
        writer = self._writers.get(step.digest)
        return step.bytes - (writer.held if writer else 0)

    @property
    def arriving(self) -> BufferWriter | None:
        """The state or delta that is on its way in."""
        return next((w for w in self._writers.values() if isinstance(w, BufferWriter) and not w.whole), None)
