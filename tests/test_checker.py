"""Test the checker: a correct run passes, and each rule is broken once, in a run that is otherwise correct."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pilot.ranking.accepted_work import AcceptedWork
from pilot.storage.checker import RULES, Report, check_run
from pilot.storage.run_store import RunStore
from pilot.transport.auth import verify_message
from protocol import Fault, Receipt, Update, next_version
from tests.checker_samples import (
    MALLORY,
    STATES,
    UNITS,
    V0,
    V1,
    V2,
    V3,
    VALIDATOR,
    A,
    B,
    Draft,
    Place,
    Writer,
    draft,
    order,
    span,
)


def check(writer: Writer) -> Report:
    return check_run(
        writer.folder,
        verify_message=verify_message,
        miners=writer.miners,
        ranker=AcceptedWork,
        count=lambda index: UNITS,
    )


# --- runs that kept their word ----------------------------------------------------------------------------------------


def test_a_correct_run_passes_and_stays_unchanged(tmp_path: Path) -> None:
    writer = Writer(tmp_path, draft())
    before = contents(tmp_path)
    report = check(writer)
    assert report.violations == []
    assert report.proved == {
        "rounds": 4,
        "orders": 7,
        "receipts": 6,
        "replies accepted": 4,
        "micro-batches accepted": 6,
        "late notes": 1,
        "payloads in the spool": 2,  # of rounds 1 and 2: from the second-newest snapshot on
        "snapshots": 2,
        "receipts that miners hold": 6,
        "signatures": 7 + 6 + 2 + 2 + 6,
    }
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[Path, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_damaged_spool_stays_unchanged(tmp_path: Path) -> None:
    writer = Writer(tmp_path, draft())
    payload_of(writer, 2, A).write_bytes(b"damaged")
    before = contents(tmp_path)
    assert {v.rule for v in check(writer).violations} == {"payload"}
    assert contents(tmp_path) == before


def test_work_on_the_version_before_is_fine_where_the_order_says_so(tmp_path: Path) -> None:
    run = draft()
    run.orders[2, A] = order(2, A, span(4, 6), V1, V0).model_copy(update={"staleness": 1})
    assert check(Writer(tmp_path, run)).violations == []


def test_an_epoch_may_begin_early_with_coverage_stream(tmp_path: Path) -> None:
    run = draft()
    too_early(run)
    run.coverage = "stream"
    assert check(Writer(tmp_path, run)).violations == []


def test_a_run_in_use_or_missing_is_refused_in_one_line(tmp_path: Path) -> None:
    writer = Writer(tmp_path, draft())
    with closing(RunStore.open(writer.folder, keep=2)), pytest.raises(ValueError, match=r"a validator .* is using it"):
        check(writer)
    writer.folder = tmp_path / "none"
    with pytest.raises(ValueError, match="there is no run in it"):
        check(writer)


# --- each rule, broken ------------------------------------------------------------------------------------------------

BREAKS: list[tuple[str, str, Callable[[Draft], object]]] = []  # rule, how, to a draft
LATER: list[tuple[str, str, Callable[[Writer], object]]] = []  # to what was written


def breaks(rule: str) -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    def keep(edit: Callable[[Draft], None]) -> Callable[[Draft], None]:
        BREAKS.append((rule, edit.__name__, edit))
        return edit

    return keep


def breaks_later(rule: str) -> Callable[[Callable[[Writer], None]], Callable[[Writer], None]]:
    def keep(edit: Callable[[Writer], None]) -> Callable[[Writer], None]:
        LATER.append((rule, edit.__name__, edit))
        return edit

    return keep


def sql(writer: Writer, *statements: str) -> None:
    """Past the ledger's own checks."""
    with closing(sqlite3.connect(writer.folder / "ledger.sqlite")) as db, db:
        for statement in statements:
            assert db.execute(statement).rowcount > 0


def payload_of(writer: Writer, round: int, hotkey: str) -> Path:
    return writer.folder / "spool" / f"{round:08d}" / f"{hotkey}.payload"


def change(run: Draft, place: Place, **values: object) -> None:
    run.orders[place] = run.orders[place].model_copy(update=values)


@pytest.mark.parametrize("kind", ["order", "receipt", "reply"])
def test_a_message_signed_by_another_key(kind: str, tmp_path: Path) -> None:
    run = draft()
    run.keys[kind, 2, A] = MALLORY
    found = check(Writer(tmp_path, run)).violations
    assert {(v.rule, v.round, v.hotkey) for v in found} == {("signature", 2, A)}
    assert f"signed by {MALLORY}" in found[0].text


@breaks_later("signature")
def a_signature_of_other_words(writer: Writer) -> None:
    sql(writer, f"UPDATE orders SET signature = '{'0f' * 64}' WHERE round = 1")


