"""Every seam of the marketplace, and the values that cross it.

    Network        the validator's way to its miners            transport.client.dendrite, simulation.network
    Store          the validator's records of a run             storage.run_store
    BlobStore      bytes by digest: states and deltas           storage.blob_store, training.versions
    MinerService   what a miner answers                         worker.worker
    MinerStore     the files that a miner keeps                 storage.miner_store
    BlobSource     blobs from elsewhere than the validator      storage.blob_store
    ResidualStore  a miner's error feedback on disk             storage.residuals

Nothing here does I/O or imports anything of ours but the messages of `protocol`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from typing_extensions import Buffer

from protocol import (
    BlobRef,
    Digest,
    Fault,
    Hasher,
    Health,
    Hello,
    Hotkey,
    Message,
    Order,
    ProtocolError,
    Receipt,
    Reply,
    Signed,
    Status,
    Stop,
    Version,
    one_line,
)

if TYPE_CHECKING:
    import torch

Blobs = Mapping[Digest, Buffer]  # bytes that the validator can send, by digest

ANNOUNCE_S = 5.0  # seconds between two announcements of a miner


# --- errors -----------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """Refuse a request: the HTTP status, the reason, and what the sender can do about it.

    `missing` lists the blobs to send before the order is sent again; `held` says how many bytes of each are here.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        fault: Fault | None = None,
        missing: Iterable[BlobRef] = (),
        held: Mapping[Digest, int] | None = None,
    ) -> None:
        super().__init__(reason)
        self.status, self.reason, self.fault = status, reason, fault
        self.missing, self.held = tuple(missing), dict(held or {})


class Faulted(Exception):
    """End a miner's part of the round with a fault, which becomes the verdict of its receipt."""

    def __init__(self, fault: Fault, reason: str) -> None:
        self.fault = fault
        self.reason = one_line(reason)
        super().__init__(f"{fault}: {self.reason}")


class Diverged(Exception):
    """Report that a step made NaN or infinity of the model. The text tells the user, in one line, what to do."""


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MinerState:
    """Describe a miner as the validator sees it at this moment, for the display."""

    endpoint: str
    hotkey: Hotkey | None  # None before its first hello
    state: str  # "away", "idle", "ordering", "sending 43 %", "working", "fetching 12 %", "done"
    batches_done: int  # batches of the current order
    batches: int  # ordered
    latency_s: float  # round trip of its last short request; 0: not measured yet
    bytes_up: int  # miner to validator, since the start
    bytes_down: int
    up_bps: float = 0.0  # measured bandwidth in bits a second; 0: not measured yet
    down_bps: float = 0.0
    problem: str = ""  # why it is away, if that is known


@dataclass(frozen=True)
class ReceivedReply:
    """Hold a signed reply whose whole payload, with the right digest, lies in the file that the caller named."""

    reply: Reply
    signed: Signed
    bytes_up: int  # miner to validator
    bytes_down: int  # validator to miner
    seconds: float = 0.0  # from the order to the whole reply, on the validator's clock


@dataclass(frozen=True)
class RoundRecord:
    """Hold a committed round: everything that its one ledger transaction writes."""

    round: int
    version: Version  # after the round; unchanged if no reply was good
    settings: Mapping[str, float]  # of the optimizer step: learning rate, momentum, ...
    codec_up: str  # codec of the round's orders
    codec_down: str  # codec of the update that the round makes
    cursor: str  # JSON: the next index to order and the ranges that came back
    receipts: tuple[Signed, ...]  # one for each order it settles, by hotkey and round; the ACCEPTED ones made the step
    weights: Mapping[Hotkey, float]
    ranker: str  # JSON: the ranker's state
    metrics: Mapping[str, float | int | str]


# --- the validator's seams --------------------------------------------------------------------------------------------


