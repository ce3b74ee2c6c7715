"""What transport, market and records hand to each other inside a process; never on the wire as such.

Like `protocol`, at the bottom: no I/O, no keys, and of ours only the messages that it is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from typing_extensions import Buffer

from protocol import BlobRef, Digest, Fault, Hotkey, Reply, Signed, Version, one_line

Blobs = Mapping[Digest, Buffer]  # what the validator can hand over


class Refused(Exception):
    """A request is refused: the HTTP status, and what the refusal says."""

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
    """A peer's part of the round failed; becomes its receipt's verdict, with the reason in one line."""

    def __init__(self, fault: Fault, reason: str) -> None:
        self.fault = fault
        self.reason = one_line(reason)
        super().__init__(f"{fault}: {self.reason}")


@dataclass(frozen=True)
class Link:
    """A miner as its validator sees it at this moment: for display."""

    endpoint: str
    hotkey: Hotkey | None  # None before its first hello
    state: str  # "away", "idle", "ordering", "sending 43 %", "working", "fetching 12 %", "done"
    batches_done: int  # of the present order
    batches: int  # that it has been ordered
    latency_s: float  # of its last short request, there and back; 0 where none was answered yet
    bytes_up: int  # miner to validator, since the start
    bytes_down: int
    up_bps: float = 0.0  # bits a second that its line carries, as measured; 0: not yet
    down_bps: float = 0.0


@dataclass(frozen=True)
class Received:
    """A signed reply whose payload lies whole, with the right digest, in the file that the caller named."""

    reply: Reply
    signed: Signed
    bytes_up: int  # miner to validator
    bytes_down: int  # validator to miner
    seconds: float = 0.0  # from the order to the whole reply, on the validator's clock


@dataclass(frozen=True)
class RoundRecord:
    """A committed round: the one transaction that makes it done."""

    round: int
    version: Version  # after the round; the one before it where no reply was good
    cursor: str  # JSON: the next index to order and the ranges that came back
    receipts: tuple[Signed, ...]  # one an order that it settles, by hotkey and round; those ACCEPTED made the gradient
    weights: Mapping[Hotkey, float]
    ranker: str  # JSON: the ranker's state
    metrics: Mapping[str, float | int | str]


class Diverged(Exception):
    """A step has made NaN or infinity of the model. Its text says in one line what the user does."""
