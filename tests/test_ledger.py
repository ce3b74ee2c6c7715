"""The ledger: rounds without a gap, one transaction each, and answers by plain SQL."""

from __future__ import annotations

import math
import random
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from records_samples import HOTKEYS, order, orders, receipt, record, reply, signed

from pilot.storage.ledger import Accounting, Late, Ledger, Total
from pilot.storage.schema import VERSION
from pilot.training.ranges import merge
from protocol import Fault, InnerSteps, Order, Range, Receipt, Reply, Signed

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


def test_the_newest_round_is_known_without_a_read(path: Path, ledger: Ledger) -> None:
    for round in range(3):
        ledger.open_round(round, orders(round))
        ledger.commit(record(round))
        assert ledger.newest == (round, record(round).version)
    with pytest.raises(RuntimeError):
        ledger.commit(record(7))
    assert ledger.newest == (2, record(2).version)
    again = Ledger(path)
    assert again.newest == ledger.newest
    again.close()


def test_empty_ledger(ledger: Ledger) -> None:
    assert ledger.head() is None
    assert ledger.newest is None
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


def test_several_rounds_may_be_open_and_are_committed_in_turn(ledger: Ledger) -> None:
    for round in range(3):
        ledger.open_round(round, orders(round))
    with pytest.raises(RuntimeError, match="round 1 cannot be committed, the next is 0"):
        ledger.commit(record(1))
    ledger.commit(record(0))
    assert [ledger.orders(round) for round in range(3)] == [orders(round) for round in range(3)]
    ledger.open_round(2, orders(2, (A,)))
    ledger.commit(record(1))
    assert ledger.orders(2) == orders(2, (A,))


def test_a_newcomer_gets_an_order_while_the_round_is_open(ledger: Ledger) -> None:
    ledger.open_round(0, orders(0, (B,)))
    ledger.open_round(1, orders(1, (B,)))
    ledger.add_orders(0, [order(0, A)])
    assert ledger.orders(0) == orders(0, (A, B))
    assert ledger.orders(1) == orders(1, (B,))  # stays open
    with pytest.raises(RuntimeError, match="round 0: a miner has an order already"):
        ledger.add_orders(0, [order(0, C), order(0, A, deadline_s=3.0)])
    assert ledger.orders(0) == orders(0, (A, B))
    with pytest.raises(RuntimeError, match=f"the order of {A} has no receipt"):
        ledger.commit(record(0, (receipt(0, B),)))
    ledger.commit(record(0, (receipt(0, A), receipt(0, B))))
    with pytest.raises(RuntimeError, match="round 0 is committed"):
        ledger.add_orders(0, [order(0, C)])


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
    ledger.note_late(1, *late(1, B))
    assert ledger.totals() == [
        Total(A, 2, {"SILENT": 1}, 1024, 1 / 3, done=2, lost=1, late=0),
        Total(B, 0, {"LATE": 2, "MALFORMED": 1}, 0, 1 / 3, done=0, lost=3, late=1),
        Total(C, 0, {}, 0, 1 / 3, done=0, lost=0, late=0),
    ]


# --- late work --------------------------------------------------------------------------------------------------------


def late(round: int, hotkey: str, seconds: float = 12.5) -> tuple[Signed, Signed]:
    return signed(reply(round, hotkey)), receipt(round, hotkey, Fault.LATE, seconds=seconds)


def test_late_work_is_noted_once_with_its_evidence(ledger: Ledger) -> None:
    ledger.open_round(0, orders(0, (A, B)))
    said, told = late(0, B)
    with pytest.raises(RuntimeError, match="round 0 is not committed"):
        ledger.note_late(0, said, told)
    ledger.commit(record(0, (receipt(0, A), receipt(0, B, Fault.LATE))))
    for again in (said, told), late(0, B, 13.0):
        ledger.note_late(0, *again)
    assert ledger.late() == [Late(0, B, (Range(0, 1),), 12.5, said, told)]
    assert ledger.late_batches() == 1


def test_what_was_accepted_or_never_ordered_is_not_late(ledger: Ledger) -> None:
    ledger.open_round(0, orders(0, (A, B)))
    ledger.commit(record(0, (receipt(0, A), receipt(0, B))))
    with pytest.raises(RuntimeError, match=f"the work of {A} was accepted"):
        ledger.note_late(0, *late(0, A))
    with pytest.raises(sqlite3.IntegrityError):
        ledger.note_late(0, *late(0, C))
    assert ledger.late() == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (reply(0, A), receipt(0, B, Fault.LATE)),
        (reply(0, A), receipt(1, A, Fault.LATE)),
        (reply(1, A), receipt(0, A, Fault.LATE)),
        (reply(0, A), receipt(0, A)),
    ],
    ids=["another's", "another round's receipt", "another round's reply", "accepted"],
)
def test_only_a_reply_with_its_late_receipt_is_noted(ledger: Ledger, said: Reply, told: Signed) -> None:
    ledger.open_round(0, orders(0))
    with pytest.raises(RuntimeError, match="do not fit"):
        ledger.note_late(0, signed(said), told)


