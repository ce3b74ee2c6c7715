"""Metrics: one JSON line a round, a summary at the end, and Weights & Biases where it is switched on.

The ledger is the truth and these are for reading, so nothing here may end a run once it is set up.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from pilot.common.files import replacing

logger = logging.getLogger(__name__)

Row = Mapping[str, float | int | str]
Mode = Literal["disabled", "offline", "online"]


class Metrics:
    """`metrics.jsonl` and `summary.json` in a run's folder. A number that JSON lacks (NaN, infinity) is null there."""

    def __init__(self, folder: Path, mode: Mode, project: str, name: str) -> None:
        """`mode`, `project` and `name` are W&B's. Raises ValueError where W&B does not start."""
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._wandb = None if mode == "disabled" else _Wandb(folder, mode, project, name)

    def log(self, row: Row) -> None:
        """Append one round. `row["round"]` is the step in W&B."""

        def write() -> None:
            with open(self._path, "a") as file:
                file.write(_line(row))

        _unless_disk_fails(write)
        if self._wandb:
            self._wandb.log(row)

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Replace all rows at once: after a restart the file says what the ledger says, and so does W&B's new run.

        Raises ValueError where the file cannot be written.
        """
        rows = list(rows)
        try:
            with replacing(self._path) as file:
                file.writelines(_line(row).encode() for row in rows)
        except OSError as error:
            raise ValueError(f"{self._path}: {error.strerror}; mend that (a full disk: free some space)") from None
        if self._wandb:
            for row in rows:
                self._wandb.log(row)

    def summary(self, values: Mapping[str, object]) -> None:
        """Write `summary.json`. Values are anything that JSON has."""
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
    """A W&B run that is given up, with a warning, at the first failure after its start."""

    def __init__(self, folder: Path, mode: Literal["offline", "online"], project: str, name: str) -> None:
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        try:
            self._run = wandb.init(project=project, name=name, group=name, dir=folder, mode=mode)
        except (OSError, wandb.Error) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"--wandb.mode {mode}: {reason}; use --wandb.mode disabled to go without") from None
        self._failures = (OSError, wandb.Error, HandleAbandonedError, MailboxClosedError)  # the last two: service gone
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
            logger.warning("W&B gets no more metrics: %s", error)


def _unless_disk_fails(action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        logger.warning("metrics are not written: %s", error)


def _line(row: Row) -> str:
    return json.dumps(_plain(row), separators=(",", ":"), allow_nan=False) + "\n"


def _plain(value: object) -> object:
    """The same with null for the numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