@breaks_later("signature")
def a_signature_that_is_none(writer: Writer) -> None:
    sql(writer, "UPDATE receipts SET signature = 'zz' WHERE round = 3")
    (writer.miners[A > B] / "receipts.jsonl").write_text("")  # which holds the right one


@breaks_later("row")
def a_column_that_says_more(writer: Writer) -> None:
    sql(writer, f"UPDATE receipts SET work = 99 WHERE round = 2 AND hotkey = '{A}'")


@breaks_later("row")
def late_work_that_says_more(writer: Writer) -> None:
    sql(writer, "UPDATE late SET done = '[[6, 8]]'")


@breaks_later("rounds")
def a_receipt_that_is_gone(writer: Writer) -> None:
    sql(writer, "DELETE FROM receipts WHERE round = 3")


@breaks_later("rounds")
def a_round_that_is_skipped(writer: Writer) -> None:
    sql(writer, "UPDATE rounds SET round = 4 WHERE round = 3", "UPDATE weights SET round = 4 WHERE round = 3")
    sql(writer, "DELETE FROM receipts WHERE round = 3", "DELETE FROM orders WHERE round >= 3")


@breaks("rounds")
def a_receipt_for_another_order(run: Draft) -> None:
    run.receipts[3, A] = {"order": V0}


@breaks("twice")
def work_that_another_did_too(run: Draft) -> None:
    change(run, (2, B), ranges=span(5, 8))
    del run.faults[2, B], run.late[2, B]
    run.done[2, B] = run.replies[2, B] = span(5, 6)


@breaks("twice")
def work_of_an_earlier_round(run: Draft) -> None:
    change(run, (2, A), ranges=span(0, 1, 4, 6))
    run.done[2, A] = run.replies[2, A] = span(0, 1, 4, 6)


@breaks("ordered")
def accepted_beyond_the_order(run: Draft) -> None:
    change(run, (2, A), ranges=span(4, 5))


@breaks("ordered")
def credit_for_a_fault(run: Draft) -> None:
    run.receipts[3, A] = {"work": 10}


@breaks("ordered")
def accepted_nothing(run: Draft) -> None:
    run.done[2, A] = run.replies[2, A] = ()
    run.cursors[2:] = [(8, span(4, 8))] * 2


@breaks("late")
def accepted_after_the_deadline(run: Draft) -> None:
    run.receipts[2, A] = {"seconds": 10.01}


@breaks_later("late")
def accepted_and_late(writer: Writer) -> None:
    reply = writer.seal(writer.reply((1, A), span(3, 4), b""), A)
    receipt = writer.seal(writer.receipt((1, A), {}, 0.0).model_copy(update={"verdict": Fault.LATE}), VALIDATOR)
    values = ", ".join(f"'{message.model_dump_json()}'" for message in (reply, receipt))
    columns = "round, hotkey, done, seconds, reply, receipt"
    sql(writer, f"INSERT INTO late ({columns}) VALUES (1, '{A}', '[[3, 4]]', 1.0, {values})")


@breaks("disjoint")
def ordered_from_two_at_once(run: Draft) -> None:
    change(run, (2, B), ranges=span(5, 8))


@breaks("disjoint")
def ordered_after_it_was_accepted(run: Draft) -> None:
    change(run, (4, A), ranges=span(0, 1))


@breaks("complete")
def lost_indices(run: Draft) -> None:
    run.cursors[3] = (8, span(6, 7))
    change(run, (4, A), ranges=span(6, 7))


@breaks("complete")
def accepted_and_returned(run: Draft) -> None:
    run.cursors[3] = (8, span(3, 4, 6, 8))


@breaks("complete")
def a_cursor_too_far(run: Draft) -> None:
    run.cursors[3] = (12, span(6, 8))


@breaks("complete")
def a_cursor_not_far_enough(run: Draft) -> None:
    run.cursors[3] = (5, ())


@breaks("epoch")
def too_early(run: Draft) -> None:
    run.orders[1, B] = order(1, B, span(4, 5), V1, V0)
    run.faults[1, B] = Fault.SILENT


@breaks("lost")
def a_receipt_that_the_ledger_has_not(run: Draft) -> None:
    run.held.append(
        Receipt(
            run="run",
            round=2,
            hotkey=B,
            order=V0,
            verdict="ACCEPTED",
            reason="",
            done=span(6, 8),
            work=20,
            scores={},
            weight=0.5,
        )
    )


@breaks_later("lost")
def a_receipt_that_the_ledger_has_in_other_words(writer: Writer) -> None:
    writer.caches[A].add_receipt(writer.seal(writer.receipt((2, A), {}, 0.75), VALIDATOR))


