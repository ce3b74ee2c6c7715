"""Receipts that contradict each other, or what the miner has sent: told, and kept as evidence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pilot.simulation.virtual_time import run
from pilot.storage.miner_store import FileMinerStore
from pilot.transport.auth import sign_message
from pilot.worker.contradictions import contradiction
from protocol import Fault, Range, Receipt, Reply
from tests.echo import MALLORY, MINER, VALIDATOR, Echo, make_order, make_receipt
from tests.tiny import make_worker

ORDER = make_order()
FIRST = make_receipt(ORDER, "1" * 64)


def reply(**changed: Any) -> Reply:
    echo = Echo()
    echo.orders["1" * 64], echo.blobs[ORDER.update.refs[0].digest] = ORDER, b"payload"
    return echo.answer("1" * 64).model_copy(update=changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"weight": 0.25},
        {"work": 3},
        {"done": ()},
        {"verdict": Fault.UNVERIFIED, "done": (), "work": 0},
        {"verdict": Fault.LATE, "done": (), "work": 0},
        {"reason": "3 of 4"},
        {"scores": {"work": 0.5}},
        {"round": 1},
        {"seconds": 9.0},
    ],
    ids=str,
)
def test_two_receipts_for_one_order(changed: dict[str, Any]) -> None:
    second = FIRST.model_copy(update=changed)
    assert "ACCEPTED" in (contradiction(second, [FIRST, second], None) or "")
    assert contradiction(FIRST, [FIRST, second], None)


@pytest.mark.parametrize("before", [Fault.SILENT, Fault.LEAVING, Fault.LATE])
def test_a_late_reply_has_a_second_receipt(before: Fault) -> None:
    first = FIRST.model_copy(update={"verdict": before, "done": (), "work": 0})
    second = first.model_copy(update={"verdict": Fault.LATE, "reason": "came 3 s after the order"})
    assert contradiction(second, [first, second], None) is None
    assert contradiction(first, [first, second], None) is None


def test_the_receipts_of_other_orders_are_no_contradiction() -> None:
    assert contradiction(FIRST, [FIRST, FIRST.model_copy(update={"order": "2" * 64, "weight": 0.1})], reply()) is None


def test_a_receipt_that_accepts_other_work_than_was_sent() -> None:
    assert contradiction(FIRST, [FIRST], reply()) is None
    told = contradiction(FIRST, [FIRST], reply(done=(Range(0, 2), Range(3, 4))))
    assert told == "3 micro-batches were sent, from 0 on"
    refused = FIRST.model_copy(update={"verdict": Fault.NONFINITE, "done": (), "work": 0})
    assert contradiction(refused, [refused], reply()) is None


def test_a_miner_tells_of_them_and_keeps_both(tmp_path: Path) -> None:
    async def main() -> list[str]:
        said: list[str] = []
        worker = make_worker(tmp_path, MINER, said, time.monotonic)
        try:
            for weight in (1.0, 0.25, 0.25):
                receipt = FIRST.model_copy(update={"weight": weight})
                worker.accept_receipt(VALIDATOR.ss58_address, receipt, sign_message(VALIDATOR, receipt))
            other = FIRST.model_copy(update={"weight": 0.5})  # no other validator can make it look so
            worker.accept_receipt(MALLORY.ss58_address, other, sign_message(MALLORY, other))
        finally:
            worker.close()
        return said

    first, second, third = run(main())
    assert first.startswith("round 0: ACCEPTED")
    assert "CONTRADICTORY" in second
    assert "weight 0.250, but another one for the same order says ACCEPTED" in second
    assert "weight 1.000" in second
    assert "CONTRADICTORY" not in third
    kept = [Receipt.parse(signed.body).weight for signed in FileMinerStore(tmp_path / MINER.ss58_address).receipts()]
    assert kept == [1.0, 0.25, 0.5]
