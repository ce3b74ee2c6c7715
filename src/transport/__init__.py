"""The wire: the only place that knows HTTP and signatures. What crosses its border inwards is typed and verified.

auth        envelopes and signed requests (btauth/1), who may call
door        an HTTP server's outside: connections, patience and answers are rationed
server      and its inside: who calls, and what they send
axon        a miner's server: bytes → typed messages → `Service` → signed envelopes
desk        a validator's, for miners that announce themselves or pull
health      GET /v1/status, by itself: a validator's
peer        signed requests to an endpoint, and its clock
contact     one miner as its validator sees it: a `Peer`, or a `Mailbox`
exchange    one order's whole way to a miner and back, whatever breaks on it
mailbox     the same where the miner makes every request
dendrite    the validator's client: hello, pinned hotkeys, the miners that are there
roster      who may come, and where they are, from watched files
announcer   a miner tells its validator that it is there
puller      a miner fetches its orders and brings its work
membership  the two of them
pump        bulk off the event loop, and a floor under its speed
links       how fast and reliable a line is, for loopback
loopback    the same network inside one process, under a virtual clock
wallets     key files
tls         certificates
"""

from __future__ import annotations

from typing import Protocol

from typing_extensions import Buffer

from protocol import BlobRef, Digest, Health, Hello, Hotkey, Order, Receipt, Reply, Signed, Status, Stop

ANNOUNCE_S = 5.0  # between two announcements of a miner


class BlobWriter(Protocol):
    """Takes a blob's bytes in order, in a thread. The sender may go at any time: what is held waits for its return."""

    @property
    def held(self) -> int:
        """Bytes that are here, from the blob's start."""

    def write(self, chunk: Buffer) -> None:
        """Raises ProtocolError beyond the blob's length, OSError."""

    def commit(self) -> None:
        """All is written: keep the blob. Raises ProtocolError for another length or digest: then none is held."""


class Service(Protocol):
    """What a miner answers, in typed messages from callers whose signatures and rights are already checked.

    Every method may raise Refused. The same order twice is one job: a caller that lost an answer sends it again.
    """

    hotkey: Hotkey

    def hello(self, nonce: str) -> Hello: ...

    def status(self) -> Status: ...

    def health(self) -> Health: ...

    def order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
        """Accepts at once and works in the background. Raises Refused: 409 BUSY, WRONG_DATA or `missing`; 400."""

    def receive(self, caller: Hotkey, ref: BlobRef, offset: int) -> BlobWriter:
        """Where to put a blob that is about to arrive from `offset` on; only one writer at a time.

        Raises Refused for one that nobody asked for, and 409 with `held` where another offset is due.
        """

    async def reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        """The reply, or None while the work still goes on after `wait_s` seconds. Raises Refused 404: no such order."""

    def payload(self, caller: Hotkey, order: Digest) -> Buffer:
        """The bytes that the reply's `payload_digest` names. Raises Refused 404."""

    def delivered(self, caller: Hotkey, order: Digest) -> None:
        """The payload's last byte has left."""

    def stop(self, caller: Hotkey, stop: Stop) -> Status: ...

    def receipt(self, caller: Hotkey, receipt: Receipt, signed: Signed) -> Status:
        """Returns when the receipt is durable; called in a thread."""
