"""Tell whether a validator is well: GET /v1/status. Strangers may ask, so it waits for no lock and reads no file."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from statistics import median

from pilot.interfaces import MinerState
from pilot.storage.ledger import Ledger
from protocol import Health, Hotkey

NO_MINER_S = 30.0  # without one
NO_COMMIT_S, NO_COMMIT_TIMES = 60.0, 5.0  # a commit is overdue that takes so long, and so many times the usual
DISK_S = 10.0  # between two looks at how full the disk is


class ValidatorHealth:
    """The health of a run, by its ledger's commits, its miners and the room on its disk."""

    def __init__(
        self, folder: Path, hotkey: Hotkey, ledger: Ledger, reserve_bytes: int, clock: Callable[[], float]
    ) -> None:
        """`reserve_bytes` is what must be left free on the disk, `clock` a steady one."""
        self.miners: Callable[[], Iterable[MinerState]] = tuple
        self._folder, self._hotkey, self._ledger, self._reserve, self._clock = (
            *(folder, hotkey, ledger, reserve_bytes),
            clock,
        )
        self._alone_since = clock()
        self._free, self._looked = 0, -DISK_S

    def __call__(self) -> Health:
        now, newest, commits = self._clock(), self._ledger.newest, list(self._ledger.commits)
        states = Counter(
            "away" if m.state == "away" else "idle" if m.state in ("idle", "done") else "working" for m in self.miners()
        )
        if states["idle"] or states["working"]:
            self._alone_since = now
        ill = self._ill(now, commits)
        return Health(
            role="validator",
            hotkey=self._hotkey,
            healthy=not ill,
            state=ill or ("training" if newest else "starting"),
            run=self._folder.name,
            round=newest[0] if newest else None,
            version=newest[1] if newest else None,
            time_ns=time.time_ns(),
            commit_age_s=round(now - commits[-1], 3) if commits else None,
            miners=dict(states),
        )

    def _ill(self, now: float, commits: list[float]) -> str:
        """Return what is wrong; "" if nothing is."""
        if now - self._looked >= DISK_S:
            self._looked, self._free = now, shutil.disk_usage(self._folder).free
        if self._free < self._reserve:
            return f"{self._free >> 20} MB are free on the disk, {self._reserve >> 20} MB are kept free"
        if now - self._alone_since > NO_MINER_S:
            return f"no miner is there for {now - self._alone_since:.0f} s"
        if len(commits) >= 3:
            usual = median(after - before for before, after in pairwise(commits))
            if now - commits[-1] > max(NO_COMMIT_S, NO_COMMIT_TIMES * usual):
                return f"no commit for {now - commits[-1]:.0f} s, usually one in {usual:.3g} s"
        return ""
