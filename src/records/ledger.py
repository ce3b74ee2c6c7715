"""The run's book in SQLite: what was ordered, what came of it, who earned what and why.

    sqlite3 runs/demo/ledger.sqlite "SELECT round, hotkey, fault, reason FROM receipts WHERE fault IS NOT NULL"
    sqlite3 runs/demo/ledger.sqlite "SELECT hotkey, sum(work) FROM receipts GROUP BY hotkey"

One transaction commits a round. Orders, receipts and their signatures are kept as they were signed, so each row is
evidence by itself.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import Hotkey, Order, Receipt, Signed
from values import RoundRecord

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY,
    version TEXT NOT NULL,       -- of the model, after the round
    cursor TEXT NOT NULL,        -- JSON: the next index to order, and the ranges that came back
    ranker TEXT NOT NULL,        -- JSON: its state
    metrics TEXT NOT NULL,       -- JSON
    committed_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);
CREATE TABLE orders (            -- of committed rounds and of the open one
    round INTEGER NOT NULL,
    hotkey TEXT NOT NULL,
    body TEXT NOT NULL,
    signer TEXT NOT NULL,
    signature TEXT NOT NULL,
    PRIMARY KEY (round, hotkey)
);
CREATE TABLE receipts (
    round INTEGER NOT NULL REFERENCES rounds (round),
    hotkey TEXT NOT NULL,
    fault TEXT,                  -- NULL: accepted
    reason TEXT NOT NULL,
    done TEXT NOT NULL,          -- JSON: the accepted index ranges [[start, stop], …]
    work INTEGER NOT NULL,       -- examples or tokens in them, by the validator's own count
    scores TEXT NOT NULL,        -- JSON: name to number
    weight REAL NOT NULL,        -- what it earned in this round
    body TEXT NOT NULL,
    signer TEXT NOT NULL,
    signature TEXT NOT NULL,
    PRIMARY KEY (round, hotkey),
    FOREIGN KEY (round, hotkey) REFERENCES orders (round, hotkey)
);
CREATE TABLE weights (           -- of every known miner, ordered in this round or not
    round INTEGER NOT NULL REFERENCES rounds (round),
    hotkey TEXT NOT NULL,
    weight REAL NOT NULL,
    PRIMARY KEY (round, hotkey)
);
CREATE TABLE evaluations (
    round INTEGER NOT NULL,
    name TEXT NOT NULL,
    value REAL,                  -- NULL: not a number
    PRIMARY KEY (round, name)
);
"""


@dataclass(frozen=True)
class Total:
    """What one miner did in all committed rounds."""

    hotkey: Hotkey
    accepted: int  # replies
    faults: dict[str, int]
    work: int  # examples or tokens
    weight: float  # after the last committed round


