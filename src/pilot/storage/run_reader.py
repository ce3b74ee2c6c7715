"""What a run left on disk, read by its own SQL, with each signed message checked as it is read.

No row is believed that the signed messages do not bear out. The evidence stays as it is: what is opened is a copy,
whose payloads and snapshots are links to the files.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pilot.common.files import FileLock
from pilot.interfaces import ReceivedReply
from pilot.storage import LEDGER
from pilot.storage.ledger import Ledger
from pilot.storage.snapshots import Snapshots
from pilot.storage.spool import Spool
from protocol import Digest, Hotkey, Message, Order, ProtocolError, Range, Receipt, Reply, Signed, Update

M = TypeVar("M", bound=Message)
Place = tuple[int, Hotkey]  # round and miner


class MessageVerifier(Protocol):
    """The checked message of an envelope by this signer (pilot.transport.auth.unseal). Raises ProtocolError."""

    def __call__(self, signed: Signed, cls: type[M], signer: Hotkey) -> M: ...


@dataclass(frozen=True)
class Violation:
    """A broken rule, where, and in one line how."""

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
    """A run's records, and what was wrong with them already as they were read."""

    verify_message: MessageVerifier
    meta: dict[str, str] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    weights: dict[int, dict[Hotkey, float]] = field(default_factory=dict)
    orders: dict[Place, Order] = field(default_factory=dict)
    names: dict[Place, Digest] = field(default_factory=dict)  # of the orders
    receipts: dict[Place, Receipt] = field(
        default_factory=dict
    )  # at their orders' places; `round` is what settled them
    signed: dict[Place, Signed] = field(default_factory=dict)  # the receipts' envelopes
    late: dict[Place, tuple[Reply, Receipt]] = field(default_factory=dict)
    spooled: dict[Place, ReceivedReply] = field(default_factory=dict)
    snapshots: dict[int, str] = field(default_factory=dict)  # version by round
    validator: Hotkey = ""
    run: str = ""
    signatures: int = 0
    wrong: list[Violation] = field(default_factory=list)

    def open(self, signed: Signed, cls: type[M], signer: Hotkey, place: Place) -> M | None:
        """The message; None where nothing can be made of its body."""
        self.signatures += 1
        try:
            message = self.verify_message(signed, cls, signer)
        except ProtocolError as error:
            self.wrong.append(Violation("signature", *place, str(error)))
            try:
                message = cls.parse(signed.body)
            except ProtocolError:
                return None
        said = tuple(getattr(message, name) for name in ("run", "round", "hotkey"))
        if said != (self.run, *place):
            text = f"{cls.kind} in its place is of run {said[0]}, round {said[1]}, {said[2][:8]}"
            self.wrong.append(Violation("signature", *place, text))
        return message

    def carried(self, place: Place) -> bool:
        """An order without a receipt, which may wait for that of the next round: inner steps of the last one."""
        order = self.orders.get(place)
        last = bool(self.rounds) and place[0] == self.rounds[-1].round
        return last and place not in self.receipts and order is not None and order.inner_steps is not None

    def settled(self, place: Place) -> int:
        """The round in which an order got its receipt, or will get it."""
        return self.receipts[place].round if place in self.receipts else place[0] + self.carried(place)

    def accepted(self) -> Iterator[tuple[Place, Receipt]]:
        return ((place, r) for place, r in self.receipts.items() if r.verdict == "ACCEPTED")


@contextmanager
def copy_of_run(folder: Path) -> Iterator[Path]:
    """A copy of a run to open and try things on: a ledger of its own, links to payloads and snapshots."""
    if not (folder / LEDGER).is_file():
        raise ValueError(f"{folder}: there is no run in it; name a folder with a {LEDGER}")
    try:
        lock = FileLock(folder / "lock")
    except BlockingIOError as holder:
        raise ValueError(f"{folder}: a validator (pid {holder}) is using it; check it when that has ended") from None
    try:
        with tempfile.TemporaryDirectory(prefix=".check-", dir=folder.parent) as name:
            copy = Path(name) / folder.name
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
    found = RunRecords(verify_message)
    Ledger(folder / LEDGER).close()  # an older one gets its new tables
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
    if rows:  # who the validator is, and what the run is called, is what most orders say
        found.validator = Counter(row["signer"] for row in rows).most_common(1)[0][0]
        found.run = Counter(json.loads(row["body"]).get("run") for row in rows).most_common(1)[0][0]
    updates: dict[Update, Update] = {}
    for row in rows:
        place, signed = (row["round"], row["hotkey"]), _signed("order", row)
        order = found.open(signed, Order, found.validator, place)
        if order:
            shared = updates.setdefault(order.update, order.update)  # a round's orders have one, of some 4 KB
            order = order.model_copy(update={"update": shared})
            found.orders[place], found.names[place] = order, signed.digest


def _read_receipts(found: RunRecords, db: sqlite3.Connection) -> None:
    for row in db.execute("SELECT * FROM receipts ORDER BY round, hotkey"):
        place, signed = (row["round"], row["hotkey"]), _signed("receipt", row)
        receipt = found.open(signed, Receipt, found.validator, (row["settled"], row["hotkey"]))
        if receipt:
            found.receipts[place], found.signed[place] = receipt, signed
            says = {
                "fault": None if receipt.verdict == "ACCEPTED" else str(receipt.verdict),
                "reason": receipt.reason,
                "done": json.dumps(receipt.done),
                "work": receipt.work,
                "scores": json.dumps(receipt.scores),
                "weight": receipt.weight,
            }
            _compare(found, place, row, says)


def _read_late(found: RunRecords, row: sqlite3.Row, place: Place) -> None:
    try:
        envelopes = Signed.parse(row["reply"]), Signed.parse(row["receipt"])
    except ProtocolError as error:
        found.wrong.append(Violation("signature", *place, f"noted as late: {error}"))
        return
    reply = found.open(envelopes[0], Reply, place[1], place)
    receipt = found.open(envelopes[1], Receipt, found.validator, place)
    if reply and receipt:
        found.late[place] = (reply, receipt)
        _compare(found, place, row, {"done": json.dumps(reply.done), "seconds": receipt.seconds})


def _signed(kind: str, row: sqlite3.Row) -> Signed:
    """As it lies there: whether it is one is what `RunRecords.open` finds out."""
    return Signed.model_construct(kind=kind, signer=row["signer"], body=row["body"], signature=row["signature"])


def _compare(found: RunRecords, place: Place, row: sqlite3.Row, says: Mapping[str, object]) -> None:
    for column, value in says.items():
        if row[column] != value:
            text = f"column {column} is {row[column]!r}, what was signed says {value!r}"
            found.wrong.append(Violation("row", *place, text))


def receipts_of(miner: Path, found: RunRecords) -> Iterator[tuple[Place, Signed, Receipt]]:
    """Of this run, each with its order's place; a miner's last line may be half a line, if it was killed."""
    path, places = miner / "receipts.jsonl", {name: place for place, name in found.names.items()}
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
            yield places.get(receipt.order, said), signed, receipt


def _version_of(snapshot: Path) -> str:
    """As its header says (safetensors: the header's length, then JSON)."""
    with open(snapshot, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return str(header["__metadata__"]["version"])
