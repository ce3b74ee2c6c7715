"""Rounds on volatile machines, under virtual time: budgets, early closing, newcomers, overlap, epochs, stops."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from pilot.interfaces import Refused
from pilot.market.scheduling import History, RoundPolicy
from pilot.simulation.virtual_time import run
from pilot.storage.run_store import RunStore
from pilot.training.ranges import Cursor, indices, size
from protocol import Digest, Fault, Hotkey, Order, Range, Receipt, Reply, Stop
from tasks.gpt2 import GPT2
from tests.test_round import Dying
from tests.tiny import (
    MINERS,
    VALIDATOR,
    Place,
    batch_takes,
    equal,
    make_place,
    make_worker,
    parameters,
    play,
    receipts,
    tiny_task,
)

A, B, C = (k.ss58_address for k in MINERS[:3])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


def orders(store: RunStore, round: int) -> dict[Hotkey, Order]:
    return {order.hotkey: order for order in (Order.parse(s.body) for s in store.orders(round))}


def accepted(store: RunStore) -> list[int]:
    """Every index that is in the model, in the order of the rounds."""
    done = [r for record in store.committed(0) for s in record.receipts for r in Receipt.parse(s.body).done]
    return list(indices(done))


def metrics(store: RunStore) -> list[dict[str, object]]:
    return [dict(record.metrics) for record in store.committed(0)]


# --- time budgets -----------------------------------------------------------------------------------------------------


def test_in_the_same_time_each_miner_does_what_it_can(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 3.0), round_s=30.0)
        await play(place.market, 3)
        for n in range(3):
            got = receipts(place.store, n)
            assert (size(got[A].done), size(got[B].done)) in {(29, 9), (30, 10)}
            assert all(r.verdict == "ACCEPTED" and r.seconds <= 30.0 for r in got.values())
            assert metrics(place.store)[n]["seconds"] == pytest.approx(30.0, abs=1.5)
        weights = place.store.head().weights
        assert weights[A] / weights[B] == pytest.approx(3.0, rel=0.1)  # by work, and nothing else
        assert len(accepted(place.store)) == len(set(accepted(place.store)))

    run(main())


def test_what_a_budget_left_undone_is_ordered_next(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 3.0), round_s=30.0)
        await play(place.market, 4)
        done = set(accepted(place.store))
        cursor = Cursor.loads(place.store.head().cursor)
        assert done | set(indices(cursor.returned)) == set(range(cursor.next))  # done or to be done, and nothing else
        first, second = orders(place.store, 0), orders(place.store, 1)
        assert min(o.ranges[0].start for o in second.values()) == receipts(place.store, 0)[min(first)].done[-1].stop
        assert size(second[A].ranges) == 2 * size(receipts(place.store, 0)[A].done)  # twice what it did

    run(main())


def test_time_to_send_is_kept_free_once_it_is_known(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, miners=MINERS[:1], batch_s=(1.0,), round_s=30.0, bits_per_s=160_000.0)
        await play(place.market, 3)
        took = [receipts(place.store, n)[A].seconds for n in range(3)]
        assert took[0] > 32.0  # nobody knew how long the payload would take
        assert took[2] == pytest.approx(30.0, abs=1.5)

    run(main())


def test_a_budget_shorter_than_a_micro_batch_gives_one_and_says_so(
    tmp_path: Path, task: GPT2, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 12.0), round_s=5.0)
        await play(place.market, 2)
        slow = receipts(place.store, 1)[B]
        assert (slow.verdict, size(slow.done)) == ("ACCEPTED", 1)
        assert slow.reason.endswith("in 1 micro-batches; one takes 12.0 s, --round-seconds gives 5")

    run(main())
    assert [r.getMessage() for r in caplog.records if "--round-seconds" in r.getMessage()] == [
        f"round 0: {B}: {task.count(0)} tokens in 1 micro-batches; one takes 12.0 s, --round-seconds gives 5; raise it"
    ]


def test_who_comes_in_the_middle_gets_what_is_left(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 1.0), round_s=60.0)
        place.network.drop(B)
        loop = asyncio.get_running_loop()
        loop.call_later(20.0, place.network.restore, B)
        await play(place.market, 1)
        late = orders(place.store, 0)[B]
        assert late.budget_s == pytest.approx(40.0, abs=0.1)
        assert size(receipts(place.store, 0)[B].done) in (39, 40)
        assert metrics(place.store)[0]["seconds"] == pytest.approx(60.0, abs=1.5)
        assert len(accepted(place.store)) == len(set(accepted(place.store)))

    run(main())


def test_who_comes_at_the_end_waits_for_the_next_round(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 1.0), round_s=60.0)
        place.network.drop(B)
        asyncio.get_running_loop().call_later(50.0, place.network.restore, B)
        await play(place.market, 2)
        assert B not in orders(place.store, 0)
        assert orders(place.store, 1)[B].budget_s == 60.0

    run(main())


# --- early closing ----------------------------------------------------------------------------------------------------

SLOW = {"auto": True, "quorum": 0.5, "deadline_k": 4.0, "grace_s": 10.0, "batches": 4, "deadline_s": 600.0}


def test_a_round_closes_when_most_have_answered_and_uses_what_the_rest_has(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, miners=MINERS[:4], batch_s=(1.0, 1.0, 1.0, 1.0), **SLOW)
        await play(place.market, 2)
        place.workers[C]._executor._charge = batch_takes(5.0)
        await play(place.market, 3)
        slow = receipts(place.store, 2)[C]
        assert slow.verdict == "ACCEPTED"
        assert 0 < size(slow.done) < 4  # stopped after its micro-batch, and what it had done counts
        assert metrics(place.store)[2]["seconds"] < 4 * 5.0
        assert Cursor.loads(place.store.head().cursor).returned  # the rest comes back

    run(main())


def test_who_does_not_stop_in_time_is_late_and_its_work_is_noted(tmp_path: Path, task: GPT2) -> None:
    """Its micro-batch takes longer than the grace: the round goes on, and the reply that comes afterwards is kept."""

    async def main() -> None:
        place = make_place(tmp_path, task, miners=MINERS[:4], batch_s=(1.0, 1.0, 1.0, 1.0), **SLOW)
        await play(place.market, 2)
        place.workers[C]._executor._charge = batch_takes(40.0)
        await play(place.market, 4)
        first = receipts(place.store, 2)[C]
        assert (first.verdict, first.done, first.work) == (Fault.LATE, (), 0)
        await asyncio.sleep(200.0)
        [noted] = [late for late in place.store.ledger.late() if late.round == 2]
        reply, receipt = Reply.parse(noted.reply.body), Receipt.parse(noted.receipt.body)
        assert (reply.hotkey, size(reply.done)) == (C, 1)
        assert receipt.verdict == Fault.LATE
        assert "1 micro-batches came" in receipt.reason
        assert not set(indices(reply.done)) & set(
            indices(r for n in range(3) for r in receipts(place.store, n)[C].done)
        )
        kept = (tmp_path / "miners" / C / "receipts.jsonl").read_text()
        assert receipt.reason in kept  # the miner has been told

    run(main())


def test_history_is_the_median_and_its_deviation() -> None:
    policy = RoundPolicy("r", 1, 300.0, 1, "fp32", "fp32", auto=True, deadline_k=3.0)
    history = History()
    assert history.closing_s(policy) == float("inf")
    history.observe([receipt(A, 10.0), receipt(B, 12.0), receipt(C, 20.0)])
    assert history.closing_s(policy) == 12.0 + 3.0 * 2.0
    same = History()
    same.observe([receipt(A, 10.0), receipt(B, 10.0)])
    assert same.closing_s(policy) == 10.0 + 3.0 * 1.0  # never less than a tenth of the median


def receipt(hotkey: Hotkey, seconds: float, done: Sequence[Range] = (Range(0, 1),)) -> Receipt:
    return Receipt(
        run="r", round=0, hotkey=hotkey, order="0" * 64, verdict="ACCEPTED", reason="", done=tuple(done), work=1,
        scores={}, weight=0.0, seconds=seconds,
    )  # fmt: skip


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_stopped_validator_closes_the_round_with_what_is_there(tmp_path: Path, task: GPT2, overlap: int) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 3.0), batches=50, deadline_s=600.0, overlap=overlap)
        asyncio.get_running_loop().call_later(10.5, place.market.request_stop)
        await play(place.market, 100)
        assert not place.market.in_flight
        assert place.store.head().round == overlap
        got = receipts(place.store, 0)
        assert {hotkey: size(r.done) for hotkey, r in got.items()} == {A: 11, B: 4}
        assert all(worker.job and worker.job.finished.is_set() for worker in place.workers.values())
        assert place.network.now() < 15.0

    run(main())


def test_a_leaving_miner_hands_over_what_it_did_and_takes_nothing_more(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 1.0), batches=20, deadline_s=600.0)
        loop = asyncio.get_running_loop()
        left: list[bool] = []

        async def leave() -> None:
            await asyncio.sleep(7.5)
            left.append(await place.workers[B].leave(10.0))
            left.append(loop.time() < 10.0)
            place.network.drop(B)

        going = loop.create_task(leave())
        await play(place.market, 2)
        await going
        assert left == [True, True]
        first = receipts(place.store, 0)
        assert (first[B].verdict, size(first[B].done)) == ("ACCEPTED", 8)
        second = receipts(place.store, 1)
        assert B not in second or second[B].verdict == Fault.SILENT
        assert size(first[A].done) == 20

    run(main())


def test_a_leaving_miner_refuses_and_one_without_work_leaves_at_once(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 1.0))
        worker = place.workers[A]
        assert await worker.leave(10.0)
        assert worker.status().state == "leaving"
        await play(place.market, 1)
        refused = receipts(place.store, 0)[A]
        assert refused.verdict == Fault.LEAVING
        assert "this miner is shutting down" in refused.reason

    run(main())


def test_a_stop_that_overtakes_its_order_stops_it(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 1.0))
        caller, worker = VALIDATOR.ss58_address, place.workers[A]
        order, signed = place.market._order(0, A, (Range(0, 100),), 0.0, 0)
        stop = Stop(run=order.run, round=0, hotkey=A, order=signed.digest)
        for _ in range(2):
            worker.stop_order(caller, stop)
        with pytest.raises(Refused, match="stopped before it came") as refused:
            worker.accept_order(caller, order, signed.digest)
        assert refused.value.fault is Fault.LATE
        assert worker.job is None

    run(main())


def test_an_order_that_nobody_ever_stops_ends_by_itself(tmp_path: Path, task: GPT2) -> None:
    """Its validator takes the order's reply to nowhere: at the deadline the work is over all the same."""

    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 1.0), batches=10**6, deadline_s=100.0)
        await place.market.open_rounds(1)
        await asyncio.sleep(1.0)
        await place.market.close()
        await asyncio.sleep(100.0)
        assert all(w.job and w.job.finished.is_set() and w.job.batches_done < 100 for w in place.workers.values())

    run(main())


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_with_overlap_miners_compute_all_the_time(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(
            tmp_path, task, batch_s=(1.0, 1.0), round_s=60.0, deadline_s=200.0, overlap=1, bits_per_s=400_000.0
        )
        await play(place.market, 5)
        assert [o.staleness for n in range(5) for o in orders(place.store, n).values()] == [0, 0] + [1, 1] * 4
        rows = metrics(place.store)
        assert min(float(str(row["utilisation"])) for row in rows[2:]) > 0.97
        assert len(accepted(place.store)) == len(set(accepted(place.store)))
        versions = [place.store.committed(n)[0].version for n in range(5)]
        for n in range(2, 5):  # each order names the version before the last
            assert {o.version for o in orders(place.store, n).values()} == {versions[n - 2]}

    run(main())


def test_overlap_applies_stale_gradients_unscaled(tmp_path: Path, task: GPT2) -> None:
    """By hand: round 0 and 1 are computed on the first version, applied one after the other."""

    async def main() -> None:
        place = make_place(tmp_path / "market", task, miners=MINERS[:1], batch_s=(1.0,), overlap=1)
        await play(place.market, 2)
        other = make_place(tmp_path / "hand", task, miners=MINERS[:1]).market
        from pilot.training.gradient import compute

        gradients = []
        for n in range(2):
            work = compute(task, other.learner.model, receipts(place.store, n)[A].done)
            assert work is not None
            gradients.append({name: g.clone() for name, g in work.gradient.items()})
        for n, gradient in enumerate(gradients):
            other.learner.step(gradient, other.settings(n, 0))
        assert equal(parameters(place.market), parameters(other))

    run(main())


@pytest.mark.parametrize("after", [False, True])
def test_death_with_two_rounds_in_flight_changes_nothing(tmp_path: Path, task: GPT2, after: bool) -> None:
    rounds, options = 3, {"overlap": 1}

    async def calm() -> tuple[str, object, int]:
        never = Dying(RunStore.create(tmp_path / "calm" / "run", {"task": "gpt2"}, keep=2), 1000, after)
        place = make_place(tmp_path / "calm", task, store=never, **options)  # type: ignore[arg-type]
        await play(place.market, rounds)
        return place.market.learner.version, parameters(place.market), 1000 - never.left

    version, expected, steps = run(calm())
    assert steps >= rounds * 3  # an opening, one seal or two, and a commit a round

    async def dies(store: RunStore, at: int) -> None:
        place = make_place(store.folder.parent, task, store=Dying(store, at, after), **options)  # type: ignore[arg-type]
        await play(place.market, rounds)

    async def resumes(folder: Path) -> None:
        place = make_place(folder, task, **options)
        await place.market.replay(0)
        await play(place.market, rounds)
        assert place.market.learner.version == version
        assert equal(parameters(place.market), expected)  # type: ignore[arg-type]
        assert sorted(accepted(place.store)) == list(range(rounds * 2 * 2))
        place.store.close()

    for at in range(1, steps + 1):
        folder = tmp_path / f"death{at}"
        store = RunStore.create(folder / "run", {"task": "gpt2"}, keep=2)
        with pytest.raises(KeyboardInterrupt):
            run(dies(store, at))
        store.close()
        run(resumes(folder))


# --- epochs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 1])
def test_coverage_once_orders_nothing_of_the_next_epoch_before_this_one_is_accepted(
    tmp_path: Path, task: GPT2, overlap: int
) -> None:
    """With a miner that goes away in every other round."""
    epoch = task.batches_per_epoch

    async def main() -> None:
        place = make_place(
            tmp_path, task, miners=MINERS[:3], batch_s=(1.0, 1.0, 1.0), batches=epoch // 8, once=True, overlap=overlap
        )
        loop = asyncio.get_running_loop()
        for k in range(1, 40):
            loop.call_later(17.0 * k, place.network.drop, B)
            loop.call_later(17.0 * k + 9.0, place.network.restore, B)
        await play(place.market, 14)
        done: set[int] = set()
        for n in range(14):
            ordered = set(indices(r for o in orders(place.store, n).values() for r in o.ranges))
            for index in ordered:
                whole = set(range(index // epoch * epoch))  # every epoch before its own
                assert whole <= done, f"round {n} orders {index}"
            done |= set(indices(r for got in receipts(place.store, n).values() for r in got.done))
        assert max(done) > epoch  # it did go on

    run(main())


def test_who_is_behind_at_an_epochs_end_gets_a_fair_part(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batches=task.batches_per_epoch, once=True)
        await play(place.market, 1)
        shares = [size(o.ranges) for o in orders(place.store, 0).values()]
        assert sum(shares) == task.batches_per_epoch
        assert max(shares) - min(shares) <= 1

    run(main())


def test_coverage_is_in_the_metrics(tmp_path: Path, task: GPT2) -> None:
    async def main() -> Place:
        place = make_place(tmp_path, task)
        await play(place.market, 2)
        return place

    row = metrics(run(main()).store)[1]
    assert (row["epoch"], row["epoch_done"], row["epoch_total"]) == (0, 8, task.batches_per_epoch)


def test_a_miner_without_contact_is_remembered_by_its_digest_alone(tmp_path: Path) -> None:
    """What strangers' orders may leave behind is bounded."""

    async def main() -> None:
        worker = make_worker(tmp_path, MINERS[0], [], asyncio.get_running_loop().time)
        for n in range(1000):
            name: Digest = f"{n:064x}"
            worker.stop_order("validator", Stop(run="r", round=0, hotkey=A, order=name))
        assert len(worker.stopped) <= 64

    run(main())
