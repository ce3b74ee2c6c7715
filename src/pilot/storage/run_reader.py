"""Read a run's records from disk for the checker, and verify each signed message on the way.

Uses SQL of its own, and compares every row with its signed message. The run's folder stays unchanged: what is opened is
a copy, whose payloads and snapshots are hard links.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pilot.common.files import FileLock, temporary_folder
from pilot.interfaces import ReceivedReply
from pilot.storage import LEDGER
from pilot.storage.ledger import Ledger
from pilot.storage.snapshots import Snapshots
from pilot.storage.spool import Spool
from protocol import Digest, Hotkey, Message, Order, ProtocolError, Range, Receipt, Reply, Signed, Update

M = TypeVar("M", bound=Message)
OrderKey = tuple[int, Hotkey]  # round and miner: there is one order for each


class MessageVerifier(Protocol):
    """Open an envelope signed by `signer` (pilot.transport.auth.verify_message). Raises ProtocolError."""

    def __call__(self, signed: Signed, cls: type[M], signer: Hotkey) -> M: ...


@dataclass(frozen=True)
class Violation:
    """A broken rule: where, and in one line how."""

    rule: str
    round: int | None
    hotkey: Hotkey | None
    text: str

    def __str__(self) -> str:
        where = "" if self.round is None else f" round {self.round}"
        return f"{self.rule}:{where}{f' {self.hotkey[:8]}' if self.hotkey else ''}: {self.text}"


@dataclass(frozen=True)
class Round:
    """A committed round's own row."""

    round: int
    version: str
    next: int
    returned: tuple[Range, ...]
    ranker: dict[str, Any]
    metrics: dict[str, Any]


@dataclass
class RunRecords:
    """A run's records, and the violations found while reading them (`wrong`)."""

    verify_message: MessageVerifier
    meta: dict[str, str] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    weights: dict[int, dict[Hotkey, float]] = field(default_factory=dict)
    orders: dict[OrderKey, Order] = field(default_factory=dict)
    order_digests: dict[OrderKey, Digest] = field(default_factory=dict)
    receipts: dict[OrderKey, Receipt] = field(
        default_factory=dict
    )  # by order; their `round` is the one that settled it
    signed: dict[OrderKey, Signed] = field(default_factory=dict)  # the receipts' envelopes
    late: dict[OrderKey, tuple[Reply, Receipt]] = field(default_factory=dict)
    spooled: dict[OrderKey, ReceivedReply] = field(default_factory=dict)
    snapshots: dict[int, str] = field(default_factory=dict)  # version by round
    validator: Hotkey = ""
    run: str = ""
    signatures: int = 0
    wrong: list[Violation] = field(default_factory=list)

    def open(self, signed: Signed, cls: type[M], signer: Hotkey, key: OrderKey) -> M | None:
        """Verify and parse an envelope, noting violations. Returns None if its body cannot be parsed."""
        self.signatures += 1
        try:
            message = self.verify_message(signed, cls, signer)
        except ProtocolError as error:
            self.wrong.append(Violation("signature", *key, str(error)))
            try:
                message = cls.parse(signed.body)
            except ProtocolError:
                return None
        identity = tuple(getattr(message, name) for name in ("run", "round", "hotkey"))
        if identity != (self.run, *key):
            text = f"the {cls.kind} recorded here is of run {identity[0]}, round {identity[1]}, {identity[2][:8]}"
            self.wrong.append(Violation("signature", *key, text))
        return message

    def carried(self, key: OrderKey) -> bool:
        """Return whether an order without a receipt may be settled by the next round: inner steps of the last round."""
        order = self.orders.get(key)
        last = bool(self.rounds) and key[0] == self.rounds[-1].round
        return last and key not in self.receipts and order is not None and order.inner_steps is not None

    def settled(self, key: OrderKey) -> int:
        """Return the round that settles an order."""
        return self.receipts[key].round if key in self.receipts else key[0] + self.carried(key)

    def accepted(self) -> Iterator[tuple[OrderKey, Receipt]]:
        return ((key, r) for key, r in self.receipts.items() if r.verdict == "ACCEPTED")


@contextmanager
def copy_of_run(folder: Path) -> Iterator[Path]:
    """Make a temporary copy of a run: a ledger of its own, and hard links to payloads and snapshots.

    Raises ValueError if there is no run, or a validator is using it.
    """
    if not (folder / LEDGER).is_file():
        raise ValueError(f"{folder}: there is no run in it; name a folder with a {LEDGER}")
    try:
        lock = FileLock(folder / "lock")
    except BlockingIOError as holder:
        raise ValueError(f"{folder}: a validator (pid {holder}) is using it; check it once that has ended") from None
    try:
        with temporary_folder(".check-", folder.parent) as name:
            copy = name / folder.name
            for part in ("spool", "snapshots"):
                if (folder / part).is_dir():
                    shutil.copytree(folder / part, copy / part, copy_function=os.link)
            for path in folder.glob(f"{LEDGER}*"):
                if not path.name.endswith("-shm"):
                    shutil.copyfile(path, copy / path.name)
            yield copy
    finally:
        lock.release()


