"""Test traces: reading, refusing mistakes, and making them from a seed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot.simulation.traces import DAY_S, HOUR_S, MAKERS, Interval, make_trace, read_trace, write_trace

HEADER = "miner,start,end"


def read(folder: Path, text: str) -> tuple[Interval, ...]:
    path = folder / "trace.csv"
    path.write_text(text)
    return read_trace(path)


def test_reads_rows_by_their_start_with_what_they_say(tmp_path: Path) -> None:
    text = f"{HEADER},price,ending,latency_ms\nb, 10 ,20,0.5,kill,\n\na,0,5,,,30\nb,20,30,,,\n"
    assert read(tmp_path, text) == (
        Interval("a", 0, 5, latency_ms=30),
        Interval("b", 10, 20, price=0.5, ending="kill"),
        Interval("b", 20, 30),
    )
    assert read(tmp_path, f"\ufeff{HEADER}\r\na,0,1e3\r\n") == (Interval("a", 0, 1000),)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (f"{HEADER}\na,0,10\nb,0,5\na,9,20\n", ":4: a is up twice at 9 s: it is up from 0 to 10 s"),
        (f"{HEADER}\na,5,10\na,0,30\n", ":2: a is up twice at 5 s: it is up from 0 to 30 s"),
        (f"{HEADER}\na,-1,10\n", ":2: start -1: must be 0 or more"),
        (f"{HEADER}\na,10,9\n", ":2: ends at 9 s, but starts at 10 s"),
        (f"{HEADER}\na,10,10\n", ":2: ends at 10 s, but starts at 10 s"),
        (f"{HEADER}\na,nan,9\n", ":2: start nan: must be finite"),
        (f"{HEADER}\na,0,inf\n", ":2: end inf: must be finite"),
        (f"{HEADER}\na,0,soon\n", ":2: end 'soon' is not a number"),
        (f"{HEADER}\na,0,\n", ":2: end is empty"),
        (f"{HEADER}\na,0\n", ":2: 2 values under 3 columns"),
        (f"{HEADER}\na b,0,1\n", ":2: miner 'a b': must be a name"),
        (f"{HEADER},speed\na,0,1,0\n", ":2: speed 0: must be above 0"),
        (f"{HEADER},price\na,0,1,-2\n", ":2: price -2: must be 0 or more"),
        (f"{HEADER},ending\na,0,1,softly\n", ":2: ending 'softly': must be notice, kill, cut"),
        (f"{HEADER},colour\na,0,1,red\n", ":1: unknown column 'colour'; known: miner, start"),
        (f"{HEADER},end\na,0,1,1\n", ":1: a column appears twice"),
        ("miner,start\na,0\n", ":1: no column 'end'"),
        (f"{HEADER}\n", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_line(tmp_path: Path, rows: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(tmp_path, rows)
    assert said in str(caught.value)
    assert str(tmp_path / "trace.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file or directory; make one"):
        read_trace(tmp_path / "nonesuch.csv")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a CSV file"):
        read_trace(tmp_path / "binary")


@pytest.mark.parametrize("kind", MAKERS)
@given(seed=st.integers(0, 1 << 32), miners=st.integers(1, 5), hours=st.floats(0.1, 60))
def test_a_made_trace_is_in_time_without_overlap_and_the_same_again(
    kind: str, seed: int, miners: int, hours: float
) -> None:
    seconds = hours * HOUR_S
    trace = make_trace(kind, miners, seconds, seed)
    assert trace == make_trace(kind, miners, seconds, seed)
    assert all(0 <= i.start < i.end <= seconds for i in trace)
    for miner in {i.miner for i in trace}:
        own = [i for i in trace if i.miner == miner]
        assert all(a.end < b.start for a, b in pairwise(own))


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_written_is_read_back(tmp_path: Path, kind: str) -> None:
    trace = make_trace(kind, 4, 2 * DAY_S, seed=1)
    assert trace
    write_trace(tmp_path / "trace.csv", trace)
    assert read_trace(tmp_path / "trace.csv") == trace
    assert trace != make_trace(kind, 4, 2 * DAY_S, seed=2) or kind == "steady"


def test_kinds_have_the_availability_that_they_describe() -> None:
    days, miners = 20, 20
    shares = {kind: make_trace(kind, miners, days * DAY_S, seed=0) for kind in MAKERS}
    up = {kind: sum(i.end - i.start for i in trace) / (miners * days * DAY_S) for kind, trace in shares.items()}
    assert up["steady"] == 1
    assert up["spot"] == pytest.approx(6 / 7, abs=0.02)  # an hour up, ten minutes away
    assert 0.05 < up["diurnal"] < 0.6  # of the nights, those hours that are cheap enough
    assert up["flaky"] == pytest.approx(1200 / 1365, abs=0.02)  # twenty minutes up, half a minute to five away
    for miner in {i.miner for i in shares["diurnal"]}:
        dear = max(i.price or 0.0 for i in shares["diurnal"] if i.miner == miner)
        assert 0 < dear <= 0.45  # no owner pays more
    with pytest.raises(ValueError, match=r"--make lunar: unknown; known: spot, diurnal, flaky"):
        make_trace("lunar", 1, 1.0, 0)
