"""The run's book in SQLite: what was ordered, what came of it, who earned what and why.

    sqlite3 runs/demo/ledger.sqlite "SELECT round, hotkey, fault, reason FROM receipts WHERE fault IS NOT NULL"
    sqlite3 runs/demo/ledger.sqlite "SELECT hotkey, sum(work) FROM receipts GROUP BY hotkey"
    sqlite3 runs/demo/ledger.sqlite "SELECT round, hotkey, done, seconds FROM late"
    sqlite3 runs/demo/ledger.sqlite "SELECT round, settled, hotkey, work FROM receipts WHERE settled > round"

A receipt lies beside its order. `settled` is the round whose commit brought it: the order's own, or the next one where
DiLoCo carried it over; until then the order is out, as those of open rounds are.

One transaction commits a round. Orders, receipts and their signatures are kept as they were signed, so each row is
evidence by itself.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilot.common.files import sync_file
from pilot.interfaces import RoundRecord
from pilot.storage.schema import RELEASES, TABLES, VERSION
from protocol import Digest, Fault, Hotkey, Order, Range, Receipt, Reply, Signed, Version


@dataclass(frozen=True)
class Total:
    """What one miner did in all committed rounds."""

    hotkey: Hotkey
    accepted: int  # replies
    faults: dict[str, int]
    work: int  # examples or tokens
    weight: float  # after the last committed round
    done: int  # micro-batches, accepted
    lost: int  # micro-batches in orders that ended in a fault
    late: int  # micro-batches of these that came after the round was closed


@dataclass(frozen=True)
class Late:
    """Work that a miner sent after its round was closed: it was ordered again, and is in nobody's pay."""

    round: int
    hotkey: Hotkey
    done: tuple[Range, ...]
    seconds: float  # from the order to the reply, on the validator's clock
    reply: Signed
    receipt: Signed


@dataclass(frozen=True)
class Accounting:
    """Micro-batches, each counted once for every order that names it.

    ordered = outstanding + accepted + undone + lost, and lost + undone - reassigned still wait to be ordered again.
    """

    ordered: int
    outstanding: int  # in orders that have no receipt yet
    accepted: int  # in the model
    undone: int  # left out of a reply that was accepted: its time was over
    lost: int  # in orders that ended in a fault
    reassigned: int  # ordered again, after they were undone or lost


