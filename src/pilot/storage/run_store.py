"""Keep everything in a run's folder, which one validator at a time may use.

    runs/<name>/ledger.sqlite   what was ordered, accepted and paid; its transaction is what commits a round
                spool/          payloads as they arrived, back to the second-newest snapshot
                snapshots/      the validator's state every so many rounds
                versions/       the states and deltas that lead to the newest version
                clock           with --admit: what the clock has not passed yet (pilot.storage.kept_clock)
                given-up-at-N/  what --resume-at N gave up: the ledger as it was, payloads, snapshots
                lock            held by the validator that uses the folder

A restart loads the newest undamaged snapshot and replays the committed rounds after it from the spool. Everything that
a ledger transaction refers to is durable before it, so a restart works from any state that a SIGKILL leaves behind.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.common.files import NO_SPACE, TEMPORARY, FileLock, make_folder
from pilot.common.paths import PathError
from pilot.interfaces import ReceivedReply, RoundRecord
from pilot.storage import LEDGER
from pilot.storage.blob_store import FileBlobStore
from pilot.storage.ledger import Ledger
from pilot.storage.snapshots import Snapshots
from pilot.storage.spool import Spool
from protocol import PROTOCOL, Hotkey, Signed

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

UNUSABLE = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM})


class DiskFull(PathError):
    """A write to the run's folder failed for lack of space. The text tells the user in one line what to do."""


@contextmanager
def detecting_full_disk(folder: Path) -> Iterator[None]:
    """Raise DiskFull if the block, which writes into a run's folder, fails because the disk is full."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        full = error.errno in NO_SPACE if isinstance(error, OSError) else error.sqlite_errorcode == sqlite3.SQLITE_FULL
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in UNUSABLE:
            raise PathError(f"--runs {folder.parent}: {folder / LEDGER}: {error}; allow it, or name another") from error
        if not full:
            raise
        raise DiskFull(
            f"--runs {folder.parent}: {folder.name}: the disk is full; all committed rounds are safe: "
            "free some space, then --resume"
        ) from error


def remains(folder: Path) -> Path | None:
    """Return a file or folder in a run's folder that only a run which has begun makes, if there is one."""
    made = (path for part in ("snapshots", "spool", "versions") for path in sorted(folder.glob(f"{part}/*")))
    return next((path for path in made if not path.name.endswith(TEMPORARY)), None)


def lost_ledger(folder: Path) -> ValueError:
    return ValueError(
        f"--run {folder.name}: {folder / LEDGER} is gone or empty, but {remains(folder)} of a run is there; restore "
        "the ledger from a backup, or choose another --run"
    )


def missing(folder: Path) -> ValueError:
    return ValueError(f"--run {folder.name}: there is no such run in {folder.parent}; start it without --resume")


def unusable(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"--run {folder.name}: {error.filename}: {error.strerror}; put it right, or choose another --run or --runs"
    )


def check_ledger_is_there(folder: Path) -> None:
    """Raise ValueError if the folder holds what only a run makes, but no ledger."""
    if not (folder / LEDGER).exists() and remains(folder):
        raise lost_ledger(folder)


