"""The ledger: rounds without a gap, one transaction each, and answers by plain SQL."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from records_samples import HOTKEYS, order, orders, receipt, record

from protocol import Fault
from records.ledger import Ledger, Total
from values import RoundRecord

A, B, C = HOTKEYS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger(path)
    yield ledger
    ledger.close()


def run_rounds(ledger: Ledger, count: int) -> None:
    for round in range(count):
        ledger.open_round(round, orders(round))
        ledger.commit(record(round))


def test_what_is_committed_comes_back_equal_after_reopening(path: Path, ledger: Ledger) -> None:
    run_rounds(ledger, 3)
    again = Ledger(path)
    assert again.committed(0) == [record(0), record(1), record(2)]
    assert again.committed(2) == [record(2)]
    assert again.committed(3) == []
    assert again.head() == record(2)
    assert again.orders(1) == orders(1)
    again.close()


def test_empty_ledger(ledger: Ledger) -> None:
    assert ledger.head() is None
    assert ledger.meta() == {}
    assert ledger.committed(0) == []
    assert ledger.orders(0) == ()
    assert ledger.totals() == []


def test_meta_says_what_was_set_last(ledger: Ledger) -> None:
    ledger.set_meta({"task": "gpt2", "rounds": "1"})
    assert ledger.meta() == {"task": "gpt2", "rounds": "1"}
    ledger.set_meta({"rounds": "2"})
    assert ledger.meta() == {"task": "gpt2", "rounds": "2"}


def test_orders_are_sorted_by_hotkey(ledger: Ledger) -> None:
    ledger.open_round(0, orders(0)[::-1])
    assert ledger.orders(0) == orders(0)


def test_opening_again_replaces_that_round_and_later_ones(ledger: Ledger) -> None:
    run_rounds(ledger, 1)
    ledger.open_round(1, orders(1))
    ledger.open_round(2, orders(2))
    ledger.open_round(1, [order(1, B, deadline_s=3.0)])
    assert ledger.orders(0) == orders(0)
    assert ledger.orders(1) == (order(1, B, deadline_s=3.0),)
    assert ledger.orders(2) == ()


def test_the_next_round_may_open_before_the_commit(ledger: Ledger) -> None:
    ledger.open_round(0, orders(0))
    ledger.open_round(1, orders(1))
    ledger.commit(record(0))
    assert ledger.orders(1) == orders(1)


def test_a_committed_round_is_closed(ledger: Ledger) -> None:
    run_rounds(ledger, 2)
    with pytest.raises(RuntimeError, match="round 1 is committed"):
        ledger.open_round(1, orders(1))
    with pytest.raises(RuntimeError, match="round 1 cannot be committed, the next is 2"):
        ledger.commit(record(1))
    with pytest.raises(RuntimeError, match="the next is 2"):
        ledger.commit(record(3))
    assert ledger.head() == record(1)


def test_a_failed_commit_leaves_nothing(ledger: Ledger) -> None:
    ledger.open_round(0, orders(0, (A, B)))
    with pytest.raises(sqlite3.IntegrityError):  # C was never ordered
        ledger.commit(record(0))
    with pytest.raises(RuntimeError, match="a receipt of round 1"):
        ledger.commit(record(0, (receipt(1, A),)))
    assert ledger.head() is None
    ledger.commit(record(0, (receipt(0, A), receipt(0, B))))
    assert ledger.totals()[0].accepted == 1


def test_totals(ledger: Ledger) -> None:
    verdicts = [(None, Fault.LATE), (None, Fault.LATE), (Fault.SILENT, Fault.MALFORMED)]
    for round, (a, b) in enumerate(verdicts):
        ledger.open_round(round, orders(round, (A, B)))
        ledger.commit(record(round, (receipt(round, A, a), receipt(round, B, b))))
    assert ledger.totals() == [
        Total(A, 2, {"SILENT": 1}, 1024, 1 / 3),
        Total(B, 0, {"LATE": 2, "MALFORMED": 1}, 0, 1 / 3),
        Total(C, 0, {}, 0, 1 / 3),
    ]


def test_plain_sql_says_who_earned_what_and_why(path: Path, ledger: Ledger) -> None:
    ledger.open_round(0, orders(0, (A, B)))
    ledger.commit(record(0, (receipt(0, A, work=7, weight=0.75), receipt(0, B, Fault.LATE, weight=0.25))))
    query = "SELECT hotkey, fault, reason, work, weight, json_extract(scores, '$.accepted') FROM receipts ORDER BY 1"
    with sqlite3.connect(path) as other:
        assert other.execute(query).fetchall() == [
            (A, None, "", 7, 0.75, 1.0),
            (B, "LATE", "no reply by the deadline", 0, 0.25, 1.0),
        ]


def test_evaluations(ledger: Ledger) -> None:
    ledger.add_evaluation(10, {"val_loss": 2.5, "accuracy": math.inf})
    ledger.add_evaluation(0, {"val_loss": math.nan})
    ledger.add_evaluation(10, {"val_loss": 0.1})
    found = ledger.evaluations()
    assert list(found) == [0, 10]
    assert found[10] == {"val_loss": 0.1, "accuracy": math.inf}
    assert math.isnan(found[0]["val_loss"])


def test_floats_are_exact_even_where_training_diverged(ledger: Ledger) -> None:
    ledger.open_round(0, [])
    values = {"third": 1 / 3, "tiny": 5e-324, "inf": math.inf}
    ledger.commit(RoundRecord(0, "ab" * 32, "{}", (), {A: 0.1 + 0.2}, "{}", {**values, "nan": math.nan}))
    head = ledger.head()
    assert head is not None
    assert head.weights == {A: 0.1 + 0.2}
    assert math.isnan(float(head.metrics["nan"]))
    assert {key: head.metrics[key] for key in values} == values


def test_any_thread_may_call(ledger: Ledger) -> None:
    run_rounds(ledger, 1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ledger.add_evaluation(i, {"val_loss": float(i)}), range(100)))
        heads = list(pool.map(lambda _: ledger.head(), range(20)))
    assert ledger.evaluations() == {i: {"val_loss": float(i)} for i in range(100)}
    assert heads == [record(0)] * 20


def test_it_is_durable_by_its_settings(path: Path, ledger: Ledger) -> None:
    with sqlite3.connect(path) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert ledger._rows("PRAGMA synchronous") == [(2,)]  # FULL
    assert ledger._rows("PRAGMA foreign_keys") == [(1,)]


def test_a_newer_schema_is_refused(path: Path, ledger: Ledger) -> None:
    ledger.close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="ledger schema 99, this Pilot reads up to 1"):
        Ledger(path)


def test_another_file_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to look at " * 100)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not a ledger"):
        Ledger(path)
    assert path.read_bytes() == before