# --- inner steps ------------------------------------------------------------------------------------------------------

INNER = InnerSteps(batches=1, first_step=0, steps=9, keep=False, optimizer={})


def inner(round: int, hotkey: str, ranges: tuple[Range, ...] = ()) -> Signed:
    what = Order.parse(order(round, hotkey, ranges=ranges).body)
    return signed(what.model_copy(update={"inner_steps": INNER}))


def settled(of: Signed, round: int, fault: Fault | None = None, done: tuple[Range, ...] = ()) -> Signed:
    """The receipt of an order, by that round."""
    what = Order.parse(of.body)
    said = Receipt.parse(receipt(round, what.hotkey, fault, done=done or what.ranges).body)
    return signed(said.model_copy(update={"order": of.digest}))


def test_an_order_of_inner_steps_may_be_settled_by_the_next_round(path: Path, ledger: Ledger) -> None:
    """With two rounds in flight its miner has another order in that one."""
    first, second = {h: inner(0, h) for h in (A, B)}, {h: inner(1, h) for h in (A, B)}
    ledger.open_round(0, list(first.values()))
    ledger.open_round(1, list(second.values()))
    ledger.commit(record(0, (settled(first[B], 0),)))
    assert ledger.unsettled() == (first[A],)
    assert ledger.accounting() == Accounting(4, outstanding=3, accepted=1, undone=0, lost=0, reassigned=2)
    ledger.close()

    again = Ledger(path)
    assert again.unsettled() == (first[A],)
    both = (settled(first[A], 1), settled(second[A], 1), settled(second[B], 1, Fault.LATE))
    again.commit(record(1, both))
    assert again.unsettled() == ()
    assert [r.receipts for r in again.committed(0)] == [(settled(first[B], 0),), both]
    assert [r.receipts for r in again.committed(1)] == [both]
    assert again._rows("SELECT round, settled FROM receipts ORDER BY hotkey, round") == [(0, 1), (1, 1), (0, 0), (1, 1)]
    assert [(t.done, t.lost) for t in again.totals()][:2] == [(2, 0), (1, 1)]
    assert [again.oldest_needed(n) for n in (0, 1, 2)] == [0, 0, 2]
    again.close()


def test_nothing_waits_for_a_receipt_longer_than_that(ledger: Ledger) -> None:
    ledger.open_round(0, [inner(0, A), inner(0, B)])
    ledger.commit(record(0, ()))
    ledger.open_round(1, [order(1, C)])
    with pytest.raises(RuntimeError, match=f"round 0: the order of {B} has no receipt"):
        ledger.commit(record(1, (settled(inner(0, A), 1), receipt(1, C))))
    both = settled(inner(0, A), 1), settled(inner(0, B), 1, Fault.LATE)
    with pytest.raises(RuntimeError, match=f"round 1: the order of {C} has no receipt"):  # it orders a gradient
        ledger.commit(record(1, both))
    ledger.commit(record(1, (*both, receipt(1, C))))
    ledger.note_late(0, *late(0, B))  # which its own round may still hear of


# --- accounts ---------------------------------------------------------------------------------------------------------


