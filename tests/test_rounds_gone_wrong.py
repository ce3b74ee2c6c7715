"""What went wrong in rounds once: lost seals, claims without bound, newcomers under an overlap, work thrown away."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from pilot.common.limits import Limits
from pilot.market.notifications import MAX_PENDING, Notifier
from pilot.market.scheduling import FIRST_SHARE, MAX_RATIO, History, RoundPolicy
from pilot.market.verify import verify
from pilot.simulation.virtual_time import run
from pilot.training.ranges import size, within
from pilot.transport.auth import sign_message
from protocol import Fault, Order, ProtocolError, Range, Reply, Signed
from tasks.gpt2 import GPT2
from tests.test_volatile import A, B, accepted, batch_takes, receipt
from tests.tiny import MINERS, VALIDATOR, make_place, make_worker, play, receipts, tiny_task

TERMS = RoundPolicy("r", 4, 300.0, 1, "fp32", "fp32", round_s=60.0)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


def test_two_last_replies_of_a_round_are_both_durable(tmp_path: Path, task: GPT2) -> None:
    """The last one is being verified when a newcomer is admitted, whose reply is then the last."""

    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 1.0), round_s=60.0)

        async def slow_to_verify(phase: str, amount: float) -> None:
            await asyncio.sleep(5.0 if phase == "verify" else 0.0)

        place.market.executor._charge = slow_to_verify
        place.network.drop(B)

        async def preempted() -> None:
            await asyncio.sleep(10.5)
            assert await place.workers[A].leave(30.0)
            place.network.drop(A)

        going = asyncio.create_task(preempted())
        asyncio.get_running_loop().call_later(13.0, place.network.restore, B)
        await play(place.market, 1)
        await going
        assert {h: r.verdict for h, r in receipts(place.store, 0).items()} == {A: "ACCEPTED", B: "ACCEPTED"}
        assert {r.reply.hotkey for r in place.store.received(0)} == {A, B}
        place.store.close()

    async def again() -> None:
        place = make_place(tmp_path, task)
        await place.market.replay(0)
        assert place.market.round == 1

    run(main())
    run(again())


def test_a_newcomer_under_an_overlap_computes_like_the_others(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 1.0), round_s=60.0, deadline_s=200.0, overlap=1)
        place.network.drop(B)
        asyncio.get_running_loop().call_later(20.0, place.network.restore, B)
        await play(place.market, 6)
        got = {n: receipts(place.store, n)[B] for n in range(6) if B in receipts(place.store, n)}
        assert {r.verdict for r in got.values()} == {"ACCEPTED"}
        assert sum(size(r.done) for r in got.values()) > 200
        assert len(accepted(place.store)) == len(set(accepted(place.store)))

    run(main())


@pytest.mark.parametrize("miners_too", [False, True])
def test_a_restart_right_after_a_snapshot_blames_no_miner(tmp_path: Path, task: GPT2, miners_too: bool) -> None:
    """Under an overlap the orders that stand name a version whose state is not in the snapshot."""

    async def first() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 1.0), overlap=1)
        await place.market.open_rounds(6)
        for _ in range(2):
            await place.market.run_round(6)
        place.market.save_snapshot(place.store.save_snapshot)
        await place.market.finish()
        await place.market.close()
        place.store.close()

    async def second() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 1.0), overlap=1)
        snapshot = place.store.snapshots.newest(print)
        assert snapshot is not None
        place.market.learner.load_state(snapshot.header, snapshot.tensors)
        await place.market.replay(snapshot.round)
        await play(place.market, 5)
        assert Fault.MALFORMED not in {r.verdict for n in range(5) for r in receipts(place.store, n).values()}
        assert {r.verdict for r in receipts(place.store, 4).values()} == {"ACCEPTED"}

    run(first())
    if miners_too:
        shutil.rmtree(tmp_path / "miners")
    run(second())


def test_claims_without_bound_order_a_bounded_amount() -> None:
    history = History()
    assert history.shares([A], TERMS) == {A: FIRST_SHARE}
    for _ in range(40):
        wanted = history.shares([A, B], TERMS)
        history.observe([receipt(A, 60.0, (Range(0, wanted[A]),)), receipt(B, 60.0, (Range(0, 9),))])
        assert wanted[A] <= max(FIRST_SHARE, MAX_RATIO * (wanted[A] + wanted[B]) / 2)
    assert history.shares([A, B], TERMS)[A] <= 1 << 16
    assert history.shares([B], TERMS)[B] == 18


def test_who_is_not_known_begins_as_the_median() -> None:
    history = History()
    known = [k.ss58_address for k in MINERS[2:7]]
    history.observe([receipt(hotkey, 60.0, (Range(0, n),)) for n, hotkey in enumerate(known, 10)])
    assert history.shares([A], TERMS) == {A: 24}
    for _ in range(8):
        history.observe([])
    assert history.shares(known[:1], TERMS) == {known[0]: FIRST_SHARE}  # forgotten, as a restart forgets it


def test_a_payload_that_made_room_is_computed_again(tmp_path: Path, task: GPT2) -> None:
    """A validator that died before it had sealed the reply sends the order again after the next one."""

    async def main() -> None:
        place = make_place(tmp_path, task, miners=MINERS[:1])
        worker, states = place.workers[A], {**place.market.blobs, **place.market.learner.blobs}
        await place.market.open_rounds(1)
        [opened] = place.market.dispatcher.rounds
        await play(place.market, 1)
        await place.market.open_rounds(2)
        await asyncio.sleep(1.0)
        order, signed = opened.sent[A, 0].order, opened.sent[A, 0].signed
        assert worker.jobs[signed.digest].payload is None
        again = await place.network.exchange(order, signed, states, tmp_path / "p")
        assert again.reply.done == order.ranges
        await place.market.close()

    run(main())


def test_who_is_cut_off_leaves_no_file(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(
            tmp_path, task, miners=MINERS[:3], batch_s=(1.0,) * 3, auto=True, batches=4, deadline_s=600.0
        )
        await play(place.market, 2)
        slow = place.workers[MINERS[2].ss58_address]
        slow._executor._charge = batch_takes(60.0)
        path = place.store.payload_path(2, slow.hotkey)
        place.store.spool.reserve(path, 1000, Limits())
        path.write_bytes(b"x" * 1000)  # made ready for what will not come
        await play(place.market, 3)
        assert receipts(place.store, 2)[slow.hotkey].verdict == Fault.LATE
        assert not path.exists()

    run(main())


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_stop_takes_one_grace(tmp_path: Path, task: GPT2, overlap: int) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, batch_s=(1.0, 100.0), batches=50, deadline_s=600.0, overlap=overlap)
        loop = asyncio.get_running_loop()
        loop.call_later(5.0, place.market.request_stop)
        await play(place.market, 10)
        assert loop.time() <= 5.0 + 10.0 + 1.5
        assert receipts(place.store, 0)[B].verdict == Fault.LATE
        await place.market.close()

    run(main())


def test_work_in_too_many_pieces_is_not_taken(task: GPT2) -> None:
    """Every other index would stay in the cursor for ever."""
    order = Order.model_construct(run="r", round=0, hotkey=A, version="v", codec_up="fp32", ranges=(Range(0, 1000),))
    pieces = tuple(Range(i, i + 1) for i in range(0, 1000, 2))
    reply = Reply.model_construct(run="r", round=0, hotkey=A, version="v", codec="fp32", done=pieces)
    with pytest.raises(ProtocolError, match="did 500 separate ranges of 1 ordered") as refused:
        verify(order, reply, lambda: b"", codec=None, specs={}, buffers={}, count=task.count)  # type: ignore[arg-type]
    assert refused.value.fault is Fault.WRONG_DATA
    assert within(pieces, order.ranges)


def test_late_replies_that_are_waited_for_hold_up_no_receipt(tmp_path: Path, task: GPT2) -> None:
    told: list[Signed] = []

    class Waiting:
        """A network whose late replies never come."""

        def now(self) -> float:
            return 0.0

        async def await_late_reply(self, order: Order, signed: Signed, timeout_s: float) -> None:
            await asyncio.sleep(1e6)

        async def deliver(self, hotkey: str, signed: Signed) -> bool:
            told.append(signed)
            return True

    async def main() -> None:
        place = make_place(tmp_path, task)
        notifier = Notifier(Waiting(), place.store)  # type: ignore[arg-type]
        order, signed = place.market._order(0, A, (Range(0, 1),), 0.0, 0)
        for _ in range(3 * MAX_PENDING):
            notifier.expect_late_reply(order, signed, 0.0, 0.0)
            notifier.deliver(A, sign_message(VALIDATOR, order))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert len(told) == 3 * MAX_PENDING
        await notifier.close()

    run(main())


def test_a_pause_of_the_validator_is_no_time_that_sending_takes(tmp_path: Path, task: GPT2) -> None:
    """It fetched the payload an hour after the reply; the miner still works in the next round."""

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        place = make_place(tmp_path, task, miners=MINERS[:1], deadline_s=60.0)
        caller = VALIDATOR.ss58_address
        worker = place.workers[A] = make_worker(tmp_path / "m", MINERS[0], [], clock)
        place.network.restore(A, worker)
        await play(place.market, 1)
        name = next(iter(worker.jobs))
        worker.jobs[name].settled.clear()
        worker.upload_seconds.clear()
        worker.jobs[name].upload_started_at = 0.0
        await asyncio.sleep(3600.0)
        worker.read_payload(caller, name)
        worker.mark_delivered(caller, name)
        assert list(worker.upload_seconds) == [0.0]
        worker.upload_seconds.clear()
        worker.upload_seconds.append(1e6)  # and should it be so, one micro-batch is tried all the same
        await play(place.market, 2)
        assert receipts(place.store, 1)[A].verdict == "ACCEPTED"

    run(main())