class Network(Protocol):
    """Reach the miners: over HTTP (transport.client.dendrite), or under virtual time (simulation.network)."""

    def now(self) -> float: ...
    def sign(self, message: Message) -> Signed: ...
    def peers(self) -> tuple[Hotkey, ...]: ...
    def miner_states(self) -> tuple[MinerState, ...]: ...

    def known_codecs(self, hotkey: Hotkey) -> Sequence[str] | None:
        """Return the codecs that a miner has named, or None before it was heard."""
        ...

    async def wait_for_change(self) -> None: ...

    async def exchange(
        self,
        order: Order,
        signed: Signed,
        blobs: Blobs,
        path: Path,
        largest: int,
        accepted: Callable[[], object],
    ) -> ReceivedReply:
        """Send an order, and receive its reply and payload (at most `largest` bytes) into the file `path`.

        Calls `accepted` when the miner has taken the order. Raises Faulted.
        """
        ...

    async def await_late_reply(self, order: Order, signed: Signed, timeout_s: float) -> Signed | None:
        """Wait for the reply to an order whose round is closed; None if it does not come in time."""
        ...

    async def deliver(self, hotkey: Hotkey, signed: Signed) -> bool:
        """Deliver a receipt or a stop; False if the miner is away or refuses it."""
        ...


class Store(Protocol):
    """Keep what a run must not lose (storage.run_store). Every call returns when its effect is durable."""

    def open_round(self, round: int, orders: Sequence[Signed]) -> None: ...
    def add_orders(self, round: int, orders: Sequence[Signed]) -> None: ...
    def orders(self, round: int) -> tuple[Signed, ...]: ...
    def payload_path(self, round: int, hotkey: Hotkey) -> Path: ...
    def discard(self, round: int, hotkey: Hotkey) -> None: ...
    def payload(self, round: int, hotkey: Hotkey) -> Buffer: ...
    def make_durable(self, *received: ReceivedReply) -> None: ...
    def received(self, round: int) -> tuple[ReceivedReply, ...]: ...
    def reply(self, round: int, hotkey: Hotkey, order: Digest) -> ReceivedReply: ...
    def commit(self, record: RoundRecord) -> None: ...
    def committed(self, since: int) -> Sequence[RoundRecord]: ...
    def head(self) -> RoundRecord | None: ...
    def unsettled(self) -> Sequence[Signed]: ...
    def give_up(self, rounds: int) -> None: ...
    def note_late(self, round: int, reply: Signed, receipt: Signed) -> None: ...

    def load_snapshot(self, load: Callable[[Mapping[str, str], Mapping[str, torch.Tensor]], object]) -> int | None:
        """Pass the newest intact snapshot to `load`, and return how many rounds it holds; None if there is none."""
        ...


class BlobStore(Protocol):
    """Keep blobs by digest: the states and deltas that lead to the newest version (storage.blob_store)."""

    def put(self, ref: BlobRef, data: Buffer) -> Buffer:
        """Keep a blob, and return the same bytes from where they lie now."""
        ...

    def get(self, ref: BlobRef) -> Buffer | None: ...

    def retain(self, digests: Collection[Digest]) -> None:
        """Drop every blob but these."""
        ...


# --- the miner's seams ------------------------------------------------------------------------------------------------


class BlobWriter(Protocol):
    """Take a blob's bytes in order, in a thread. If the sender goes, what is held waits for it to come back."""

    @property
    def held(self) -> int:
        """Return how many bytes, from the blob's start, are here."""

    def write(self, chunk: Buffer) -> None:
        """Append a chunk. Raises ProtocolError beyond the blob's length, and OSError."""

    def commit(self) -> None:
        """Keep the blob. Raises ProtocolError for another length or digest; then nothing is held."""

    def abort(self) -> None:
        """Drop what is held. Does nothing after `commit`."""