class Ledger:
    """Usable from any thread: one connection under one lock, and every write durable when its method returns."""

    def __init__(self, path: Path) -> None:
        """Opens the ledger, or makes an empty one. Raises ValueError for a newer schema or a file of another kind."""
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(path)
        except sqlite3.DatabaseError as error:
            self.close()
            raise ValueError(f"{path}: not a ledger ({error}); choose another --run") from None
        except ValueError:
            self.close()
            raise

    def _prepare(self, path: Path) -> None:
        (schema,) = self._connection.execute("PRAGMA user_version").fetchone()
        if schema > SCHEMA_VERSION:
            raise ValueError(
                f"{path}: ledger schema {schema}, this Pilot reads up to {SCHEMA_VERSION}; "
                "update Pilot, or choose another --run"
            )
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")  # in WAL mode NORMAL may lose the last commits
        self._connection.execute("PRAGMA foreign_keys = ON")
        if schema == 0:
            self._connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # --- the run --------------------------------------------------------------------------------------------------

    def meta(self) -> dict[str, str]:
        """What the run is: its flags; empty before its creation."""
        return dict(self._rows("SELECT key, value FROM meta ORDER BY key"))

    def set_meta(self, values: Mapping[str, str]) -> None:
        """At the run's creation, and when it is resumed with other flags."""
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())

    # --- rounds ---------------------------------------------------------------------------------------------------

    def open_round(self, round: int, orders: Sequence[Signed]) -> None:
        """Keep a round's orders, in place of those of any uncommitted round from `round` on.

        An order must be here before it is sent. Raises RuntimeError where the round is committed.
        """
        rows = [(round, Order.parse(o.body).hotkey, o.body, o.signer, o.signature) for o in orders]
        with self._transaction() as db:
            if round < _next(db):
                raise RuntimeError(f"round {round} is committed, its orders cannot change")
            db.execute("DELETE FROM orders WHERE round >= ?", (round,))
            db.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", rows)

    def orders(self, round: int) -> tuple[Signed, ...]:
        """In the order of the hotkeys; empty where the round was never opened."""
        rows = self._rows("SELECT signer, body, signature FROM orders WHERE round = ? ORDER BY hotkey", round)
        return tuple(_signed("order", *row) for row in rows)

    def commit(self, record: RoundRecord) -> None:
        """The one transaction that makes a round done. Raises RuntimeError unless it follows the last committed one."""
        receipts = [_receipt_row(record.round, signed) for signed in record.receipts]
        with self._transaction() as db:
            if record.round != _next(db):
                raise RuntimeError(f"round {record.round} cannot be committed, the next is {_next(db)}")
            db.execute(
                "INSERT INTO rounds (round, version, cursor, ranker, metrics) VALUES (?, ?, ?, ?, ?)",
                (record.round, record.version, record.cursor, record.ranker, json.dumps(dict(record.metrics))),
            )
            db.executemany("INSERT INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", receipts)
            db.executemany(
                "INSERT INTO weights VALUES (?, ?, ?)",
                [(record.round, hotkey, weight) for hotkey, weight in sorted(record.weights.items())],
            )

    def head(self) -> RoundRecord | None:
        """The last committed round."""
        [(newest,)] = self._rows("SELECT max(round) FROM rounds")
        return None if newest is None else self.committed(newest)[0]

    def committed(self, since: int) -> list[RoundRecord]:
        """The committed rounds from `since` on, in order."""
        rounds = self._rows(
            "SELECT round, version, cursor, ranker, metrics FROM rounds WHERE round >= ? ORDER BY round", since
        )
        return [self._record(*row) for row in rounds]

    def _record(self, round: int, version: str, cursor: str, ranker: str, metrics: str) -> RoundRecord:
        receipts = self._rows("SELECT signer, body, signature FROM receipts WHERE round = ? ORDER BY hotkey", round)
        weights = self._rows("SELECT hotkey, weight FROM weights WHERE round = ? ORDER BY hotkey", round)
        return RoundRecord(
            round=round,
            version=version,
            cursor=cursor,
            receipts=tuple(_signed("receipt", *row) for row in receipts),
            weights=dict(weights),
            ranker=ranker,
            metrics=json.loads(metrics),
        )

    # --- evaluations and totals -----------------------------------------------------------------------------------

    def add_evaluation(self, round: int, values: Mapping[str, float]) -> None:
        """What the model scored with `round` rounds applied; said again after a restart, the later value stands."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?)",
                [(round, name, value) for name, value in values.items()],
            )

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Round to name to value, rounds ascending."""
        found: dict[int, dict[str, float]] = {}
        for round, name, value in self._rows("SELECT round, name, value FROM evaluations ORDER BY round, rowid"):
            found.setdefault(round, {})[name] = math.nan if value is None else value
        return found

    def totals(self) -> list[Total]:
        """Every miner that was ever ordered or weighed, in the order of the hotkeys."""
        weights: dict[str, float] = dict(
            self._rows("SELECT hotkey, weight FROM weights WHERE round = (SELECT max(round) FROM rounds)")
        )
        accepted = dict.fromkeys(weights, 0)
        work = dict.fromkeys(weights, 0)
        faults: dict[str, dict[str, int]] = {hotkey: {} for hotkey in weights}
        counts = "SELECT hotkey, fault, count(*), sum(work) FROM receipts GROUP BY hotkey, fault"
        for hotkey, fault, count, worked in self._rows(counts):
            work[hotkey] = work.get(hotkey, 0) + worked
            if fault is None:
                accepted[hotkey] = count
            else:
                faults.setdefault(hotkey, {})[fault] = count
        return [
            Total(hotkey, accepted.get(hotkey, 0), faults.get(hotkey, {}), work[hotkey], weights.get(hotkey, 0.0))
            for hotkey in sorted(work)
        ]

    # --- the connection -------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite may have rolled back itself: disk full
                    self._connection.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()


def _next(db: sqlite3.Connection) -> int:
    """The round to commit next: rounds are 0, 1, …, without a gap."""
    (next_round,) = db.execute("SELECT coalesce(max(round) + 1, 0) FROM rounds").fetchone()
    return int(next_round)


def _signed(kind: str, signer: str, body: str, signature: str) -> Signed:
    return Signed(kind=kind, signer=signer, body=body, signature=signature)


def _receipt_row(round: int, signed: Signed) -> tuple[object, ...]:
    receipt = Receipt.parse(signed.body)
    if receipt.round != round:
        raise RuntimeError(f"a receipt of round {receipt.round} in the record of round {round}")
    return (
        round,
        receipt.hotkey,
        None if receipt.verdict == "ACCEPTED" else str(receipt.verdict),
        receipt.reason,
        json.dumps(receipt.done),
        receipt.work,
        json.dumps(receipt.scores),
        receipt.weight,
        signed.body,
        signed.signer,
        signed.signature,
    )