@breaks_later("lost")
def a_receipt_that_nobody_can_read(writer: Writer) -> None:
    with (writer.miners[0] / "receipts.jsonl").open("a") as file:
        file.write('{"kind": "rece\n')


@breaks_later("payload")
def a_payload_that_is_gone(writer: Writer) -> None:
    payload_of(writer, 2, A).unlink()


@breaks_later("payload")
def a_payload_with_other_bytes(writer: Writer) -> None:
    path = payload_of(writer, 1, A)
    path.write_bytes(b"X" + path.read_bytes()[1:])


@breaks("payload")
def a_reply_that_did_less(run: Draft) -> None:
    run.replies[2, A] = span(4, 5)


@breaks("dropped")
def a_whole_reply_called_silent(run: Draft) -> None:
    run.replies[3, A] = span(6, 7)


@breaks("chain")
def a_new_version_of_nothing(run: Draft) -> None:
    run.versions[3] = next_version(V3, STATES[4])
    run.orders[4, A] = order(4, A, span(6, 8), run.versions[3], V3)


@breaks("chain")
def an_old_version_of_new_work(run: Draft) -> None:
    run.versions[2:] = [V2, V2]
    run.snapshots[3] = V2
    for place in ((3, A), (4, A)):
        run.orders[place] = order(*place, run.orders[place].ranges, V2, V1)


@breaks("chain")
def a_version_that_its_update_does_not_make(run: Draft) -> None:
    change(run, (2, A), update=run.orders[1, A].update)


@breaks("chain")
def a_version_of_another_base(run: Draft) -> None:
    run.snapshots[3] = other = next_version(V0, STATES[3])
    run.versions[2:] = [other, other]
    for place in ((3, A), (4, A)):
        run.orders[place] = order(*place, run.orders[place].ranges, other, V0)


@breaks("chain")
def a_version_with_two_proofs(run: Draft) -> None:
    change(run, (3, A), state_digest=STATES[0])
    change(run, (4, A), state_digest=STATES[1])


@breaks("chain")
def a_way_that_skips_a_version(run: Draft) -> None:
    way = Update(base=V0, steps=(*run.orders[1, A].update.steps, *run.orders[3, A].update.steps))
    change(run, (3, A), update=way)


@breaks("stale")
def ordered_on_the_version_before(run: Draft) -> None:
    run.orders[2, A] = order(2, A, span(4, 6), V1, V0)


@breaks("stale")
def ordered_on_the_one_before_that(run: Draft) -> None:
    run.orders[2, A] = order(2, A, span(4, 6), V0, None).model_copy(update={"staleness": 1})


@breaks_later("weights")
def a_weight_that_nobody_earned(writer: Writer) -> None:
    sql(writer, f"UPDATE weights SET weight = 0.9 WHERE round = 2 AND hotkey = '{B}'")


@breaks_later("weights")
def a_miner_without_its_weight(writer: Writer) -> None:
    """The newest round has the weights of all miners, though this one had no order in it."""
    sql(writer, f"DELETE FROM weights WHERE round = 3 AND hotkey = '{B}'")


@breaks_later("weights")
def a_miner_without_its_weight_in_an_older_round(writer: Writer) -> None:
    sql(writer, f"DELETE FROM weights WHERE round = 1 AND hotkey = '{A}'")


@breaks("weights")
def a_receipt_of_another_weight(run: Draft) -> None:
    run.receipts[2, A] = {"weight": 1.0}


@breaks("work")
def more_work_than_its_indices_hold(run: Draft) -> None:
    run.receipts[2, A] = {"work": 21}


@breaks("snapshot")
def a_snapshot_of_another_version(run: Draft) -> None:
    run.snapshots[3] = V2


@pytest.mark.parametrize(("rule", "how", "edit"), BREAKS, ids=[how for _, how, _ in BREAKS])
def test_a_run_that_breaks_a_rule(rule: str, how: str, edit: Callable[[Draft], object], tmp_path: Path) -> None:
    run = draft()
    edit(run)
    found = check(Writer(tmp_path, run)).violations
    assert {v.rule for v in found} == {rule}, "\n".join(map(str, found))


@pytest.mark.parametrize(("rule", "how", "edit"), LATER, ids=[how for _, how, _ in LATER])
def test_records_that_break_a_rule(rule: str, how: str, edit: Callable[[Writer], object], tmp_path: Path) -> None:
    writer = Writer(tmp_path, draft())
    edit(writer)
    found = check(writer).violations
    assert {v.rule for v in found} == {rule}, "\n".join(map(str, found))


def test_every_rule_has_a_case() -> None:
    assert {rule for rule, _, _ in [*BREAKS, *LATER]} == RULES.keys() - {
        "carried"
    }  # for which see test_checker_carried
