"""Limit the bytes, connections, requests and seconds that a peer may use (--limits.…)."""

from __future__ import annotations

from dataclasses import dataclass, fields

GB, MB, KB = 1 << 30, 1 << 20, 1 << 10


@dataclass(frozen=True)
class Limits:
    """Limits on peers. What exceeds one is refused before it is stored, with the reason."""

    header_bytes: int = 8 * KB
    """Bytes of a request's first line, and of each of its header fields."""
    order_bytes: int = 256 * KB
    """Bytes of an order in its envelope."""
    receipt_bytes: int = 256 * KB
    """Bytes of a receipt in its envelope."""
    reply_bytes: int = 256 * KB
    """Bytes of a reply in its envelope."""
    message_bytes: int = 16 * KB
    """Bytes of any other message: hello, status, stop, refusal."""
    state_bytes: int = 16 * GB
    """Bytes of a model state, or of a delta to one, that a miner takes into its memory."""
    data_bytes: int = 64 * MB
    """Bytes of a token file or a vocabulary that a validator hands over."""
    payload_bytes: int = 16 * GB
    """Bytes of an encoded gradient."""
    spool_bytes: int = 0
    """Bytes of all payloads that a run keeps; 0 for as much as the disk holds."""
    reserve_bytes: int = 256 * MB
    """Bytes left free on the disk for the ledger: no payload is taken that would leave less."""

    memory: float = 0.8
    """Memory that the work on an order may take at a miner, up to 1 as a share of what is free, above 1 in bytes."""
    batch_s: float = 600.0
    """Seconds that a micro-batch of an order may take at a miner, as computed from its numbers."""
    deadline_s: float = 21_600.0
    """Seconds after which an order is over for a miner, whatever its deadline says."""

    cache_bytes: int = 32 * GB
    """Bytes of data that a miner keeps from orders; the least recently used goes first."""
    receipts_bytes: int = 64 * MB
    """Bytes of receipts that a miner keeps; then the older half goes."""

    connections: int = 256
    """Open connections in all. When they are used up, the oldest that never sent a valid signature is closed."""
    connections_per_address: int = 64
    """Open connections from one IPv4 address, or the 64-bit network of an IPv6 one."""
    requests_per_peer: int = 8
    """Signed requests of one hotkey at a time."""
    miners: int = 256
    """Miner processes that a validator knows by their announcements, at a time."""
    strangers_per_s: float = 100.0
    """Open requests answered in a second, and other requests of strangers looked at. More have to wait; networks take
    turns."""

    min_rate: float = 10_000.0
    """Bytes a second under which a transfer is cut off, measured over --limits.rate-s."""
    rate_s: float = 10.0
    """Seconds over which the rate is measured."""
    connect_s: float = 5.0
    """Seconds to connect, TLS included."""
    header_s: float = 10.0
    """Seconds in which a connection must bring a whole request head, and may idle between two."""
    message_s: float = 10.0
    """Seconds for a message's body, and for the answer to one."""
    poll_s: float = 2.0
    """Seconds that a request for a reply waits at the miner, at most, before it is told how far the work is."""
    away_s: float = 20.0
    """Seconds without contact after which a miner's part in a round is given up, or a miner serves another validator,
    if the deadline is not over first."""

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a limit that is not above 0."""
        unlimited = ("spool_bytes", "reserve_bytes")
        for field in fields(self):
            value = getattr(self, field.name)
            fine = 0 < value < float("inf") or (value == 0 and field.name in unlimited)  # and no NaN
            if not fine:
                raise ValueError(f"--limits.{field.name.replace('_', '-')} {value}: must be more than 0")

    def blob(self, kind: str) -> int:
        """Return the most bytes of a blob of this kind."""
        return self.state_bytes if kind in ("state", "delta") else self.data_bytes

    def body(self, kind: str) -> int:
        """Return the most bytes of an envelope around a message of this kind."""
        sizes = {"order": self.order_bytes, "receipt": self.receipt_bytes, "reply": self.reply_bytes}
        return sizes.get(kind, self.message_bytes)