class RunStore:
    """The `Store` of a run. Make it with `create` or `open`.

    Any thread may call its methods; their effect is durable on return. They raise DiskFull without having written
    anything. The parts are public, for readers that need more than a round does.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.given_up: Path | None = None  # what `give_up` set aside
        try:
            self._lock = FileLock(folder / "lock")
        except BlockingIOError as holder:
            raise ValueError(f"--run {folder.name}: another validator (pid {holder}) is using it") from None
        except OSError as error:
            raise unusable(folder, error) from None
        try:
            with detecting_full_disk(folder):
                self.snapshots = Snapshots(folder / "snapshots", keep)
                self.spool = Spool(folder / "spool")
                self.versions = FileBlobStore(folder / "versions")
                self.ledger = Ledger(folder / LEDGER)
        except OSError as error:
            self._lock.release()
            raise unusable(folder, error) from None
        except (ValueError, DiskFull):
            self._lock.release()
            raise
        # The part of `Store` that writes nothing.
        self.orders = self.ledger.orders
        self.committed = self.ledger.committed
        self.head = self.ledger.head
        self.unsettled = self.ledger.unsettled
        self.payload = self.spool.payload
        self.received = self.spool.received
        self.reply = self.spool.reply
        self.discard = self.spool.discard

    @classmethod
    def create(cls, folder: Path, meta: Mapping[str, str], keep: int) -> RunStore:
        """Create a run described by `meta`, keeping `keep` snapshots. Raises ValueError if it exists.

        `meta` is written last: a folder without it counts as not created, unless it holds what only a run makes.
        """
        check_ledger_is_there(folder)
        store = cls(make_folder(folder), keep)
        try:
            if store.ledger.meta():
                raise ValueError(f"--run {folder.name}: {folder} exists; go on with --resume, or choose another name")
            if remains(folder):
                raise lost_ledger(folder)
        except ValueError:
            store.close()
            raise
        store.set_meta(meta)
        return store

    @classmethod
    def open(cls, folder: Path, keep: int, rounds: int | None = None) -> RunStore:
        """Open the run that `create` made, to go on from its newest round or from its first `rounds` rounds.

        Raises ValueError if there is none, if its ledger is damaged or has lost rounds, or if another validator uses
        it.
        """
        check_ledger_is_there(folder)
        if not (folder / LEDGER).exists():
            raise missing(folder)
        store = cls(folder, keep)
        try:
            store._check(rounds)
        except ValueError:
            store.close()
            raise
        return store

    def _check(self, rounds: int | None) -> None:
        """Check that the ledger is whole, this run's, and as new as the files beside it."""
        name, ledger = self.folder.name, self.folder / LEDGER
        self.ledger.check()
        if not self.ledger.meta():
            raise lost_ledger(self.folder) if remains(self.folder) else missing(self.folder)
        if (protocol := self.ledger.protocol()) not in (None, PROTOCOL):
            raise ValueError(
                f"--run {name}: its messages are of {protocol}, this release speaks {PROTOCOL}; "
                "finish it with the release that it was started with, or start another --run"
            )
        committed = self.ledger.committed_rounds()
        if rounds is not None and rounds > committed:
            raise ValueError(f"--resume-at {rounds}: run {name} has {committed} committed rounds; give at most that")
        newer = self._newer_than_ledger()
        if newer is not None and rounds is None:
            raise ValueError(
                f"--run {name}: {ledger} ends after {committed} rounds, but {newer} is newer: its last rows are gone, "
                f"perhaps with {LEDGER}-wal; restore both from a backup, or give them up with --resume-at {committed}"
            )
        known = {n: self.snapshots.version(n) for n in self.snapshots.rounds() if self.ledger.version(n)}
        if known and all(version and version != self.ledger.version(n) for n, version in known.items()):
            raise ValueError(
                f"--run {name}: {ledger} is of another run: it names other versions than all of its snapshots; "
                "restore it, or choose another --run"
            )

    def _newer_than_ledger(self) -> Path | None:
        """Return a file of a round that the ledger does not know: an order is there before it is sent."""
        committed, ordered = self.ledger.committed_rounds(), self.ledger.newest_ordered()
        snapshots = (
            self.folder / "snapshots" / f"{n:08d}.safetensors" for n in self.snapshots.rounds() if n > committed
        )
        return next(snapshots, self.spool.reply_after(max(ordered, committed - 1)))

    def close(self) -> None:
        self.ledger.close()
        self._lock.release()

    def set_meta(self, values: Mapping[str, str]) -> None:
        """Describe the run: its flags, by name, as JSON."""
        with detecting_full_disk(self.folder):
            self.ledger.set_meta(values)

    # --- a round, in the order of its steps -----------------------------------------------------------------------

    def open_round(self, round: int, orders: Sequence[Signed]) -> None:
        """Record a round's orders before any is sent, in place of all uncommitted rounds from `round` on.

        Replies to later rounds go first: one without an order would look like an order that the ledger has lost.
        """
        self.spool.delete_after(round)
        with detecting_full_disk(self.folder):
            self.ledger.open_round(round, orders)

    def add_orders(self, round: int, orders: Sequence[Signed]) -> None:
        """Record more orders of an open round, for miners that joined later, before any of them is sent."""
        with detecting_full_disk(self.folder):
            self.ledger.add_orders(round, orders)

    def payload_path(self, round: int, hotkey: Hotkey) -> Path:
        """Return the file that the payload of a reply is to be written to; its folder exists."""
        with detecting_full_disk(self.folder):
            return self.spool.payload_path(round, hotkey)

    def make_durable(self, *received: ReceivedReply) -> None:
        """Make replies, and their payloads in their `payload_path`, durable. From then on they count as received."""
        with detecting_full_disk(self.folder):
            self.spool.make_durable(*received)

    def commit(self, record: RoundRecord) -> None:
        with detecting_full_disk(self.folder):
            self.ledger.commit(record)

    def give_up(self, rounds: int) -> None:
        """Keep only the first `rounds` rounds. What comes after, and the ledger as it was, lie aside from then on."""
        if rounds == self.ledger.committed_rounds() and self._newer_than_ledger() is None:
            return
        aside = self.folder / f"given-up-at-{rounds}"
        number = 1
        while aside.exists():
            aside, number = aside.with_name(f"given-up-at-{rounds}-{number + 1}"), number + 1
        with detecting_full_disk(self.folder):
            make_folder(aside)
            self.snapshots.set_aside(rounds, aside / "snapshots")
            self.spool.set_aside(rounds, aside / "spool")
            self.ledger.truncate(rounds, aside / LEDGER)
        self.given_up = aside

    def note_late(self, round: int, reply: Signed, receipt: Signed) -> None:
        """Record a reply that came after its round was closed, and its receipt; the first one per order is kept."""
        with detecting_full_disk(self.folder):
            self.ledger.note_late(round, reply, receipt)

    # --- once in a while ------------------------------------------------------------------------------------------

    def add_evaluation(self, round: int, values: Mapping[str, float]) -> None:
        """Record what the model scored after `round` rounds."""
        with detecting_full_disk(self.folder):
            self.ledger.add_evaluation(round, values)

    def save_snapshot(self, round: int, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Path:
        """Save the state after `round` rounds, then delete the payloads that no snapshot needs any more.

        The versions' bytes are made durable first: a replay makes those that come after the snapshot again.
        """
        with detecting_full_disk(self.folder):
            self.versions.sync()
            path = self.snapshots.save(round, header, tensors)
        self.prune()
        return path

    def load_snapshot(self, load: Callable[[Mapping[str, str], Mapping[str, torch.Tensor]], object]) -> int | None:
        """Pass the newest intact snapshot to `load`, and return how many rounds it holds; None if there is none."""
        snapshot = self.snapshots.newest(logger.warning)
        if snapshot is None:
            return None
        load(snapshot.header, snapshot.tensors)
        return snapshot.round

    def prune(self) -> None:
        """Delete the payloads that a restart from either of the two newest snapshots does not need."""
        rounds = self.snapshots.rounds()
        if len(rounds) >= 2:
            self.spool.prune(before=self.ledger.oldest_needed(rounds[-2]))
