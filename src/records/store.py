"""A run's folder: the ledger, the spool and the snapshots behind one door, open to one validator at a time.

    runs/<name>/ledger.sqlite   what was ordered, accepted, paid; a round is done when its transaction here is
                spool/          payloads as they arrived, back to the second-newest snapshot
                snapshots/      the validator's state every so many rounds
                lock            held by the validator that uses the folder

A restart loads the newest whole snapshot and applies the committed rounds after it from the spool. What a ledger
transaction names is durable before it, so this works from whatever a SIGKILL leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from durable import FileLock, make_folder
from limits import Limits
from protocol import Hotkey, Signed
from records.ledger import Ledger, Total
from records.snapshots import Snapshot, Snapshots
from records.spool import Spool
from values import Received, RoundRecord

if TYPE_CHECKING:
    import torch

_LEDGER = "ledger.sqlite"


class Store:
    """Made by `create` or `open`. Methods may be called from any thread; each is durable when it returns."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        try:
            self._lock = FileLock(folder / "lock")
        except BlockingIOError as holder:
            raise ValueError(f"--run {folder.name}: another validator (pid {holder}) is using it") from None
        try:
            self._snapshots = Snapshots(folder / "snapshots", keep)
            self._spool = Spool(folder / "spool")
            self._ledger = Ledger(folder / _LEDGER)
        except ValueError:
            self._lock.release()
            raise

    @classmethod
    def create(cls, folder: Path, meta: Mapping[str, str], keep: int) -> Store:
        """A new run. `meta`, which says what the run is, comes last: a folder without it is not created yet."""
        store = cls(make_folder(folder), keep)
        if store.meta():
            store.close()
            raise ValueError(f"--run {folder.name}: {folder} exists; go on with --resume, or choose another name")
        store.set_meta(meta)
        return store

    @classmethod
    def open(cls, folder: Path, keep: int) -> Store:
        """The run that `create` made. Raises ValueError where there is none, or another validator uses it."""
        missing = ValueError(f"--run {folder.name}: there is no such run in {folder.parent}; start it without --resume")
        if not (folder / _LEDGER).is_file():
            raise missing
        store = cls(folder, keep)
        if not store.meta():
            store.close()
            raise missing
        return store

    def close(self) -> None:
        self._ledger.close()
        self._lock.release()

    def meta(self) -> dict[str, str]:
        return self._ledger.meta()

    def set_meta(self, values: Mapping[str, str]) -> None:
        self._ledger.set_meta(values)

    # --- a round, in the order of its life ------------------------------------------------------------------------

    def open_round(self, round: int, orders: Sequence[Signed]) -> None:
        """Before any of the orders is sent. Takes the place of every uncommitted round from `round` on."""
        self._ledger.open_round(round, orders)

    def orders(self, round: int) -> tuple[Signed, ...]:
        return self._ledger.orders(round)

    def payload_path(self, round: int, hotkey: Hotkey) -> Path:
        """Where a reply's payload is to be written."""
        return self._spool.payload_path(round, hotkey)

    def make_room(self, path: Path, size: int, limits: Limits) -> None:
        """Before a payload of `size` bytes is written to its `payload_path`. Raises Faulted where it does not fit."""
        self._spool.make_room(path, size, limits)

    def payload(self, round: int, hotkey: Hotkey) -> Buffer:
        """The payload in its `payload_path`, mapped."""
        return self._spool.payload(round, hotkey)

    def seal(self, received: Received) -> None:
        """The payload lies whole in its `payload_path`: make it and its reply durable, then count it as received."""
        self._spool.seal(received)

    def received(self, round: int) -> tuple[Received, ...]:
        """What a restart finds of a round, in the order of the hotkeys; what is not whole is deleted."""
        return self._spool.received(round)

    def commit(self, record: RoundRecord) -> None:
        self._ledger.commit(record)

    def committed(self, since: int) -> list[RoundRecord]:
        return self._ledger.committed(since)

    def head(self) -> RoundRecord | None:
        return self._ledger.head()

    # --- once in a while ------------------------------------------------------------------------------------------

    def add_evaluation(self, round: int, values: Mapping[str, float]) -> None:
        self._ledger.add_evaluation(round, values)

    def evaluations(self) -> dict[int, dict[str, float]]:
        return self._ledger.evaluations()

    def totals(self) -> list[Total]:
        return self._ledger.totals()

    def save_snapshot(self, round: int, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Path:
        """The state with the rounds before `round` applied. Then deletes what of the spool no snapshot needs."""
        path = self._snapshots.save(round, header, tensors)
        self.prune()
        return path

    def newest_snapshot(self, warn: Callable[[str], None]) -> Snapshot | None:
        return self._snapshots.newest(warn)

    def prune(self) -> None:
        """Delete the payloads that neither of the two newest snapshots needs to go on from."""
        rounds = self._snapshots.rounds()
        if len(rounds) >= 2:
            self._spool.prune(before=rounds[-2])
