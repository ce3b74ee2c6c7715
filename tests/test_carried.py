"""Inner steps that a round was closed without: carried into the next one, once, and never lost or counted twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from pilot.market.receipts import by_miner
from pilot.market.verify import Contribution
from pilot.ranking import Evidence
from pilot.simulation.virtual_time import run
from pilot.storage.checker import check_run
from pilot.storage.run_store import RunStore
from pilot.training.diloco import DiLoCo
from pilot.training.ranges import Cursor, indices, size
from pilot.transport.auth import verify_message
from protocol import Fault, Order, Receipt
from tasks.quadratic import Quadratic, QuadraticConfig
from tests.test_round import Dying
from tests.test_volatile import A, B, C, accepted, metrics, orders
from tests.tiny import MINERS, OPTIMIZER, Place, batch_takes, equal, make_place, parameters, play, receipts

PLAN = DiLoCo(
    tau=2, batches=2, outer_lr=0.7, momentum=0.7, keep=False, warmup_rounds=0, rounds=20, optimizer=asdict(OPTIMIZER)
)
TERMS = {"diloco": PLAN, "auto": True, "deadline_k": 4.0, "grace_s": 2.0, "deadline_s": 600.0}
SLOW_S = 12.0  # a micro-batch: a round takes four seconds, and is closed before it took eight


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Quadratic:
    """An epoch is 32 micro-batches."""
    return Quadratic.prepare(QuadraticConfig(dimension=64), seed=0, cache=tmp_path_factory.mktemp("quadratic"))


def three(folder: Path, task: Quadratic, **options: object) -> Place:
    return make_place(folder, task, miners=MINERS[:3], batch_s=(1.0, 1.0, 1.0), **{**TERMS, **options})  # type: ignore[arg-type]


def pace(place: Place, seconds: float) -> None:
    """Of B, a micro-batch."""
    place.workers[B]._executor._charge = batch_takes(seconds)


async def until_it_is_carried(place: Place, rounds: int, slow: int = 1, seconds: float = SLOW_S) -> None:
    """B is slow in round `slow`, which is settled then; it is as fast as the others again."""
    await place.market.open_rounds(rounds)
    for _ in range(slow):
        await place.market.run_round(rounds)
    pace(place, seconds)
    await place.market.run_round(rounds)
    pace(place, 1.0)


async def with_a_late_one(place: Place, rounds: int, slow: int = 1, seconds: float = SLOW_S) -> None:
    await until_it_is_carried(place, rounds, slow, seconds)
    await play(place.market, rounds)


def prove(place: Place) -> None:
    """Nothing was accepted twice, nothing lost, and every account is balanced. Closes the store."""
    books = place.store.ledger.accounting()
    assert books.ordered == books.outstanding + books.accepted + books.undone + books.lost
    returned = size(Cursor.loads(place.store.head().cursor).returned)  # with what is out
    assert books.undone + books.lost - books.reassigned == returned - books.outstanding
    assert sum(total.lost for total in place.store.ledger.totals()) == books.lost
    place.store.close()
    folder = place.store.folder
    caches = [folder.parent / "miners" / k.ss58_address for k in MINERS[:3]]
    report = check_run(folder, verify_message=verify_message, miners=caches, count=place.market.task.count)
    assert report.violations == []


def replayed(folder: Path, task: Quadratic, **options: object) -> dict[str, torch.Tensor]:
    """What a new process makes of what lies on the disk."""

    async def main() -> dict[str, torch.Tensor]:
        place = three(folder, task, **options)
        await place.market.replay(0)
        place.store.close()
        return parameters(place.market)

    return run(main())


# --- the way of one ---------------------------------------------------------------------------------------------------


def test_what_a_round_was_closed_without_counts_in_the_next(tmp_path: Path, task: Quadratic) -> None:
    async def main() -> dict[str, torch.Tensor]:
        place = three(tmp_path, task)
        await with_a_late_one(place, 5)
        mine = {n: orders(place.store, n) for n in range(5)}
        order = mine[1][B]
        assert B not in receipts(place.store, 1)
        assert B not in mine[2]  # it gets nothing new
        assert not {i for o in mine[2].values() for i in indices(o.ranges)} & set(indices(order.ranges))

        late = receipts(place.store, 2)[B]
        assert (late.verdict, late.round) == ("ACCEPTED", 2)
        assert 0 < size(late.done) < 4  # told to stop, it ended with its micro-batch
        assert late.reason.endswith("carried from round 1")
        assert set(receipts(place.store, 2)) == {A, B, C}
        assert receipts(place.store, 3)[B].verdict == "ACCEPTED"
        assert order.version == mine[1][A].version != mine[2][A].version
        assert [row.get("carried", 0) for row in metrics(place.store)] == [0, 0, 1, 0, 0]
        assert sorted(accepted(place.store)) == sorted(set(accepted(place.store)))
        told = (tmp_path / "miners" / B / "receipts.jsonl").read_text().splitlines()
        assert len(told) == 4  # one for each of its orders
        prove(place)
        return parameters(place.market)

    assert equal(run(main()), replayed(tmp_path, task))


def test_a_gradient_is_not_carried(tmp_path: Path, task: Quadratic) -> None:
    async def main() -> None:
        place = three(tmp_path, task, diloco=replace(PLAN, warmup_rounds=3), batches=4)
        await with_a_late_one(place, 4)
        assert receipts(place.store, 1)[B].verdict == Fault.LATE
        assert B in orders(place.store, 2)
        prove(place)

    run(main())


def test_it_is_late_where_the_next_round_is_closed_without_it_too(tmp_path: Path, task: Quadratic) -> None:
    async def main() -> None:
        place = three(tmp_path, task)
        await with_a_late_one(place, 6, seconds=60.0)
        order = orders(place.store, 1)[B]
        late = receipts(place.store, 2)[B]
        assert (late.verdict, late.done, late.work) == (Fault.LATE, (), 0)
        assert late.reason.endswith("carried from round 1")
        assert set(indices(order.ranges)) <= {i for o in orders(place.store, 3).values() for i in indices(o.ranges)}
        await asyncio.sleep(100.0)
        assert (1, B) in [(note.round, note.hotkey) for note in place.store.ledger.late()]
        prove(place)

    run(main())


def test_the_last_round_carries_nothing(tmp_path: Path, task: Quadratic) -> None:
    async def main() -> None:
        place = three(tmp_path, task)
        await with_a_late_one(place, 2)
        assert receipts(place.store, 1)[B].verdict == Fault.LATE
        assert Cursor.loads(place.store.head().cursor).returned == orders(place.store, 1)[B].ranges
        assert place.store.ledger.accounting().outstanding == 0
        prove(place)

    run(main())


def test_with_an_overlap_two_orders_of_a_miner_count_in_a_round(tmp_path: Path, task: Quadratic) -> None:
    async def main() -> dict[str, torch.Tensor]:
        place = three(tmp_path, task, overlap=1)
        await with_a_late_one(place, 8, slow=4, seconds=9.0)
        of = {s.digest: Order.parse(s.body) for n in range(8) for s in place.store.orders(n)}
        settled = [[Receipt.parse(s.body) for s in record.receipts] for record in place.store.committed(0)]
        [both] = [n for n, got in enumerate(settled) if len(got) > len({r.hotkey for r in got})]
        mine = [(of[r.order].round, r.verdict) for r in settled[both] if r.hotkey == B]
        assert mine == [(both - 1, "ACCEPTED"), (both, "ACCEPTED")]
        assert B not in orders(place.store, both + 1)  # planned while it had two to do
        assert metrics(place.store)[both]["carried"] == 1
        assert metrics(place.store)[both]["miners"] == 3
        assert sorted(accepted(place.store)) == sorted(set(accepted(place.store)))
        prove(place)
        return parameters(place.market)

    assert equal(run(main()), replayed(tmp_path, task, overlap=1))


@pytest.mark.parametrize("overlap", [0, 1])
def test_with_coverage_once_an_epoch_ends_with_what_is_carried(tmp_path: Path, task: Quadratic, overlap: int) -> None:
    async def main() -> None:
        place = three(tmp_path, task, once=True, overlap=overlap)
        place.store.set_meta({"coverage": json.dumps("once")})
        await with_a_late_one(place, 9, slow=2)
        kept = [row.get("carried", 0) for row in metrics(place.store)]
        assert kept[3] == 1
        if not overlap:
            assert orders(place.store, 3) == {}  # the rest of the epoch is with B
            assert metrics(place.store)[2]["epoch_done"] == 32 - size(orders(place.store, 2)[B].ranges)
        assert max(accepted(place.store)) >= 32
        prove(place)

    run(main())


def test_a_miner_is_judged_once_a_round() -> None:
    mine = [Evidence(A, None, 40, 80), Evidence(B, Fault.LATE, 0, 80), Evidence(B, None, 60, 80)]
    assert by_miner(mine) == [Evidence(A, None, 40, 80), Evidence(B, None, 60, 160)]
    assert by_miner(mine[1:2] * 2) == [Evidence(B, Fault.LATE, 0, 160)]


# --- the end of a run -------------------------------------------------------------------------------------------------


def test_a_round_that_is_stopped_carries_nothing(tmp_path: Path, task: Quadratic) -> None:
    async def main() -> None:
        place = three(tmp_path, task)
        await place.market.open_rounds(9)
        await place.market.run_round(9)
        pace(place, SLOW_S)
        asyncio.get_running_loop().call_later(2.5, place.market.request_stop)
        await play(place.market, 9)
        assert receipts(place.store, 1)[B].verdict == Fault.LATE
        assert place.store.head().round == 1
        assert place.store.ledger.accounting().outstanding == 0
        prove(place)

    run(main())


@pytest.mark.parametrize(("seconds", "verdict"), [(9.0, "ACCEPTED"), (60.0, Fault.LATE)])
def test_a_stop_that_comes_after_settles_what_was_carried(
    tmp_path: Path, task: Quadratic, seconds: float, verdict: str
) -> None:
    async def main() -> None:
        place = three(tmp_path, task)
        mean = place.market.aggregate

        def stopped(contributions: Sequence[Contribution]) -> object:
            if place.market.round == 1:
                place.market.request_stop()
            return mean(contributions)

        place.market.aggregate = stopped  # type: ignore[assignment]
        await with_a_late_one(place, 9, seconds=seconds)
        assert place.store.head().round == 2
        assert orders(place.store, 2) == {}
        assert {hotkey: r.verdict for hotkey, r in receipts(place.store, 2).items()} == {B: verdict}
        assert place.store.ledger.accounting().outstanding == 0
        prove(place)

    run(main())


def test_patience_does_not_end_before_what_was_carried(tmp_path: Path, task: Quadratic) -> None:
    async def main() -> None:
        place = three(tmp_path, task, patience=1)
        loop = asyncio.get_running_loop()
        await place.market.open_rounds(6)
        await place.market.run_round(6)
        pace(place, SLOW_S)
        for hotkey in (A, C):
            loop.call_later(1.5, place.network.drop, hotkey)
            loop.call_later(13.0, place.network.restore, hotkey)
        await place.market.run_round(6)
        assert place.market.out_of_patience
        pace(place, 1.0)
        await play(place.market, 6)
        assert {hotkey: r.verdict for hotkey, r in receipts(place.store, 2).items()} == {B: "ACCEPTED"}
        assert place.store.head().round == 5
        prove(place)

    run(main())


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_a_validator_that_starts_again_still_takes_it(tmp_path: Path, task: Quadratic) -> None:
    """Its miner has gone on, and does nothing again."""

    async def main() -> None:
        before = three(tmp_path, task)
        await until_it_is_carried(before, 5)
        assert [Order.parse(s.body).hotkey for s in before.store.unsettled()] == [B]
        await before.market.close()
        before.store.close()
        place = three(tmp_path, task, network=lambda _: before.network)
        await place.market.replay(0)
        await play(place.market, 5)
        late = receipts(place.store, 2)[B]
        assert (late.verdict, size(late.done)) == ("ACCEPTED", 1)
        assert B not in orders(place.store, 2)
        assert sum("round 1: 4 micro-batches" in line for line in before.said) == 3
        prove(place)

    run(main())


@pytest.mark.parametrize(
    ("after", "overlap"),
    [
        (False, 0),
        (True, 1),
        pytest.param(True, 0, marks=pytest.mark.slow),
        pytest.param(False, 1, marks=pytest.mark.slow),
    ],
)
def test_death_at_every_durable_step_loses_nothing(tmp_path: Path, task: Quadratic, after: bool, overlap: int) -> None:
    slow, rounds = 1 + overlap, 5

    async def dies(folder: Path, at: int) -> int:
        store = RunStore.create(folder / "run", {"task": "quadratic"}, keep=2)
        dying = Dying(store, at, after)
        try:
            place = three(folder, task, store=dying, overlap=overlap)
            await with_a_late_one(place, rounds, slow)
        finally:
            store.close()
        return at - dying.left

    async def resumes(folder: Path) -> None:
        place = three(folder, task, overlap=overlap)
        await place.market.replay(0)
        await play(place.market, rounds)
        assert place.store.head().round == rounds - 1
        assert place.store.ledger.accounting().outstanding == 0
        prove(place)

    for at in range(1, run(dies(tmp_path / "calm", 1000)) + 1):
        folder = tmp_path / f"death{at}"
        with pytest.raises(KeyboardInterrupt):
            run(dies(folder, at))
        run(resumes(folder))


def test_a_resume_that_needs_the_round_for_gradients_gives_the_work_back(tmp_path: Path, task: Quadratic) -> None:
    """With more rounds the first tenth of them is longer."""

    async def first() -> None:
        place = three(tmp_path, task)
        await until_it_is_carried(place, 5)
        await place.market.close()
        place.store.close()

    async def second() -> None:
        place = three(tmp_path, task, diloco=replace(PLAN, warmup_rounds=4), batches=4)
        await place.market.replay(0)
        await play(place.market, 5)
        assert receipts(place.store, 2)[B].verdict == Fault.VALIDATOR_FAILED
        assert receipts(place.store, 3)[B].verdict == "ACCEPTED"
        prove(place)

    run(first())
    run(second())


def test_a_replay_finds_what_was_carried_into_its_first_round(tmp_path: Path, task: Quadratic) -> None:
    """The spool goes back to the second-newest snapshot, and to the orders that the round after it settled."""

    async def main() -> dict[str, torch.Tensor]:
        place = three(tmp_path, task)
        await place.market.open_rounds(6)
        for n in range(6):
            pace(place, SLOW_S if n == 1 else 1.0)
            if n in (2, 4):
                place.market.save_snapshot(place.store.save_snapshot)
            await place.market.run_round(6)
        await place.market.finish()
        assert [len(place.store.received(n)) for n in range(3)] == [0, 3, 2]
        prove(place)
        return parameters(place.market)

    async def again() -> dict[str, torch.Tensor]:
        (tmp_path / "run" / "snapshots" / "00000004.safetensors").unlink()
        place = three(tmp_path, task)
        snapshot = place.store.snapshots.newest(print)
        assert snapshot is not None
        assert snapshot.round == 2
        place.market.learner.load_state(snapshot.header, snapshot.tensors)
        await place.market.replay(snapshot.round)
        place.store.close()
        return parameters(place.market)

    assert equal(run(main()), run(again()))
