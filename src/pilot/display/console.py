"""Show a program's progress: on a terminal, lines with a live view below them; elsewhere plain lines.

Each time the view is drawn it is fitted to the terminal's size: the least important parts are left out, and nothing
wraps.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Literal, Self

import rich.console
from rich.console import RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pilot.common.logs import dated
from pilot.common.units import format_bytes, format_mbps
from pilot.display.changes import Changes
from pilot.interfaces import MinerState
from protocol import Hotkey, Receipt

logger = logging.getLogger(__name__)

Level = Literal["debug", "info", "warning", "error"]

_PLAIN_WIDTH = 160  # columns of a file or a pipe
_QUIET_S = 1.0  # seconds between plain lines, except for evaluations and the last round
_REDRAW_S = 0.25
_LOOK_S = 0.5  # seconds between two looks for what has changed
_BAR = (8, 20)  # the least and the most columns of the bar
_HOTKEY = 8  # characters of a hotkey that are shown
_FOLDED = 16  # the least columns of names in a table, which are folded
_RESERVED_LINES = 4  # lines of the terminal kept for the newest messages, above the view
_SPEED_ROUNDS = 50  # the ETA uses the mean of the newest so many rounds
_SHARD = "·▁▂▃▄▅▆▇█"  # from nothing done to all done
_NOISY = ("matplotlib", "PIL", "asyncio", "urllib3", "filelock", "fsspec")  # their DEBUG messages are not shown


class _Screen:
    """Writes lines, log records and a live view through one console, so that they do not mix. A context manager.

    Lines of a file or a pipe begin with the time. With `as_json` each is an object of time, level, event and figures,
    also on a terminal. `level` is the least that is shown; log records below WARNING are shown with "debug" only.
    """

    def __init__(self, level: Level = "info", as_json: bool = False) -> None:
        self._console = rich.console.Console(highlight=False)
        if not (self._console.is_terminal and self._console.file.isatty()):  # despite FORCE_COLOR
            self._console = rich.console.Console(
                highlight=False, width=_PLAIN_WIDTH, force_terminal=False, force_interactive=False
            )
        self.live = self._console.is_interactive and not as_json
        self._json = as_json
        self._least = logging.getLevelNamesMapping()[level.upper()]
        self._view = Live(self, console=self._console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
        self._handler = _LogLines(self._write, self.live)
        self._level = logging.DEBUG if level == "debug" else max(self._least, logging.WARNING)
        self._level_before = logging.getLogger().level

    def start(self) -> None:
        root = logging.getLogger()
        self._level_before = root.level
        root.setLevel(self._level)
        root.addHandler(self._handler)
        if self.live:
            self._view.start(refresh=True)

    def stop(self) -> None:
        if self.live:
            self._view.stop()
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

    def end_view(self) -> None:
        """Leave the live view where it is: what is printed from now on comes below it."""
        if self.live:
            self._view.stop()

    def say(self, line: str) -> None:
        """Print a line above the view. Control characters, which may come from a peer, are replaced."""
        self._write(line, logging.INFO)

    def announce(self, line: str) -> None:
        """Print a line that other programs wait for: without a time, whatever else is shown."""
        self._console.print(_text(line), soft_wrap=True)

    def note(self, line: str) -> None:
        """Print a line about a change, with its time."""
        self._write(f"{time.strftime('%H:%M:%S')} {line}" if self.live else line, logging.INFO)

    def _write(self, line: str, level: int, figures: Mapping[str, object] | None = None) -> None:
        if level < self._least:
            return
        if self._json:
            body = {"time": datetime.now(UTC).isoformat(), "level": logging.getLevelName(level).lower()}
            line = json.dumps({**body, "event": line, **(figures or {})}, allow_nan=False, default=str)
        elif not self.live:
            line = dated(line)
        self._console.print(_text(line), soft_wrap=True)

    def render(self, width: int, height: int) -> Iterator[RenderableType]:
        """Yield the view for a terminal of so many columns and lines."""
        raise NotImplementedError

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        yield from self.render(*options.size)

    @contextlib.asynccontextmanager
    async def _redrawing(self, update: Callable[[], None]) -> AsyncIterator[None]:
        """On a terminal, call `update` and redraw a few times a second while the block runs."""
        if not self.live:
            yield
            return
        drawing = asyncio.create_task(self._draw(update))
        drawing.add_done_callback(_log_failure)
        try:
            yield
        finally:
            drawing.cancel()
            await asyncio.wait({drawing})

    async def _draw(self, update: Callable[[], None]) -> None:
        while True:
            update()
            self._view.refresh()
            await asyncio.sleep(_REDRAW_S)


def _log_failure(drawing: asyncio.Task[None]) -> None:
    """Log why drawing stopped. No other background task may fail without ending the run."""
    if not drawing.cancelled() and (error := drawing.exception()):
        logger.error("the display is not redrawn any more; the run continues", exc_info=error)


# --- the validator's --------------------------------------------------------------------------------------------------


class Console(_Screen):
    """The validator's console: a bar with the newest figures, the epoch's progress, and a row per miner."""

    def __init__(self, total_rounds: int, level: Level = "info", as_json: bool = False) -> None:
        super().__init__(level, as_json)
        self._changes = Changes()
        self._total = total_rounds
        self._seen: dict[str, float | int | str] = {}  # the newest figures; an evaluation stays until the next one
        self._times: deque[tuple[float, int]] = deque(maxlen=_SPEED_ROUNDS)  # (time, rounds done)
        self._links: tuple[MinerState, ...] = ()
        self._receipts: dict[Hotkey, Receipt] = {}  # the newest of each miner
        self._used: dict[str, float] = {}  # utilisation in the last round, by the first characters of the hotkey
        self._last_line = -_QUIET_S

    def round(self, row: Mapping[str, float | int | str], receipts: Iterable[Receipt] = ()) -> None:
        """Show a committed round.

        `row` has `round`, from 0, and if known `loss` and `val_loss` (nats), `replica_val_loss`, `<unit>_per_s`,
        `utilisation.<first 8 characters of the hotkey>`, `late_batches` so far, the epoch's progress
        (pilot.market.scheduling), and the median link and the share of the round that it takes
        (pilot.market.link_budget).
        """
        done = int(row["round"]) + 1
        now = time.monotonic()
        receipts = list(receipts)
        self._receipts.update((receipt.hotkey, receipt) for receipt in receipts)
        for line in self._changes.committed(done - 1, receipts, now):
            self.note(line)
        if self._json:
            self._write("round", logging.INFO, _finite(row))
        elif self.live:
            self._seen.update(row)
            self._used = {key[-_HOTKEY:]: float(row[key]) for key in row if key.startswith("utilisation.")}
            self._times.append((now, done))
            self._view.refresh()
        elif "val_loss" in row or done == self._total or now - self._last_line >= _QUIET_S:
            self._last_line = now
            parts = [*_figures(row), *_progress(row), *_communication(row)]
            self.say("  ".join([f"round {done}/{self._total}", *parts]))

    @contextlib.asynccontextmanager
    async def watching(self, links: Callable[[], tuple[MinerState, ...]]) -> AsyncIterator[None]:
        """Show the miners' rows, and say what changes, while the block runs.

        The rows stay if it raises; otherwise the report replaces them.
        """

        def update() -> None:
            self._links = links()

        async def notice() -> None:
            while True:
                for line in self._changes.look(links(), time.monotonic()):
                    self.note(line)
                await asyncio.sleep(_LOOK_S)

        noticing = asyncio.create_task(notice())
        noticing.add_done_callback(_log_failure)
        try:
            async with self._redrawing(update):
                yield
        finally:
            noticing.cancel()
            await asyncio.wait({noticing})
        self._links = ()

    def heading(self, text: str) -> None:
        """Print the heading of a part of the report, below an empty line."""
        if not self._json:
            self._console.print()
            self._console.print(_text(text, "bold"))

    def paragraph(self, text: str) -> None:
        """Print a text, on a terminal wrapped between words."""
        if self._json:
            self.say(text)
        else:
            self._console.print(_text(text), soft_wrap=not self.live)

    def columns(self, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print rows of words below titles. Only the last column is wrapped, between words."""
        if self._json:
            for row in rows:
                self._write(row[0], logging.INFO, dict(zip(titles[1:], row[1:], strict=True)))
            return
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for number, title in enumerate(titles):
            last = number == len(titles) - 1
            table.add_column(_text(title), no_wrap=not last, justify="left" if last or not number else "right")
        for row in rows:
            table.add_row(*map(_text, row))
        self._console.print(table)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a table, its first column folded if need be and the others right-aligned; if it is too wide, a list."""
        lines = [[str(cell) for cell in row] for row in rows]
        folded = min(_FOLDED, max((len(line[0]) for line in lines), default=0))
        table = Table(title=_text(title), title_justify="left", title_style="bold")
        table.add_column(_text(columns[0]), overflow="fold", min_width=folded)
        for column in columns[1:]:
            table.add_column(_text(column), justify="right", no_wrap=True)
        for line in lines:
            table.add_row(*map(_text, line))
        if Measurement.get(self._console, self._console.options, table).minimum < self._console.width:
            self._console.print(table)
            return
        self.say(title)
        for first, *others in lines:
            self.say(first)
            for column, cell in zip(columns[1:], others, strict=True):
                self.say(f"  {column} {cell}")

    def render(self, width: int, height: int) -> Iterator[RenderableType]:
        done = int(self._seen.get("round", -1)) + 1
        label = f"round {done}/{self._total}"
        head = list(_bar(width, label, done, self._total, _figures(self._seen), f"ETA {self._eta(done)}"))
        if progress := [*_progress(self._seen), *_shards(self._seen), *_communication(self._seen)]:
            head.append(_fit(progress, width))
        yield from head
        if self._links:
            yield from self._rows(width, max(1, height - len(head) - 1 - _RESERVED_LINES))

    def _rows(self, width: int, room: int) -> Iterator[RenderableType]:
        """Yield a row per miner in `room` lines. If there are too many, faulted ones come first, then those at work."""
        links = self._links
        if len(links) > room:
            links = tuple(sorted(links, key=self._quietness)[: max(1, room - 1)])
        yield _miners([self._row(link) for link in links], width)
        if hidden := len(self._links) - len(links):
            yield Text(f"and {hidden} more", style="dim", no_wrap=True)

    def _row(self, link: MinerState) -> dict[_Column, Text]:
        hotkey = link.hotkey or ""
        return _cells(link, self._receipts.get(hotkey), self._used.get(hotkey[:_HOTKEY]))

    def _quietness(self, link: MinerState) -> int:
        receipt = self._receipts.get(link.hotkey or "")
        faulted = receipt is not None and receipt.verdict != "ACCEPTED"
        return 0 if faulted else 1 if link.state != "idle" else 2

    def _eta(self, done: int) -> str:
        """Return the time until the last round, from the mean of the newest ones."""
        if len(self._times) < 2:
            return "-:--:--"
        (first, first_done), (last, last_done) = self._times[0], self._times[-1]
        left_s = (self._total - done) * (last - first) / max(1, last_done - first_done) - (time.monotonic() - last)
        return str(timedelta(seconds=max(0, round(left_s))))


@dataclass(frozen=True)
class _Column:
    title: str
    width: int  # at least, so that the columns do not move with every figure
    right: bool = False
    style: str = ""


_NAME = _Column("miner", _HOTKEY)
_STATE = _Column("state", 13)
_BATCHES = _Column("batches", 7, right=True)
_USED = _Column("util", 4, right=True)
_LATENCY = _Column("latency", 7, right=True)
_UP = _Column("up", 8, right=True)
_DOWN = _Column("down", 8, right=True)
_LINK = _Column("Mbit/s", 9, right=True)  # up/down
_VERDICT = _Column("verdict", 10)
_WEIGHT = _Column("weight", 6, right=True)
_WHY = _Column("why", 16, style="dim")
_COLUMNS = (_NAME, _STATE, _BATCHES, _USED, _LATENCY, _LINK, _UP, _DOWN, _VERDICT, _WEIGHT)
_LEFT_OUT = (_DOWN, _UP, _LINK, _LATENCY, _BATCHES, _USED, _WEIGHT, _VERDICT)  # in this order
_OPTIONAL = (_USED, _LINK)  # shown only if a row has a value


def _miners(cells: Sequence[dict[_Column, Text]], width: int) -> Table:
    """Make a table with as many columns as fit into `width`, shortening names first; no cell is wrapped."""
    columns = [column for column in _COLUMNS if column not in _OPTIONAL or any(row[column] for row in cells)]
    widths = {column: max(column.width, *(row[column].cell_len for row in cells)) for column in columns}
    lacking = sum(widths.values()) + len(widths) - 1 - width
    widths[_NAME] = max(_NAME.width, widths[_NAME] - max(0, lacking))
    for column in _LEFT_OUT:
        if sum(widths.values()) + len(widths) - 1 <= width:
            break
        widths.pop(column, None)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    room = width - sum(widths.values()) - len(widths)
    if room >= _WHY.width and any(row[_WHY] for row in cells):
        widths[_WHY] = room
    for column, wide in widths.items():
        justify = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, style=column.style, no_wrap=True, width=wide)  # type: ignore[arg-type]
    for row in cells:
        row[_NAME] = _end_of(row[_NAME], widths[_NAME])
        table.add_row(*(row[column] for column in widths))
    return table


def _cells(link: MinerState, receipt: Receipt | None, used: float | None) -> dict[_Column, Text]:
    good = receipt is not None and receipt.verdict == "ACCEPTED"
    quiet = {"away": "yellow", "idle": "dim"}
    return {
        _NAME: _end_of(_text(link.hotkey[:_HOTKEY] if link.hotkey else link.endpoint), 21),
        _STATE: _text(_short(link.state), quiet.get(link.state, "")),
        _BATCHES: _text(f"{min(link.batches_done, link.batches)}/{link.batches}" if link.batches else ""),
        _USED: _text("" if used is None else f"{used:.0%}"),
        _LATENCY: _text(_seconds(link.latency_s)),
        _LINK: _text(
            f"{format_mbps(link.up_bps)}/{format_mbps(link.down_bps)}" if link.up_bps or link.down_bps else ""
        ),
        _UP: _text(format_bytes(link.bytes_up)),
        _DOWN: _text(format_bytes(link.bytes_down)),
        _VERDICT: _text(receipt.verdict if receipt else "", "green" if good else "red"),
        _WEIGHT: _text(f"{receipt.weight:.3f}" if receipt else ""),
        _WHY: _text("" if good or not receipt else receipt.reason),
    }


def _short(state: str) -> str:
    """Shorten a state such as "sending state 43 %" to its first word and its figure."""
    words = state.split()
    return state if len(state) <= _STATE.width + 1 else " ".join([words[0], *words[2:]])[: _STATE.width + 1]


def _end_of(name: Text, width: int) -> Text:
    """Cut a name at the beginning: the port of an address is at its end."""
    return name if name.cell_len <= width else Text("…" + name.plain[1 - width :])


# --- the miner's ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activity:
    """What a miner is doing now: a `label`, its progress if `total` is not 0, and figures to show."""

    label: str
    done: int = 0
    total: int = 0
    figures: tuple[str, ...] = ()


class MinerConsole(_Screen):
    """The miner's console: a bar of the current activity."""

    def __init__(self, level: Level = "info", as_json: bool = False) -> None:
        super().__init__(level, as_json)
        self._activity: Activity | None = None

    @contextlib.asynccontextmanager
    async def watching(self, activity: Callable[[], Activity]) -> AsyncIterator[None]:
        """Show the current activity while the block runs."""

        def update() -> None:
            self._activity = activity()

        async with self._redrawing(update):
            yield
        self._activity = None

    def render(self, width: int, height: int) -> Iterator[RenderableType]:
        if now := self._activity:
            yield from _bar(width, now.label, now.done, now.total, now.figures)


