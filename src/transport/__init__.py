"""The wire: the only place that knows HTTP and signatures. What crosses its border inwards is typed and verified.

auth      envelopes and signed requests (btauth/1), who may call
axon      a miner's server: bytes → typed messages → `Service` → signed envelopes
peer      one miner as its caller sees it: an endpoint, signed requests, its clock
dendrite  the validator's client: hello, pinned hotkeys, an order's whole exchange
loopback  the same network inside one process, under a virtual clock
wallets   key files
"""

from __future__ import annotations

from typing import Protocol

from typing_extensions import Buffer

from protocol import BlobRef, Digest, Hello, Hotkey, Order, Receipt, Reply, Signed, Status, Stop


class BlobWriter(Protocol):
    """Takes a blob's bytes as they arrive, in order. Nothing is kept before `commit`."""

    def write(self, chunk: Buffer) -> None: ...

    def commit(self) -> None:
        """All bytes are written: check length and digest, keep the blob. Raises ProtocolError where they differ."""

    def abort(self) -> None:
        """Forget what was written. Comes at most once, instead of a commit or after one that raised."""


class Service(Protocol):
    """What a miner answers, in typed messages from callers whose signatures and rights are already checked.

    Every method may raise Refused. The same order twice is one job: a caller that lost an answer sends it again.
    """

    hotkey: Hotkey

    def hello(self, nonce: str) -> Hello: ...

    def status(self) -> Status: ...

    def order(self, caller: Hotkey, order: Order, digest: Digest) -> Status:
        """Accepts at once and works in the background. Raises Refused: 409 BUSY, WRONG_DATA or `missing`; 400."""

    def receive(self, caller: Hotkey, ref: BlobRef) -> BlobWriter:
        """Where to put a blob that is about to arrive. Raises Refused for one that nobody asked for."""

    async def reply(self, caller: Hotkey, order: Digest, wait_s: float) -> Reply | None:
        """The reply, or None while the work still goes on after `wait_s` seconds. Raises Refused 404: no such order."""

    def payload(self, caller: Hotkey, order: Digest) -> Buffer:
        """The bytes that the reply's `payload_digest` names. Raises Refused 404."""

    def stop(self, caller: Hotkey, stop: Stop) -> Status: ...

    def receipt(self, caller: Hotkey, receipt: Receipt, signed: Signed) -> Status: ...