class VerifiedWriter(ABC):
    """The checks of a `BlobWriter`: it takes no more bytes than the reference names, and only those of its digest.

    A subclass says where the bytes go. Whenever a check or the subclass fails, nothing is held any more.
    """

    def __init__(self, ref: BlobRef) -> None:
        self.ref, self.held, self._hasher = ref, 0, Hasher(ref.kind)

    def write(self, chunk: Buffer) -> None:
        data = memoryview(chunk).cast("B")
        if self.held + len(data) > self.ref.bytes:
            self._restart()
            raise ProtocolError(f"{self.ref.kind}: more than the {self.ref.bytes} bytes announced")
        try:
            self._append(data)
        except OSError:
            self._restart()
            raise
        self._hasher.update(data)
        self.held += len(data)

    def commit(self) -> None:
        if self.held != self.ref.bytes or self._hasher.hexdigest() != self.ref.digest:
            held = self.held
            self._restart()
            raise ProtocolError(f"{self.ref.kind}: {held} bytes that are not the {self.ref.bytes} announced")
        try:
            self._keep()
        except OSError:
            self._restart()
            raise

    def _restart(self) -> None:
        self.held, self._hasher = 0, Hasher(self.ref.kind)

    @abstractmethod
    def abort(self) -> None:
        """Drop what is held. Does nothing after `commit`."""

    @abstractmethod
    def _append(self, data: memoryview) -> None:
        """Write `data` behind the first `held` bytes."""

    @abstractmethod
    def _keep(self) -> None:
        """Keep the blob, which is whole."""


class BlobSource(Protocol):
    """Give blobs from elsewhere than the validator, which orders name by a `BlobRef.source` (storage.blob_store)."""

    def fetch(self, ref: BlobRef, into: BlobWriter) -> None:
        """Write the blob's bytes; the caller commits. Runs in a thread. Raises OSError, ProtocolError."""
        ...


class MinerService(Protocol):
    """Answer a validator's requests, as typed messages of callers whose signatures and rights are already checked.

    Every method may raise Refused. The same order twice is one job: a caller that lost an answer sends it again.
    """

    hotkey: Hotkey

    def hello(self, nonce: str) -> Hello: ...

    def status(self) -> Status: ...

    def health(self) -> Health: ...

    def accept_order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
        """Accept at once, and work in the background. Raises Refused: 409 BUSY, WRONG_DATA or `missing`; 400."""

    def open_blob(self, caller: Hotkey, ref: BlobRef, offset: int) -> BlobWriter:
        """Open a blob for writing from `offset` on; only one writer at a time.

        Raises Refused for one that nobody asked for, and 409 with `held` if another offset is due.
        """

    async def wait_for_reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        """Return the reply, or None if the work still goes on after `wait_s`. Raises Refused 404: no such order."""

    def read_payload(self, caller: Hotkey, order: Digest) -> Buffer:
        """Return the bytes that the reply's `payload_digest` names. Raises Refused 404."""

    def mark_delivered(self, caller: Hotkey, order: Digest) -> None:
        """Note that the payload's last byte has left."""

    def stop_order(self, caller: Hotkey, stop: Stop) -> Status: ...

    def accept_receipt(self, caller: Hotkey, receipt: Receipt, signed: Signed) -> Status:
        """Keep a receipt; it is durable on return. Called in a thread."""


class ResidualStore(Protocol):
    """Keep a miner's error feedback across restarts (storage.residuals)."""

    def load(self, most: int) -> tuple[str, dict[str, torch.Tensor]] | None:
        """Return what `save` was last given, or None. Raises ValueError if damaged or larger than `most` bytes."""
        ...

    def save(self, header: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write header and tensors atomically. Raises OSError; then nothing is kept any more."""
        ...

    def drop(self) -> None: ...


class MinerStore(Protocol):
    """Keep a miner's files: blobs, receipts, error feedback (storage.miner_store)."""

    def blob(self, ref: BlobRef) -> Path | None: ...
    def store(self, ref: BlobRef) -> BlobWriter: ...
    def add_receipt(self, signed: Signed) -> bool: ...
    def receipts(self) -> Sequence[Signed]: ...
    @property
    def residuals(self) -> ResidualStore: ...
