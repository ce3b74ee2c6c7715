"""Read, write and make traces, CSV files that say when each miner was up.

    miner,start,end,price,speed,bandwidth_mbps,latency_ms,ending
    m1,0,5400,0.31,1.0,100,25,notice

`start` and `end` are seconds from the beginning. The other columns may be missing, or empty in a row: the `price` of
energy or of the machine, which is not used; the miner's `speed`; its link; and its `ending`: notice (SIGTERM at `end`),
kill (gone at once) or cut (only the link is dead: the machine works on until it is back).
"""

from __future__ import annotations

import csv
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

Ending = Literal["notice", "kill", "cut"]

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")


@dataclass(frozen=True)
class Interval:
    """A time during which a miner is up. None stands for the simulation's flags."""

    miner: str
    start: float
    end: float
    price: float | None = None
    speed: float | None = None
    bandwidth_mbps: float | None = None
    latency_ms: float | None = None
    ending: Ending | None = None


COLUMNS = tuple(f.name for f in fields(Interval))
REQUIRED = COLUMNS[:3]
ABOVE_ZERO = ("speed", "bandwidth_mbps")


def read_trace(path: Path) -> tuple[Interval, ...]:
    """Read a trace, sorted by start. Raises ValueError with FILE:LINE and what is wrong there."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_rows(path, csv.reader(file)))
    except OSError as error:
        raise ValueError(f"--trace {path}: {error.strerror}; make one with --make spot --out {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--trace {path}: not a CSV file ({error})") from None
    if not rows:
        raise ValueError(f"--trace {path}: has no rows; a row is {','.join(REQUIRED)}")
    ordered = sorted(rows, key=lambda row: (row[1].miner, row[1].start))
    for (_, a), (line, b) in pairwise(ordered):
        if a.miner == b.miner and b.start < a.end:
            raise ValueError(
                f"{path}:{line}: {b.miner} is up twice at {b.start:g} s: it is up from {a.start:g} to {a.end:g} s"
            )
    return tuple(sorted((interval for _, interval in rows), key=lambda i: (i.start, i.miner)))


def _rows(path: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, Interval]]:
    """Yield the intervals with their line numbers."""
    header: list[str] | None = None
    for line, row in enumerate(reader, 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if header is None:
            header = cells
            _check_header(f"{path}:{line}", header)
        elif len(cells) != len(header):
            raise ValueError(f"{path}:{line}: {len(cells)} values under {len(header)} columns")
        else:
            yield line, _interval(f"{path}:{line}", dict(zip(header, cells, strict=True)))


def _check_header(where: str, header: Sequence[str]) -> None:
    if unknown := [name for name in header if name not in COLUMNS]:
        raise ValueError(f"{where}: unknown column {unknown[0]!r}; known: {', '.join(COLUMNS)}")
    if missing := [name for name in REQUIRED if name not in header]:
        raise ValueError(f"{where}: no column {missing[0]!r}; the first line names them: {','.join(REQUIRED)}")
    if len(set(header)) < len(header):
        raise ValueError(f"{where}: a column appears twice")


def _interval(where: str, cells: Mapping[str, str]) -> Interval:
    miner, ending = cells["miner"], cells.get("ending", "")
    if not NAME.fullmatch(miner):
        raise ValueError(f"{where}: miner {miner!r}: must be a name of letters, digits and _.+-")
    if ending and ending not in get_args(Ending):
        raise ValueError(f"{where}: ending {ending!r}: must be {', '.join(get_args(Ending))}")
    numbers = {name: _number(where, name, cells[name]) for name in COLUMNS[1:-1] if cells.get(name)}
    for name in REQUIRED[1:]:
        if name not in numbers:
            raise ValueError(f"{where}: {name} is empty")
    if numbers["end"] <= numbers["start"]:
        raise ValueError(f"{where}: ends at {numbers['end']:g} s, but starts at {numbers['start']:g} s")
    return Interval(miner=miner, ending=ending or None, **numbers)  # type: ignore[arg-type]  # one of Ending


def _number(where: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where}: {name} {text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{where}: {name} {text}: must be finite")
    if value < 0 or (name in ABOVE_ZERO and not value):
        raise ValueError(f"{where}: {name} {text}: must be {'above 0' if name in ABOVE_ZERO else '0 or more'}")
    return value


def write_trace(path: Path, intervals: Iterable[Interval]) -> None:
    """Write a trace without the columns that no interval uses. Reading it gives equal numbers."""
    intervals = list(intervals)
    used = [name for name in COLUMNS if name in REQUIRED or any(getattr(i, name) is not None for i in intervals)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(used)
        for interval in intervals:
            values = (getattr(interval, name) for name in used)
            writer.writerow(["" if value is None else value for value in values])


# --- made from a seed -------------------------------------------------------------------------------------------------


def make_trace(kind: str, miners: int, seconds: float, seed: int) -> tuple[Interval, ...]:
    """Make a trace of a kind, the same for the same arguments. Raises ValueError for an unknown kind."""
    if kind not in MAKERS:
        raise ValueError(f"--make {kind}: unknown; known: {', '.join(MAKERS)}")
    made: list[Interval] = []
    for number in range(miners):
        made += MAKERS[kind](f"m{number + 1}", seconds, random.Random(f"{seed}/{kind}/{number}"))
    return tuple(sorted(made, key=lambda i: (i.start, i.miner)))


def _steady(miner: str, seconds: float, rng: random.Random) -> Iterator[Interval]:
    """Be up all the time, for comparison."""
    yield Interval(miner, 0.0, seconds)


def _spot(miner: str, seconds: float, rng: random.Random) -> Iterator[Interval]:
    """Be up for an hour and away for ten minutes on average, both exponential, with notice.

    Machines are of one kind, but in one interval of ten a noisy neighbour leaves a fifth of the speed.
    """
    price = round(rng.uniform(0.2, 0.6), 3)
    for start, end in _ups(seconds, lambda: rng.expovariate(1 / HOUR_S), lambda: rng.expovariate(6 / HOUR_S)):
        speed = _lognormal(rng, 0.1) * (0.2 if rng.random() < 0.1 else 1.0)
        yield Interval(miner, start, end, price, round(speed, 3), ending="notice")


def _diurnal(miner: str, seconds: float, rng: random.Random) -> Iterator[Interval]:
    """Be up at home from evening to morning, local time, unless energy costs more than the owner will pay.

    The hourly price follows the local time and is highest at 19:00, with noise from hour to hour.
    """
    zone, threshold = rng.choice((-8, -5, 0, 1, 5, 8, 9)), rng.uniform(0.25, 0.45)
    evening, morning = rng.uniform(17, 20), rng.uniform(6, 9)
    mbps, latency_ms, speed = (
        round(rng.uniform(20, 200), 1),
        round(rng.uniform(10, 60), 1),
        round(_lognormal(rng, 1.0), 3),
    )
    begun: float | None = None
    prices: list[float] = []
    for quarter in range(math.ceil(seconds / 900) + 1):
        now = min(quarter * 900.0, seconds)
        local = (now / HOUR_S + zone) % 24
        if quarter % 4 == 0:
            price = max(0.05, 0.28 + 0.1 * math.cos((local - 19) / 12 * math.pi) + rng.gauss(0, 0.05))
        up = (local >= evening or local < morning) and price <= threshold and now < seconds
        if up:
            begun = now if begun is None else begun
            prices.append(price)
        elif begun is not None:
            mean = round(sum(prices) / len(prices), 3)
            yield Interval(miner, begun, now, mean, speed, mbps, latency_ms, "notice")
            begun, prices = None, []


def _flaky(miner: str, seconds: float, rng: random.Random) -> Iterator[Interval]:
    """Have a slow link that is down for half a minute to five minutes about every twenty; the machine keeps running."""
    mbps, latency_ms, speed = (
        round(rng.uniform(5, 50), 1),
        round(rng.uniform(20, 200), 1),
        round(_lognormal(rng, 0.5), 3),
    )
    for start, end in _ups(seconds, lambda: rng.expovariate(3 / HOUR_S), lambda: rng.uniform(30, 300)):
        yield Interval(miner, start, end, None, speed, mbps, latency_ms, "cut")


MAKERS: dict[str, Callable[[str, float, random.Random], Iterator[Interval]]] = {
    "spot": _spot,
    "diurnal": _diurnal,
    "flaky": _flaky,
    "steady": _steady,
}


def _lognormal(rng: random.Random, deviation: float) -> float:
    """About 1."""
    return math.exp(rng.gauss(0, deviation))


def _ups(seconds: float, up: Callable[[], float], away: Callable[[], float]) -> Iterator[tuple[float, float]]:
    """(start, end) to the millisecond, the first from 0 on, the last until `seconds` at the most."""
    start = 0.0
    while start < seconds:
        end = min(round(start + max(up(), 1.0), 3), seconds)
        yield start, end
        start = round(end + max(away(), 1.0), 3)