def read(folder: Path, verify_message: MessageVerifier) -> RunRecords:
    """Read the records of a copy of a run, which reading may change."""
    found = RunRecords(verify_message)
    Ledger(folder / LEDGER).close()  # adds the tables that an older schema lacks
    with closing(sqlite3.connect(folder / LEDGER)) as db:
        db.row_factory = sqlite3.Row
        found.meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
        _read_rounds(found, db)
        _read_orders(found, db)
        _read_receipts(found, db)
        for row in db.execute("SELECT * FROM late ORDER BY round, hotkey"):
            _read_late(found, row, (row["round"], row["hotkey"]))
    spool = Spool(folder / "spool")
    for round in sorted(int(path.name) for path in (folder / "spool").iterdir() if path.name.isdecimal()):
        for received in spool.received(round):
            found.open(received.signed, Reply, received.reply.hotkey, (round, received.reply.hotkey))
            found.spooled[round, received.reply.hotkey] = received
    for round in Snapshots(folder / "snapshots", 2).rounds():
        found.snapshots[round] = _version_of(folder / "snapshots" / f"{round:08d}.safetensors")
    return found


def _read_rounds(found: RunRecords, db: sqlite3.Connection) -> None:
    for row in db.execute("SELECT * FROM rounds ORDER BY round"):
        cursor = json.loads(row["cursor"])
        returned = tuple(Range(*r) for r in cursor["returned"])
        ranker, metrics = json.loads(row["ranker"]), json.loads(row["metrics"])
        found.rounds.append(Round(row["round"], row["version"], cursor["next"], returned, ranker, metrics))
    for row in db.execute("SELECT * FROM weights"):
        found.weights.setdefault(row["round"], {})[row["hotkey"]] = row["weight"]


def _read_orders(found: RunRecords, db: sqlite3.Connection) -> None:
    rows = db.execute("SELECT * FROM orders ORDER BY round, hotkey").fetchall()
    if rows:  # a damaged order may differ: take the signer and the run that most name
        found.validator = Counter(row["signer"] for row in rows).most_common(1)[0][0]
        found.run = Counter(json.loads(row["body"]).get("run") for row in rows).most_common(1)[0][0]
    updates: dict[Update, Update] = {}
    for row in rows:
        key, signed = (row["round"], row["hotkey"]), _signed("order", row)
        order = found.open(signed, Order, found.validator, key)
        if order:
            shared = updates.setdefault(order.update, order.update)  # a round's orders have one, of some 4 KB
            order = order.model_copy(update={"update": shared})
            found.orders[key], found.order_digests[key] = order, signed.digest


def _read_receipts(found: RunRecords, db: sqlite3.Connection) -> None:
    for row in db.execute("SELECT * FROM receipts ORDER BY round, hotkey"):
        key, signed = (row["round"], row["hotkey"]), _signed("receipt", row)
        receipt = found.open(signed, Receipt, found.validator, (row["settled"], row["hotkey"]))
        if receipt:
            found.receipts[key], found.signed[key] = receipt, signed
            says = {
                "fault": None if receipt.verdict == "ACCEPTED" else str(receipt.verdict),
                "reason": receipt.reason,
                "done": json.dumps(receipt.done),
                "work": receipt.work,
                "scores": json.dumps(receipt.scores),
                "weight": receipt.weight,
            }
            _compare(found, key, row, says)


def _read_late(found: RunRecords, row: sqlite3.Row, key: OrderKey) -> None:
    try:
        envelopes = Signed.parse(row["reply"]), Signed.parse(row["receipt"])
    except ProtocolError as error:
        found.wrong.append(Violation("signature", *key, f"late reply: {error}"))
        return
    reply = found.open(envelopes[0], Reply, key[1], key)
    receipt = found.open(envelopes[1], Receipt, found.validator, key)
    if reply and receipt:
        found.late[key] = (reply, receipt)
        _compare(found, key, row, {"done": json.dumps(reply.done), "seconds": receipt.seconds})


def _signed(kind: str, row: sqlite3.Row) -> Signed:
    """Return a row's envelope without validation, which `RunRecords.open` does."""
    return Signed.model_construct(kind=kind, signer=row["signer"], body=row["body"], signature=row["signature"])


def _compare(found: RunRecords, key: OrderKey, row: sqlite3.Row, says: Mapping[str, object]) -> None:
    for column, value in says.items():
        if row[column] != value:
            text = f"column {column} is {row[column]!r}, the signed message says {value!r}"
            found.wrong.append(Violation("row", *key, text))


def receipts_of(miner: Path, found: RunRecords) -> Iterator[tuple[OrderKey, Signed, Receipt]]:
    """Yield the receipts of this run that a miner keeps, each with its order's key.

    Its last line may be incomplete, if it was killed; that line is skipped.
    """
    path, keys = miner / "receipts.jsonl", {name: key for key, name in found.order_digests.items()}
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines[:-1], 1):
        try:
            signed = Signed.parse(line)
            receipt = Receipt.parse(signed.body)
        except ProtocolError as error:
            found.wrong.append(Violation("lost", None, None, f"{path}, line {number} cannot be read: {error}"))
            continue
        if receipt.run == found.run:
            said = (receipt.round, receipt.hotkey)
            found.open(signed, Receipt, found.validator, said)
            yield keys.get(receipt.order, said), signed, receipt


def _version_of(snapshot: Path) -> str:
    """Return the version in a snapshot's header (safetensors: the length of the JSON, then the JSON)."""
    with open(snapshot, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return str(header["__metadata__"]["version"])
