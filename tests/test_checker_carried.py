"""Test the checker on orders that the next round settles: a correct run passes, and each rule is broken once."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pilot.ranking.accepted_work import AcceptedWork
from protocol import Fault
from tests.checker_samples import V0, V1, V2, V3, VALIDATOR, A, B, Draft, Writer, carried, order, span
from tests.test_checker import change, check, payload_of, sql

Edit = Callable[[Draft], object]
Damage = Callable[[Writer], object]
BREAKS: list[tuple[str, str, Edit, Damage]] = []  # rule, how, to a draft, to what was written


def nothing(_: Draft | Writer) -> None: ...


def breaks(rule: str) -> Callable[[Edit], Edit]:
    def keep(edit: Edit) -> Edit:
        BREAKS.append((rule, getattr(edit, "__name__", ""), edit, nothing))
        return edit

    return keep


def breaks_later(rule: str) -> Callable[[Damage], Damage]:
    def keep(damage: Damage) -> Damage:
        BREAKS.append((rule, getattr(damage, "__name__", ""), nothing, damage))
        return damage

    return keep


def test_a_correct_run_passes(tmp_path: Path) -> None:
    report = check(Writer(tmp_path, carried()))
    assert report.violations == []
    assert (report.proved["orders"], report.proved["receipts"]) == (8, 6)
    assert report.proved["payloads in the spool"] == 5  # of round 0 too: the round after it, of a snapshot, settled one


@breaks_later("carried")
def settled_two_rounds_late(writer: Writer) -> None:
    with closing(sqlite3.connect(writer.folder / "ledger.sqlite")) as db:
        [(state,)] = db.execute("SELECT ranker FROM rounds WHERE round = 2").fetchall()
    ranker = AcceptedWork()
    ranker.load_state_dict(json.loads(state))
    weight = ranker.weights()[B]
    receipt = writer.receipt((0, B), {}, weight).model_copy(update={"round": 2})
    signed = writer.seal(receipt, VALIDATOR)
    said = f"body = '{signed.body}', signature = '{signed.signature}', weight = {weight!r}, scores = '{{}}'"
    sql(writer, f"UPDATE receipts SET settled = 2, {said} WHERE round = 0 AND hotkey = '{B}'")
    sql(writer, f"INSERT INTO weights VALUES (2, '{B}', {weight!r})")
    (writer.miners[A < B] / "receipts.jsonl").write_text("")  # B's, which holds the other one


@breaks_later("signature")
def a_receipt_in_the_wrong_round(writer: Writer) -> None:
    sql(writer, f"UPDATE receipts SET settled = 0 WHERE round = 0 AND hotkey = '{B}'")


@breaks_later("rounds")
def never_settled(writer: Writer) -> None:
    sql(writer, f"DELETE FROM receipts WHERE round = 2 AND hotkey = '{B}'")


@breaks("twice")
def done_by_another_meanwhile(run: Draft) -> None:
    change(run, (1, A), ranges=span(3, 6))
    run.done[1, A] = run.replies[1, A] = span(3, 6)


@breaks("ordered")
def beyond_its_order(run: Draft) -> None:
    change(run, (0, B), ranges=span(2, 3))


@breaks("late")
def after_its_own_deadline(run: Draft) -> None:
    run.receipts[0, B] = {"seconds": 10.01}


@breaks("disjoint")
def ordered_while_it_was_carried(run: Draft) -> None:
    change(run, (1, A), ranges=span(3, 6))


@breaks("disjoint")
def ordered_while_it_may_still_come(run: Draft) -> None:
    change(run, (4, A), ranges=span(8, 10, 12, 13))


@breaks("complete")
def accepted_and_returned(run: Draft) -> None:
    run.cursors[3] = (14, span(3, 4, 8, 10, 12, 14))


@breaks("complete")
def lost_with_its_round(run: Draft) -> None:
    run.cursors[3] = (14, span(12, 14))
    change(run, (4, A), ranges=span(12, 14))
    del run.orders[3, B], run.settled[3, B]


@breaks("lost")
def known_to_the_miner_only(run: Draft) -> None:
    run.faults[0, B], run.held = Fault.LATE, []
    del run.done[0, B], run.replies[0, B]
    change(run, (4, A), ranges=span(2, 4, 8, 10))
    run.cursors[1:] = [(6, span(2, 4)), (10, span(2, 4, 8, 10)), (14, span(2, 4, 8, 10, 12, 14))]


@breaks("chain")
def no_version_of_it(run: Draft) -> None:
    """It is all that its round accepted."""
    del run.done[1, A], run.replies[1, A]
    run.faults[1, A] = Fault.SILENT
    run.versions, run.snapshots = [V1, V1, V2, V3], {1: V1, 3: V2}
    bases = {2: (V1, V0), 3: (V2, V1), 4: (V3, V2)}
    for place, ordered in run.orders.items():
        if place[0] in bases:
            made = order(*place, ordered.ranges, *bases[place[0]])
            run.orders[place] = made.model_copy(update={"inner_steps": ordered.inner_steps})
    run.cursors[1:] = [(6, span(4, 6)), (10, span(4, 6, 8, 10)), (14, span(4, 6, 8, 10, 12, 14))]


@breaks_later("payload")
def its_payload_is_gone(writer: Writer) -> None:
    payload_of(writer, 0, B).unlink()


@breaks("dropped")
def late_with_a_whole_reply(run: Draft) -> None:
    run.replies[2, B] = span(8, 10)


@breaks("weights")
def the_weight_of_its_own_round(run: Draft) -> None:
    run.receipts[0, B] = {"weight": 0.0}


@breaks("work")
def more_than_its_indices_hold(run: Draft) -> None:
    run.receipts[0, B] = {"work": 21}


@breaks("stale")
def on_a_version_from_before_its_round(run: Draft) -> None:
    made = order(2, B, span(8, 10), V0, None)
    run.orders[2, B] = made.model_copy(update={"inner_steps": run.orders[2, B].inner_steps})


@pytest.mark.parametrize(("rule", "how", "edit", "damage"), BREAKS, ids=[how for _, how, _, _ in BREAKS])
def test_a_run_that_breaks_a_rule(rule: str, how: str, edit: Edit, damage: Damage, tmp_path: Path) -> None:
    run = carried()
    edit(run)
    writer = Writer(tmp_path, run)
    if rule == "lost":  # told so before a restart found otherwise
        kept = Writer(tmp_path / "before", carried()).receipt((0, B), {}, 0.5)
        writer.caches[B].add_receipt(writer.seal(kept, VALIDATOR))
    damage(writer)
    found = check(writer).violations
    assert {v.rule for v in found} == {rule}, "\n".join(map(str, found))