# Of a JSON list of ranges, such as receipts.done, the micro-batches in it.
_SIZE = "(SELECT coalesce(sum(json_extract(value, '$[1]') - json_extract(value, '$[0]')), 0) FROM json_each({}))"
_ORDERED, _DONE = _SIZE.format("orders.body, '$.ranges'"), _SIZE.format("receipts.done")
# Those in orders that were settled, by whether the reply was accepted.
_SETTLED = f"""
SELECT fault IS NULL, sum({_ORDERED}) FROM receipts JOIN orders USING (round, hotkey) GROUP BY fault IS NULL
"""
# All that were ever ordered, and how many different ones: of each range what lies beyond all before it.
_DIFFERENT = """
WITH ranges AS (
    SELECT json_extract(value, '$[0]') AS start, json_extract(value, '$[1]') AS stop
    FROM orders, json_each(orders.body, '$.ranges')
), beyond AS (
    SELECT start, stop,
        max(stop) OVER (ORDER BY start, stop ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS reached
    FROM ranges
)
SELECT coalesce(sum(stop - start), 0), coalesce(sum(max(0, stop - max(start, coalesce(reached, 0)))), 0) FROM beyond
"""
_ROUND = "round, version, settings, codec_up, codec_down, cursor, ranker, metrics"
_INSERT_LATE = """
INSERT INTO late (round, hotkey, done, seconds, reply, receipt) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""
# Once a round is not the newest, it keeps the weights of its own miners: a commit must not cost by all that ever came.
_FORGET_WEIGHTS = """
DELETE FROM weights WHERE round = ?1 AND hotkey NOT IN (
    SELECT hotkey FROM receipts WHERE round BETWEEN ?1 - 1 AND ?1 AND settled = ?1
)
"""
_UNSETTLED = """
SELECT orders.signer, orders.body, orders.signature FROM orders LEFT JOIN receipts USING (round, hotkey)
WHERE orders.round = ? AND settled IS NULL ORDER BY hotkey
"""


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Raise ValueError, with the file and the way out, where SQLite finds that a ledger is damaged or none at all."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_CANTOPEN and not path.is_dir()):
            raise
        raise ValueError(
            f"{path}: not a ledger, or damaged, or {path.name}-wal or -shm beside it is ({error}); restore all of "
            "them from a backup, or choose another --run"
        ) from None


class Ledger:
    """Usable from any thread: one connection under one lock, and every write durable when its method returns."""

    def __init__(self, path: Path) -> None:
        """Open the ledger, or make an empty one. Raises ValueError for another schema or a file of another kind."""
        self.newest: tuple[int, Version] | None = None  # the last committed round and its version, without a read
        self.commits: deque[float] = deque(maxlen=20)  # when the last ones of this process were made, monotonic
        self._lock, self._path = threading.Lock(), path
        with naming_damage(path):
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(path)
            except (sqlite3.DatabaseError, ValueError):
                self.close()
                raise

    def _prepare(self, path: Path) -> None:
        for log in (path.with_name(f"{path.name}{ending}") for ending in ("-wal", "-shm")):
            if log.is_dir():  # SQLite would read the ledger without it
                raise ValueError(f"{log}: a folder in the place of a file; restore the file from a backup")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            release = f"Pilot {RELEASES[version]}" if version in RELEASES else "a newer Pilot"
            raise ValueError(
                f"{path}: {release} made this run (ledger schema {version}, this Pilot reads {VERSION}); "
                "finish it with that release, or start another --run"
            )
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")  # in WAL mode NORMAL may lose the last commits
        self._connection.execute("PRAGMA foreign_keys = ON")
        if not version:
            with self._transaction() as db:
                for statement in TABLES.split(";\n"):  # each ends a line
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
        self.newest = _newest(self._connection)

    def check(self) -> None:
        """Raise ValueError if the file is damaged, wherever that is. Reads all of it."""
        with naming_damage(self._path):
            found = [text for (text,) in self._rows("PRAGMA quick_check(1)")]
            if found != ["ok"]:
                raise sqlite3.DatabaseError(" ".join(found[0].split()))

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # --- the run --------------------------------------------------------------------------------------------------

    def meta(self) -> dict[str, str]:
        """What the run is: its flags; empty before its creation."""
        return dict(self._rows("SELECT key, value FROM meta ORDER BY key"))

    def protocol(self) -> str | None:
        """Return the protocol of the newest order; None before the first."""
        rows = self._rows("SELECT json_extract(body, '$.protocol') FROM orders ORDER BY round DESC LIMIT 1")
        return rows[0][0] if rows else None

    def set_meta(self, values: Mapping[str, str]) -> None:
        """At the run's creation, and when it is resumed with other flags."""
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())

    def run(self) -> str | None:
        """Return the name of the run in the newest order; None before the first."""
        rows = self._rows("SELECT json_extract(body, '$.run') FROM orders ORDER BY round DESC LIMIT 1")
        return rows[0][0] if rows else None

    # --- rounds ---------------------------------------------------------------------------------------------------

    def open_round(self, round: int, orders: Sequence[Signed]) -> None:
        """Keep a round's orders, in place of those of any uncommitted round from `round` on.

        An order must be here before it is sent. Raises RuntimeError where the round is committed.
        """
        with self._transaction() as db:
            _check_open(db, round)
            db.execute("DELETE FROM orders WHERE round >= ?", (round,))
            _insert_orders(db, round, orders)

    def add_orders(self, round: int, orders: Sequence[Signed]) -> None:
        """Keep more orders of an open round, of miners that came after it was opened.

        Raises RuntimeError where the round is committed, or a miner has an order in it already: then none is kept.
        """
        with self._transaction() as db:
            _check_open(db, round)
            try:
                _insert_orders(db, round, orders)
            except sqlite3.IntegrityError:
                raise RuntimeError(f"round {round}: a miner has an order already, and gets no other") from None

    def orders(self, round: int) -> tuple[Signed, ...]:
        """In the order of the hotkeys; empty where the round was never opened."""
        rows = self._rows("SELECT signer, body, signature FROM orders WHERE round = ? ORDER BY hotkey", round)
        return tuple(_signed("order", *row) for row in rows)

    def commit(self, record: RoundRecord) -> None:
        """The one transaction that makes a round done.

        Raises RuntimeError unless it follows the last committed one, with a receipt for each order that that one left
        without, and for each of its own, but for those of inner steps.
        """
        with self._transaction() as db:
            if record.round != _next(db):
                raise RuntimeError(f"round {record.round} cannot be committed, the next is {_next(db)}")
            carried = {order.digest for order in _unsettled(db, record.round - 1)}
            receipts = [_receipt_row(record.round, signed, carried) for signed in record.receipts]
            db.execute(
                f"INSERT INTO rounds ({_ROUND}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.round,
                    record.version,
                    json.dumps(dict(record.settings)),
                    record.codec_up,
                    record.codec_down,
                    record.cursor,
                    record.ranker,
                    json.dumps(dict(record.metrics)),
                ),
            )
            db.executemany("INSERT INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", receipts)
            db.executemany(
                "INSERT INTO weights VALUES (?, ?, ?)",
                [(record.round, hotkey, weight) for hotkey, weight in sorted(record.weights.items())],
            )
            db.execute(_FORGET_WEIGHTS, (record.round - 1,))
            for order in (*_unsettled(db, record.round - 1), *_unsettled(db, record.round)):
                what = Order.parse(order.body)
                if what.round < record.round or what.inner_steps is None:
                    raise RuntimeError(f"round {what.round}: the order of {what.hotkey} has no receipt")
        self.commits.append(time.monotonic())

    def committed_rounds(self) -> int:
        with self._lock:
            return _next(self._connection)

    def newest_ordered(self) -> int:
        """Return the newest round that has orders; -1 before the first."""
        [(newest,)] = self._rows("SELECT coalesce(max(round), -1) FROM orders")
        return int(newest)

    def version(self, rounds: int) -> str | None:
        """Return the model's version after so many rounds; None if they were not committed, or for none."""
        rows = self._rows("SELECT version FROM rounds WHERE round = ?", rounds - 1)
        return rows[0][0] if rows else None

    def truncate(self, rounds: int, copy: Path) -> None:
        """Keep only the first `rounds` rounds, and all that was recorded before in a ledger of its own at `copy`."""
        with self._lock:
            self._connection.execute("VACUUM INTO ?", (str(copy),))
        sync_file(copy)
        sync_file(copy.parent)
        with self._transaction() as db:
            db.execute("DELETE FROM late WHERE round >= ?", (rounds,))
            db.execute("DELETE FROM receipts WHERE settled >= ?", (rounds,))
            db.execute("DELETE FROM weights WHERE round >= ?", (rounds,))
            db.execute("DELETE FROM evaluations WHERE round > ?", (rounds,))
            db.execute("DELETE FROM orders WHERE round >= ?", (rounds,))
            db.execute("DELETE FROM rounds WHERE round >= ?", (rounds,))

    def unsettled(self) -> tuple[Signed, ...]:
        """The orders that the last committed round left without a receipt, in the order of the hotkeys."""
        with self._lock:
            return _unsettled(self._connection, _next(self._connection) - 1)

    def head(self) -> RoundRecord | None:
        """The last committed round."""
        [(newest,)] = self._rows("SELECT max(round) FROM rounds")
        return None if newest is None else self.committed(newest)[0]

    def committed(self, since: int) -> list[RoundRecord]:
        """The committed rounds from `since` on, in order."""
        rounds = self._rows(f"SELECT {_ROUND} FROM rounds WHERE round >= ? ORDER BY round", since)
        receipts: dict[int, list[Signed]] = {}
        query = "SELECT settled, signer, body, signature FROM receipts WHERE round >= ? - 1 ORDER BY hotkey, round"
        for round, *row in self._rows(query, since):
            receipts.setdefault(round, []).append(_signed("receipt", *row))
        weights: dict[int, dict[Hotkey, float]] = {}
        for round, hotkey, weight in self._rows(
            "SELECT round, hotkey, weight FROM weights WHERE round >= ? ORDER BY round, hotkey", since
        ):
            weights.setdefault(round, {})[hotkey] = weight
        return [
            RoundRecord(
                round=round,
                version=version,
                settings=json.loads(settings),
                codec_up=codec_up,
                codec_down=codec_down,
                cursor=cursor,
                receipts=tuple(receipts.get(round, ())),
                weights=weights.get(round, {}),
                ranker=ranker,
                metrics=json.loads(metrics),
            )
            for round, version, settings, codec_up, codec_down, cursor, ranker, metrics in rounds
        ]

    def oldest_needed(self, round: int) -> int:
        """The first round whose orders' replies a replay from `round` on needs: that one, or the one before it."""
        query = "SELECT min(round) FROM receipts WHERE round >= ?1 - 1 AND settled >= ?1"
        [(oldest,)] = self._rows(query, round)
        return round if oldest is None else min(round, int(oldest))

    # --- late work ------------------------------------------------------------------------------------------------

    def note_late(self, round: int, reply: Signed, receipt: Signed) -> None:
        """Keep a reply that came after its round was closed, and the receipt that tells its miner so; the first stays.

        Raises RuntimeError where the round is not committed yet, where that miner's work in it was accepted, or where
        the two do not belong together.
        """
        what, verdict = Reply.parse(reply.body), Receipt.parse(receipt.body)
        key = (round, what.hotkey)
        if key != (what.round, verdict.hotkey) or verdict.round != round or verdict.verdict != Fault.LATE:
            raise RuntimeError(f"round {round}: {what.hotkey}'s reply and a receipt {verdict.verdict} do not fit")
        row = (*key, json.dumps(what.done), verdict.seconds, reply.model_dump_json(), receipt.model_dump_json())
        with self._transaction() as db:
            if round >= _next(db):
                raise RuntimeError(f"round {round} is not committed, so nothing is late yet")
            if db.execute("SELECT 1 FROM receipts WHERE (round, hotkey) = (?, ?) AND fault IS NULL", key).fetchone():
                raise RuntimeError(f"round {round}: the work of {what.hotkey} was accepted, it is not late")
            db.execute(_INSERT_LATE, row)

    def late(self) -> list[Late]:
        """All late work, by rounds, in the order of the hotkeys."""
        rows = self._rows("SELECT round, hotkey, done, seconds, reply, receipt FROM late ORDER BY round, hotkey")
        return [
            Late(
                round=round,
                hotkey=hotkey,
                done=tuple(Range(*r) for r in json.loads(done)),
                seconds=seconds,
                reply=Signed.parse(reply),
                receipt=Signed.parse(receipt),
            )
            for round, hotkey, done, seconds, reply, receipt in rows
        ]

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
        """Every miner that was ever ordered or weighed, in the order of the hotkeys. Reads every committed order."""
        weights: dict[str, float] = dict(
            self._rows("SELECT hotkey, weight FROM weights WHERE round = (SELECT max(round) FROM rounds)")
        )
        late = dict(self._rows(f"SELECT hotkey, sum({_SIZE.format('late.done')}) FROM late GROUP BY hotkey"))
        found = {hotkey: Total(hotkey, 0, {}, 0, weight, 0, 0, 0) for hotkey, weight in weights.items()}
        counts = f"""
            SELECT hotkey, fault, count(*), sum(work), sum({_ORDERED}), sum({_DONE})
            FROM receipts JOIN orders USING (round, hotkey) GROUP BY hotkey, fault
        """
        for hotkey, fault, count, work, ordered, done in self._rows(counts):
            before = found.get(hotkey) or Total(hotkey, 0, {}, 0, 0.0, 0, 0, 0)
            found[hotkey] = Total(
                hotkey=hotkey,
                accepted=before.accepted + (0 if fault else count),
                faults=before.faults | ({fault: count} if fault else {}),
                work=before.work + work,
                weight=before.weight,
                done=before.done + done,
                lost=before.lost + (ordered if fault else 0),
                late=late.get(hotkey, 0),
            )
        return [found[hotkey] for hotkey in sorted(found)]

    def late_batches(self) -> int:
        """Micro-batches in all late work."""
        [(batches,)] = self._rows(f"SELECT coalesce(sum({_SIZE.format('late.done')}), 0) FROM late")
        return int(batches)

    def accounting(self) -> Accounting:
        """What became of every micro-batch that was ordered. Reads every order."""
        with self._lock:  # one moment for both
            ordered, different = self._connection.execute(_DIFFERENT).fetchone()
            settled = dict(self._connection.execute(_SETTLED).fetchall())
            [(accepted,)] = self._connection.execute(f"SELECT coalesce(sum({_DONE}), 0) FROM receipts").fetchall()
        answered, lost = settled.get(True, 0), settled.get(False, 0)
        return Accounting(
            ordered=ordered,
            outstanding=ordered - answered - lost,
            accepted=accepted,
            undone=answered - accepted,
            lost=lost,
            reassigned=ordered - different,
        )

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
            self.newest = _newest(self._connection)

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()


