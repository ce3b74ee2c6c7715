"""Model states on their way into a miner: received into memory that is used again, held until they are in the model."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from typing_extensions import Buffer

from protocol import BlobRef, Digest, Hasher, ProtocolError


class StateWriter:
    """A model state on its way into memory, hashed as it comes; `whole` once it is what the order named."""

    def __init__(self, ref: BlobRef, buffer: memoryview) -> None:
        self.ref, self.buffer = ref, buffer
        self.held = 0
        self.whole = False
        self.hasher = Hasher("state")

    def write(self, chunk: Buffer) -> None:
        data = memoryview(chunk).cast("B")
        end = self.held + len(data)
        if end > self.ref.bytes:
            self._restart()
            raise ProtocolError(f"state: more than the {self.ref.bytes} bytes promised")
        there = np.frombuffer(self.buffer, np.uint8)[self.held : end]
        np.copyto(there, np.frombuffer(data, np.uint8))  # lets go of the GIL, which a slice of memoryviews does not
        self.hasher.update(data)
        self.held = end

    def commit(self) -> None:
        if self.held != self.ref.bytes or self.hasher.hexdigest() != self.ref.digest:
            held = self.held
            self._restart()
            raise ProtocolError(f"state: {held} bytes that are not the {self.ref.bytes} that the order names")
        self.whole = True

    def _restart(self) -> None:
        self.held, self.hasher = 0, Hasher("state")

    def abort(self) -> None:
        """Nothing to clear away: the memory goes with its last user."""


class States:
    """The states that jobs still need: one, or two where an order waits behind another."""

    def __init__(self) -> None:
        self._whole: dict[Digest, memoryview] = {}
        self._newest: Digest | None = None
        self._spare: memoryview | None = None  # pages that need no clearing again

    def __contains__(self, name: Digest) -> bool:
        return name in self._whole

    def writer(self, ref: BlobRef) -> StateWriter:
        buffer, self._spare = self._spare, None  # a second writer of the same state gets memory of its own
        if buffer is None or len(buffer) != ref.bytes:
            buffer = np.empty(ref.bytes, np.uint8).data
        return StateWriter(ref, buffer)

    def adopt(self, writer: StateWriter) -> None:
        """One that is whole."""
        self._newest = writer.ref.digest
        self._whole[writer.ref.digest] = writer.buffer

    def get(self, name: Digest) -> memoryview | None:
        return self._whole.get(name)

    def keep(self, needed: Collection[Digest], loaded: Digest | None) -> None:
        """Those that are needed, and the newest, unless they are in the model; the others' memory is the next one's."""
        for name in list(self._whole):
            if name == loaded or name not in (*needed, self._newest):
                self._spare = self._whole.pop(name)
