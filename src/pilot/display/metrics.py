"""Write metrics: one JSON line per round, a summary at the end, and Weights & Biases if it is enabled.

The ledger is authoritative, and metrics are only for reading: after the set-up no failure here ends a run.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pilot.common.files import replacing

logger = logging.getLogger(__name__)

Row = Mapping[str, float | int | str]
Mode = Literal["disabled", "offline", "online"]
MODES: tuple[Mode, ...] = ("disabled", "offline", "online")
DEFAULT_PROJECT = "pilot"


def rows_before(path: Path, round: int, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """Return the rows of a file of figures for rounds before this one; say which lines a crash has damaged."""
    if not round or not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:  # cut short, or NULs of a block that was never written
            row = None
        if not isinstance(row, dict) or type(row.get("round")) is not int:
            damaged.append(number)
        elif row["round"] < round:
            rows.append(row)
    if damaged:
        lines = f"line {damaged[0]} is" if len(damaged) == 1 else f"{len(damaged)} lines from line {damaged[0]} are"
        say(f"{path}: {lines} damaged, and dropped")
    return rows


def allowed_mode(mode: Mode) -> Mode:
    """Return the mode that the flags ask for, or a stricter one that WANDB_MODE asks for."""
    asked = os.environ.get("WANDB_MODE", "").strip().lower()
    limit = "offline" if asked == "dryrun" else asked
    return min(mode, limit, key=MODES.index) if limit in MODES else mode


class Metrics:
    """Writes `metrics.jsonl` and `summary.json` into a run's folder, with null for NaN and infinity."""

    def __init__(self, folder: Path, mode: Mode, project: str, name: str) -> None:
        """Start W&B with `mode`, `project` and `name`. Raises ValueError if that fails."""
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        allowed = allowed_mode(mode)
        if allowed != mode:
            logger.warning("W&B is %s instead of %s, as WANDB_MODE in the environment says", allowed, mode)
        if project == DEFAULT_PROJECT:
            project = os.environ.get("WANDB_PROJECT", "").strip() or project
        self._wandb = None if allowed == "disabled" else _Wandb(folder, allowed, project, name)

    def log(self, row: Row) -> None:
        """Append a round. `row["round"]` is the step in W&B."""

        def write() -> None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(row))

        _unless_disk_fails(write)
        if self._wandb:
            self._wandb.log(row)

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Replace all rows atomically, so that after a restart the file, and W&B's new run, agree with the ledger.

        Raises ValueError if the file cannot be written.
        """
        rows = list(rows)
        try:
            with replacing(self._path) as file:
                file.writelines(_line(row).encode() for row in rows)
        except OSError as error:
            raise ValueError(f"{self._path}: {error.strerror}; fix that (on a full disk, free some space)") from None
        if self._wandb:
            for row in rows:
                self._wandb.log(row)

    def summary(self, values: Mapping[str, object]) -> None:
        """Write `summary.json`. Values may be anything that JSON can hold."""
        text = json.dumps(_plain(values), indent=2) + "\n"

        def write() -> None:
            with replacing(self._folder / "summary.json") as file:
                file.write(text.encode())

        _unless_disk_fails(write)
        if self._wandb:
            self._wandb.summary(values)

    def close(self) -> None:
        """End W&B's run."""
        if self._wandb:
            self._wandb.finish()


class _Wandb:
    """A W&B run. The first failure after its start is logged, and ends its use."""

    def __init__(self, folder: Path, mode: Literal["offline", "online"], project: str, name: str) -> None:
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        try:
            self._run = wandb.init(project=project, name=name, group=name, dir=folder, mode=mode)
        except (OSError, wandb.Error) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"--wandb.mode {mode}: {reason}; use --wandb.mode disabled to run without it") from None
        self._failures = (
            OSError,
            wandb.Error,
            HandleAbandonedError,
            MailboxClosedError,
        )  # the last two mean that its service is gone
        self._alive = True

    def log(self, row: Row) -> None:
        self._try(lambda: self._run.log(dict(row), step=int(row["round"])))

    def summary(self, values: Mapping[str, object]) -> None:
        self._try(lambda: self._run.summary.update(dict(values)))

    def finish(self) -> None:
        self._try(self._run.finish)

    def _try(self, action: Callable[[], object]) -> None:
        if not self._alive:
            return
        try:
            action()
        except self._failures as error:
            self._alive = False
            logger.warning("no more metrics are sent to W&B: %s", error)


def _unless_disk_fails(action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        logger.warning("cannot write metrics: %s", error)


def _line(row: Row) -> str:
    return json.dumps(_plain(row), separators=(",", ":"), allow_nan=False) + "\n"


def _plain(value: object) -> object:
    """Return the value with null for the numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