def _next(db: sqlite3.Connection) -> int:
    """The round to commit next: rounds are 0, 1, …, without a gap."""
    (next_round,) = db.execute("SELECT coalesce(max(round) + 1, 0) FROM rounds").fetchone()
    return int(next_round)


def _newest(db: sqlite3.Connection) -> tuple[int, Version] | None:
    found: tuple[int, Version] | None = db.execute(
        "SELECT round, version FROM rounds ORDER BY round DESC LIMIT 1"
    ).fetchone()
    return found


def _check_open(db: sqlite3.Connection, round: int) -> None:
    if round < _next(db):
        raise RuntimeError(f"round {round} is committed, its orders cannot change")


def _unsettled(db: sqlite3.Connection, round: int) -> tuple[Signed, ...]:
    return tuple(_signed("order", *row) for row in db.execute(_UNSETTLED, (round,)))


def _insert_orders(db: sqlite3.Connection, round: int, orders: Sequence[Signed]) -> None:
    rows = [(round, Order.parse(o.body).hotkey, o.body, o.signer, o.signature) for o in orders]
    db.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", rows)


def _signed(kind: str, signer: str, body: str, signature: str) -> Signed:
    return Signed(kind=kind, signer=signer, body=body, signature=signature)


def _receipt_row(round: int, signed: Signed, carried: Collection[Digest]) -> tuple[object, ...]:
    """`carried`: orders of the round before that are settled by this one."""
    receipt = Receipt.parse(signed.body)
    if receipt.round != round:
        raise RuntimeError(f"a receipt of round {receipt.round} in the record of round {round}")
    return (
        round - (receipt.order in carried),
        receipt.hotkey,
        None if receipt.verdict == "ACCEPTED" else str(receipt.verdict),
        receipt.reason,
        json.dumps(receipt.done),
        receipt.work,
        json.dumps(receipt.scores),
        json.dumps(receipt.measures),
        receipt.weight,
        signed.body,
        signed.signer,
        signed.signature,
        round,
    )