def test_what_became_of_each_micro_batch(ledger: Ledger) -> None:
    """Against counting them one by one: open rounds, partial replies, faults, reordered ranges, orders carried."""
    rng = random.Random(0)
    waiting: list[int] = []  # undone or lost, to be ordered again
    counts, times, top = Counter[str](), Counter[int](), 0
    plans: dict[int, dict[str, list[int]]] = {}
    carried: dict[str, tuple[Signed, list[int]]] = {}
    for round in range(40):
        plan = plans[round] = {}
        for hotkey in HOTKEYS:
            again, waiting = waiting[:3], waiting[3:]
            fresh = rng.randrange(1, 5)
            plan[hotkey] = [*again, *range(top, top + fresh)]
            top += fresh
            times.update(plan[hotkey])
        mine = [inner(round, hotkey, as_ranges(plan[hotkey])) for hotkey in HOTKEYS]
        ledger.open_round(round, mine[1:])
        ledger.add_orders(round, mine[:1])
        if round < 2:  # three are open at once
            continue
        due = [*carried.values()]
        orders_of = dict(zip(HOTKEYS, ledger.orders(round - 2), strict=True))
        answers = {hotkey: (orders_of[hotkey], indices) for hotkey, indices in plans.pop(round - 2).items()}
        carried = {hotkey: answer for hotkey, answer in answers.items() if rng.random() < 0.2}
        receipts = []
        for of, indices in [*due, *(answer for hotkey, answer in answers.items() if hotkey not in carried)]:
            fault = rng.choice([None, None, Fault.LATE])
            done = [] if fault else rng.sample(indices, rng.randrange(1, len(indices) + 1))
            receipts.append(settled(of, round - 2, fault, as_ranges(done)))
            waiting += set(indices) - set(done)
            counts += Counter(accepted=len(done), **{"lost" if fault else "undone": len(indices) - len(done)})
        ledger.commit(record(round - 2, tuple(receipts)))
    open_still = sum(len(indices) for plan in plans.values() for indices in plan.values())
    open_still += sum(len(indices) for _, indices in carried.values())
    found = ledger.accounting()
    assert found == Accounting(
        ordered=times.total(), outstanding=open_still, reassigned=times.total() - len(times), **counts
    )
    assert found.ordered == found.outstanding + found.accepted + found.undone + found.lost
    assert found.undone + found.lost - found.reassigned == len(waiting)
    assert sum(total.lost for total in ledger.totals()) == found.lost
    assert sum(total.done for total in ledger.totals()) == found.accepted


def as_ranges(indices: Iterable[int]) -> tuple[Range, ...]:
    return merge(Range(i, i + 1) for i in indices)


def test_accounts_of_an_empty_ledger(ledger: Ledger) -> None:
    assert ledger.accounting() == Accounting(0, 0, 0, 0, 0, 0)
    assert ledger.late_batches() == 0


def test_a_resume_reads_all_rounds_with_few_queries(ledger: Ledger) -> None:
    run_rounds(ledger, 20)
    statements: list[str] = []
    ledger._connection.set_trace_callback(statements.append)
    assert len(ledger.committed(0)) == 20
    assert len(statements) == 3


# --- what lies on the disk --------------------------------------------------------------------------------------------


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
    ledger.commit(replace(record(0, ()), weights={A: 0.1 + 0.2}, metrics={**values, "nan": math.nan}))
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


@pytest.mark.parametrize(
    ("version", "release"),
    [(1, "Pilot 0.1 (protocol pilot/1)"), (3, "Pilot 0.1 (protocol pilot/1)"), (99, "a newer Pilot")],
)
def test_another_schema_is_refused_in_one_line_that_says_what_to_do(path: Path, version: int, release: str) -> None:
    with sqlite3.connect(path) as other:
        other.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="ledger schema") as caught:
        Ledger(path)
    assert str(caught.value) == (
        f"{path}: {release} made this run (ledger schema {version}, this Pilot reads 4); "
        "finish it with that release, or start another --run"
    )
    assert path.read_bytes() == before


def test_a_ledger_of_this_schema_reads_as_it_was_written(path: Path) -> None:
    """The golden file holds rounds 0 and 1 and open round 2. A release that cannot read it needs another version."""
    with sqlite3.connect(path) as golden:
        golden.executescript((Path(__file__).parent / "golden" / f"ledger_{VERSION}.sql").read_text())
    ledger, fresh = Ledger(path), Ledger(path.with_name("fresh.sqlite"))
    tables = "SELECT name, sql FROM sqlite_master ORDER BY name"
    assert ledger._rows(tables) == fresh._rows(tables)
    assert ledger._rows("PRAGMA foreign_key_check") == []
    fresh.close()
    kept = [record(round, (receipt(round, A), receipt(round, B, Fault.LATE))) for round in range(2)]
    found = ledger.committed(0)  # but for what was signed, whose form is the protocol's
    assert [replace(r, receipts=()) for r in found] == [replace(r, receipts=()) for r in kept]
    assert [len(r.receipts) for r in found] == [2, 2]
    assert [o.kind for o in ledger.orders(2)] == ["order"]
    assert ledger.accounting() == Accounting(5, outstanding=1, accepted=2, undone=0, lost=2, reassigned=2)
    ledger.note_late(1, *late(1, B))
    ledger.close()
    again = Ledger(path)
    assert len(again.late()) == 1
    assert again.meta() == {"task": '"gpt2"'}
    again.close()


def test_another_file_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to look at " * 100)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not a ledger"):
        Ledger(path)
    assert path.read_bytes() == before
