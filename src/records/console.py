"""What the person at the validator's terminal sees: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import rich.console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 160  # columns of a file or a pipe, which has none of its own
_QUIET_S = 1.0  # plain lines: at most one a second, but every evaluation and the last round
_LOG_FORMAT = "%(name)s: %(message)s"


class Console:
    """Shows the rounds of a run. Use as a context manager, or `start` and `stop` it.

    It also shows what the program logs, from WARNING up, or from DEBUG up with `debug`, so that no line tears the bar.
    """

    def __init__(self, total_rounds: int, debug: bool) -> None:
        terminal = rich.console.Console(highlight=False)
        self._console = terminal if terminal.is_terminal else rich.console.Console(highlight=False, width=_PLAIN_WIDTH)
        self._live = terminal.is_terminal and not terminal.is_dumb_terminal
        self._total = total_rounds
        self._seen: dict[str, float | int | str] = {}  # the last figures: an evaluation stays in sight until the next
        self._last_line = -_QUIET_S
        self._progress = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=600,  # seconds: a round may take half a minute
        )
        self._bar = self._progress.add_task("", total=total_rounds)
        self._handler = RichHandler(console=self._console, show_path=False, markup=False)
        self._handler.setFormatter(logging.Formatter(_LOG_FORMAT))
        self._level = logging.DEBUG if debug else logging.WARNING
        self._level_before = logging.getLogger().level

    def start(self) -> None:
        root = logging.getLogger()
        self._level_before = root.level
        root.setLevel(self._level)
        root.addHandler(self._handler)
        if self._live:
            self._progress.start()

    def stop(self) -> None:
        if self._live:
            self._progress.stop()
        root = logging.getLogger()
        root.removeHandler(self._handler)
        root.setLevel(self._level_before)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def round(self, row: Mapping[str, float | int | str]) -> None:
        """A committed round: `round` (from 0), and where known `loss`, `val_loss` (nats) and `<unit>_per_s`."""
        done = int(row["round"]) + 1
        if self._live:
            if not self._seen:  # a resumed run: the rounds before this one say nothing about the speed
                self._progress.reset(self._bar, completed=done - 1)
            self._seen.update(row)
            self._progress.update(self._bar, completed=done, description=_figures(self._seen))
            return
        now = time.monotonic()
        if "val_loss" in row or done == self._total or now - self._last_line >= _QUIET_S:
            self._last_line = now
            self.say(f"round {done}/{self._total}  {_figures(row)}")

    def say(self, line: str) -> None:
        """One line above the bar. What a peer put into it can move no cursor and change no colour."""
        self._console.print(_text(line), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """The first column to the left, numbers to the right."""
        table = Table(title=_text(title), title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(_text(column), justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_text(str(cell)) for cell in row))
        self._console.print(table)


def _figures(row: Mapping[str, float | int | str]) -> str:
    named = (("loss", "loss"), ("val_loss", "val"))
    losses = [f"{name} {row[key]:.3f}" for key, name in named if key in row]
    speeds = [f"{value:,.0f} {key.removesuffix('_per_s')}/s" for key, value in row.items() if key.endswith("_per_s")]
    return "  ".join(losses + speeds)


def _text(line: str) -> Text:
    return Text("".join(char if char.isprintable() else "\ufffd" for char in line))
