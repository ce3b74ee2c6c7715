"""A run's folder: the ledger, the spool and the snapshots behind one door, open to one validator at a time.

    runs/<name>/ledger.sqlite   what was ordered, accepted, paid; a round is done when its transaction here is
                versions/       states and deltas by digest, as miners get them
                spool/          payloads as they arrived, back to the second-newest snapshot
                snapshots/      the validator's state every so many rounds
                lock            held by the validator that uses the folder

A restart loads the newest whole snapshot and applies the committed rounds after it from the spool. What a ledger
transaction names is durable before it, so this works from whatever a SIGKILL leaves. A disk that is full raises
`DiskFull`: what was to be written is not there, and all that was committed is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from pilot.common.files import NO_SPACE, FileLock, make_folder
from pilot.common.limits import Limits
from pilot.interfaces import ReceivedReply, RoundRecord
from pilot.storage import LEDGER
from pilot.storage.blob_store import FileBlobStore
from pilot.storage.ledger import Accounting, Late, Ledger, Total
from pilot.storage.snapshots import Snapshot, Snapshots
from pilot.storage.spool import Spool
from protocol import PROTOCOL, Hotkey, Signed

if TYPE_CHECKING:
    import torch


class DiskFull(Exception):
    """There is no room for what was to be written. Its text says in one line what the user does."""


class DiskFullGuard:
    """Around what writes into a run's folder: where it raises because the disk is full, `DiskFull` is raised."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        by_ledger = isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL
        if by_ledger or (isinstance(error, OSError) and error.errno in NO_SPACE):
            raise DiskFull(
                f"{self._folder}: the disk is full; what was committed is whole: free some space, then --resume"
            ) from error


class RunStore:
    """Made by `create` or `open`. Methods may be called from any thread; each is durable when it returns."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._room = folder, DiskFullGuard(folder)
        try:
            self._lock = FileLock(folder / "lock")
        except BlockingIOError as holder:
            raise ValueError(f"--run {folder.name}: another validator (pid {holder}) is using it") from None
        try:
            with self._room:
                self._snapshots = Snapshots(folder / "snapshots", keep)
                self._spool = Spool(folder / "spool")
                self.updates = FileBlobStore(folder / "versions")
                self._ledger = Ledger(folder / LEDGER)
        except (ValueError, DiskFull):
            self._lock.release()
            raise

    @classmethod
    def create(cls, folder: Path, meta: Mapping[str, str], keep: int) -> RunStore:
        """A new run. `meta`, which says what the run is, comes last: a folder without it is not created yet."""
        store = cls(make_folder(folder), keep)
        if store.meta():
            store.close()
            raise ValueError(f"--run {folder.name}: {folder} exists; go on with --resume, or choose another name")
        store.set_meta(meta)
        return store

    @classmethod
    def open(cls, folder: Path, keep: int) -> RunStore:
        """The run that `create` made. Raises ValueError where there is none, or another validator uses it."""
        missing = ValueError(f"--run {folder.name}: there is no such run in {folder.parent}; start it without --resume")
        if not (folder / LEDGER).is_file():
            raise missing
        store = cls(folder, keep)
        if not store.meta():
            store.close()
            raise missing
        if (protocol := store._ledger.protocol()) not in (None, PROTOCOL):
            store.close()
            raise ValueError(
                f"--run {folder.name}: its messages are of {protocol}, this release speaks {PROTOCOL}; "
                "finish it with the release that it was started with, or start another --run"
            )
        return store

    def close(self) -> None:
        self._ledger.close()
        self._lock.release()

    def meta(self) -> dict[str, str]:
        return self._ledger.meta()

    def set_meta(self, values: Mapping[str, str]) -> None:
        with self._room:
            self._ledger.set_meta(values)

    # --- a round, in the order of its life ------------------------------------------------------------------------

    def open_round(self, round: int, orders: Sequence[Signed]) -> None:
        """Before any of the orders is sent. Takes the place of every uncommitted round from `round` on."""
        with self._room:
            self._ledger.open_round(round, orders)

    def add_orders(self, round: int, orders: Sequence[Signed]) -> None:
        """More orders of an open round, of miners that came after it was opened; before any of them is sent."""
        with self._room:
            self._ledger.add_orders(round, orders)

    def orders(self, round: int) -> tuple[Signed, ...]:
        return self._ledger.orders(round)

    def payload_path(self, round: int, hotkey: Hotkey) -> Path:
        """Where a reply's payload is to be written."""
        with self._room:
            return self._spool.payload_path(round, hotkey)

    def make_room(self, path: Path, size: int, limits: Limits) -> None:
        """Before a payload of `size` bytes is written to its `payload_path`. Raises Faulted where it does not fit."""
        self._spool.make_room(path, size, limits)

    def discard(self, round: int, hotkey: Hotkey) -> None:
        """What has come of a payload that will not be finished."""
        self._spool.discard(round, hotkey)

    def payload(self, round: int, hotkey: Hotkey) -> Buffer:
        """The payload in its `payload_path`, mapped."""
        return self._spool.payload(round, hotkey)

    def make_durable(self, *received: ReceivedReply) -> None:
        """Payloads lie whole in their `payload_path`: make them and their replies durable, then count as received."""
        with self._room:
            self._spool.make_durable(*received)

    def received(self, round: int) -> tuple[ReceivedReply, ...]:
        """What a restart finds of a round, in the order of the hotkeys; what is not whole is deleted."""
        return self._spool.received(round)

    def commit(self, record: RoundRecord) -> None:
        with self._room:
            self._ledger.commit(record)

    def committed(self, since: int) -> list[RoundRecord]:
        return self._ledger.committed(since)

    def head(self) -> RoundRecord | None:
        return self._ledger.head()

    def unsettled(self) -> tuple[Signed, ...]:
        """The orders that the last committed round carried into the next."""
        return self._ledger.unsettled()

    # --- once in a while ------------------------------------------------------------------------------------------

    def add_evaluation(self, round: int, values: Mapping[str, float]) -> None:
        with self._room:
            self._ledger.add_evaluation(round, values)

    def evaluations(self) -> dict[int, dict[str, float]]:
        return self._ledger.evaluations()

    def note_late(self, round: int, reply: Signed, receipt: Signed) -> None:
        """A reply that came after its round was closed, and the receipt that tells its miner so; the first stays."""
        with self._room:
            self._ledger.note_late(round, reply, receipt)

    def late(self) -> list[Late]:
        return self._ledger.late()

    def late_batches(self) -> int:
        return self._ledger.late_batches()

    def totals(self) -> list[Total]:
        return self._ledger.totals()

    def accounting(self) -> Accounting:
        return self._ledger.accounting()

    def save_snapshot(self, round: int, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Path:
        """The state with the rounds before `round` applied. Then deletes what of the spool no snapshot needs.

        The chain's bytes are durable before it: a replay makes those that come after it.
        """
        with self._room:
            self.updates.sync()
            path = self._snapshots.save(round, header, tensors)
        self.prune()
        return path

    def newest_snapshot(self, warn: Callable[[str], None]) -> Snapshot | None:
        return self._snapshots.newest(warn)

    def prune(self) -> None:
        """Delete the payloads that neither of the two newest snapshots needs to go on from."""
        rounds = self._snapshots.rounds()
        if len(rounds) >= 2:
            self._spool.prune(before=self._ledger.oldest_needed(rounds[-2]))