# --- shared -----------------------------------------------------------------------------------------------------------


class _LogLines(logging.Handler):
    """Prints log records, which may quote a peer, as lines of a console."""

    def __init__(self, write: Callable[[str, int], None], timed: bool) -> None:
        super().__init__()
        self._write = write
        self.setFormatter(logging.Formatter(f"{'%(asctime)s ' if timed else ''}%(levelname)s %(name)s: %(message)s"))
        self.addFilter(lambda r: r.levelno >= logging.INFO or r.name.partition(".")[0] not in _NOISY)

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self._write(line, record.levelno)


def _finite(row: Mapping[str, object]) -> dict[str, object]:
    """Return figures as JSON holds them, null for NaN and infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _bar(
    width: int, label: str, done: int, total: int, figures: Sequence[str], end: str = ""
) -> Iterator[RenderableType]:
    """Yield label, bar, figures and end on one line; on a narrow terminal the figures go on a line below."""
    least, most = _BAR
    ends = [part for part in (label, end) if part]
    room = width - len("  ".join([*ends, *figures])) - 2
    beside = room >= (least if total else 0)
    if not beside:
        room = width - len("  ".join(ends)) - 2
    line = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    parts: list[RenderableType] = [_text(label)]
    if total and room > 0:
        parts.append(ProgressBar(total, min(done, total), width=min(room, most)))
    parts += [_text(part) for part in (*(figures if beside else ()), end) if part]
    for _ in parts:
        line.add_column(no_wrap=True)
    line.add_row(*parts)
    yield line
    if not beside and figures:
        yield _fit(figures, width)


def _fit(parts: Sequence[str], width: int) -> Text:
    """Return a line of the first parts, as many as fit."""
    while len("  ".join(parts)) > width and len(parts) > 1:
        parts = parts[:-1]
    return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")


def _progress(row: Mapping[str, float | int | str]) -> list[str]:
    """Return the progress of the epoch, and the late micro-batches so far."""
    epoch = [f"epoch {row['epoch']}  {row['epoch_done']}/{row['epoch_total']}"] if "epoch" in row else []
    return epoch + ([f"late: {row['late_batches']} micro-batches noted"] if row.get("late_batches") else [])


def _communication(row: Mapping[str, float | int | str]) -> list[str]:
    """Return the bytes of a miner in a round, and the share of the round that they take on the median link."""
    if "communication" not in row:
        return []
    up, down = (format_mbps(1e6 * float(row[f"link_{direction}_mbps"])) for direction in ("up", "down"))
    sent, got = (
        format_bytes(float(row[f"bytes_{direction}"]) / max(1, int(row["miners"]))) for direction in ("up", "down")
    )
    return [f"{sent} up, {got} down a miner: {float(row['communication']):.0%} of a round at {up}/{down} Mbit/s"]


def _shards(row: Mapping[str, float | int | str]) -> list[str]:
    """Return a character per shard for shards such as "4/4 3/4 0/4"."""
    parts = [map(int, shard.split("/")) for shard in str(row.get("shards", "")).split()]
    marks = [_SHARD[-(-done * (len(_SHARD) - 2) // total) if done < total else -1] for done, total in parts]
    return [f"shards {''.join(marks)}"] if marks else []


def _figures(row: Mapping[str, float | int | str]) -> list[str]:
    names = (("loss", "loss"), ("val_loss", "val"))
    losses = [f"{name} {row[key]:.3f}" for key, name in names if key in row]
    if "replica_val_loss" in row:  # shown after that of the exact parameters
        losses[-1] += f" (miners' {row['replica_val_loss']:.3f})"
    losses += [f"{row['val_bpb']:.4f} bits/byte"] if "val_bpb" in row else []
    speeds = [f"{value:,.0f} {key.removesuffix('_per_s')}/s" for key, value in row.items() if key.endswith("_per_s")]
    return losses + speeds + ([f"MFU {row['mfu']:.1%}"] if "mfu" in row else [])


def _seconds(seconds: float) -> str:
    return "" if not seconds else f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _text(line: str, style: str = "") -> Text:
    return Text("".join(char if char.isprintable() else "\ufffd" for char in line), style)
