"""The whole round over the loopback network: real workers, real files, virtual time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pilot.simulation.virtual_time import run
from pilot.storage.run_store import RunStore
from pilot.training.ranges import Cursor
from protocol import Fault, Range, Signed
from tasks.gpt2 import GPT2
from tests.tiny import MINERS, equal, make_place, parameters, play, receipts, tiny_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


def test_round_is_deterministic(tmp_path: Path, task: GPT2) -> None:
    async def once(folder: Path) -> tuple[object, ...]:
        place = make_place(folder, task, aggregation="median_norm_mean")
        await play(place.market, 3)
        head = place.store.head()
        assert head is not None
        return head.version, head.cursor, dict(head.weights), head.metrics["loss"], parameters(place.market)

    *first, p = run(once(tmp_path / "a"))
    *second, q = run(once(tmp_path / "b"))
    assert first == second
    assert equal(p, q)


def test_model_learns_and_weights_share_the_work(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task)
        before = await place.market.evaluate()
        await play(place.market, 20)
        after = await place.market.evaluate()
        assert after["val_loss"] < before["val_loss"] - 0.5
        weights = place.store.head().weights
        assert weights == {k.ss58_address: pytest.approx(0.5) for k in MINERS[:2]}
        assert Cursor.loads(place.store.head().cursor) == Cursor(next=20 * 2 * 2)

    run(main())


def test_ranges_are_disjoint_and_complete(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, miners=MINERS[:3])
        await play(place.market, 4)
        done = sorted(r for n in range(4) for receipt in receipts(place.store, n).values() for r in receipt.done)
        assert [i for r in done for i in range(*r)] == list(range(4 * 3 * 2))

    run(main())


def test_miner_away_costs_its_part_and_its_ranges_come_back(tmp_path: Path, task: GPT2) -> None:
    """Gone after taking its order: SILENT; the others' work counts; its ranges are ordered again, first."""

    async def main() -> None:
        place = make_place(tmp_path, task)
        gone, there = sorted(k.ss58_address for k in MINERS[:2])
        await place.market.open_rounds(3)
        place.network.drop(gone)
        await place.market.run_round(3)
        first = receipts(place.store, 0)
        assert first[gone].verdict == Fault.SILENT
        assert first[gone].done == ()
        assert first[there].verdict == "ACCEPTED"
        [opened] = place.market.dispatcher.rounds
        assert opened.sent[there, 1].order.ranges == (Range(0, 2),)  # what the other one did not do
        assert (gone, 1) not in opened.sent
        place.network.restore(gone)
        await play(place.market, 3)
        assert receipts(place.store, 2)[gone].verdict == "ACCEPTED"

    run(main())


def test_round_without_a_good_reply_leaves_the_model_and_patience_ends(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task, patience=2)
        version, before = place.market.learner.version, parameters(place.market)
        for k in MINERS[:2]:
            place.network.drop(k.ss58_address)
        await play(place.market, 20)
        assert place.market.out_of_patience
        assert place.store.head().round == 1  # two empty rounds, then no more
        assert place.store.head().version == version
        assert equal(parameters(place.market), before)
        assert Cursor.loads(place.store.head().cursor).take(1)[0] == (Range(0, 1),)  # nothing is skipped

    run(main())


def test_slow_miner_is_late_or_partial_by_the_deadline(tmp_path: Path, task: GPT2) -> None:
    """A miner that has no time for its batches returns those that it did; their number weighs, the rest comes back."""

    async def main() -> None:
        place = make_place(tmp_path, task, batches=4, deadline_s=30.0)
        slow = MINERS[0].ss58_address
        worker = place.workers[slow]
        clock = worker.clock
        worker.clock = lambda: clock() + 10.0 * sum(job.batches_done for job in worker.jobs.values())
        await play(place.market, 1)
        receipt = receipts(place.store, 0)[slow]
        assert receipt.verdict == "ACCEPTED"
        assert receipt.work == 2 * task.count(0)  # ten seconds each: a third one would end after the deadline
        [done] = receipt.done
        [left] = Cursor.loads(place.store.head().cursor).returned
        assert done.stop == left.start
        weights = place.store.head().weights
        assert weights[slow] < weights[MINERS[1].ss58_address]

    run(main())


class Dying:
    """A store whose process dies at the n-th thing it is asked to make durable: just before, or just after."""

    def __init__(self, store: RunStore, at: int, after: bool) -> None:
        self.store, self.left, self.after = store, at, after

    def __getattr__(self, name: str) -> object:
        method = getattr(self.store, name)
        if name not in ("open_round", "make_durable", "commit"):
            return method

        def durable(*arguments: object) -> object:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise KeyboardInterrupt
            result = method(*arguments)
            if self.left <= 0:
                raise KeyboardInterrupt
            return result

        return durable


@pytest.mark.parametrize("after", [False, True])
def test_death_at_every_durable_step_changes_nothing(tmp_path: Path, task: GPT2, after: bool) -> None:
    """However a round is cut off, the restart ends with the version of an undisturbed run, and pays nothing twice."""
    rounds = 3

    async def undisturbed() -> tuple[str, dict[str, torch.Tensor], int]:
        folder = tmp_path / "calm"
        never = Dying(RunStore.create(folder / "run", {"task": "gpt2"}, keep=2), 1000, after)
        place = make_place(folder, task, store=never)
        await play(place.market, rounds)
        return place.market.learner.version, parameters(place.market), 1000 - never.left

    version, expected, steps = run(undisturbed())

    async def dies(store: RunStore, at: int) -> None:
        place = make_place(store.folder.parent, task, store=Dying(store, at, after))
        await play(place.market, rounds)

    async def resumes(folder: Path) -> None:
        place = make_place(folder, task)
        await place.market.replay(0)
        await play(place.market, rounds)
        assert place.market.learner.version == version
        assert equal(parameters(place.market), expected)
        paid = [r for n in range(rounds) for receipt in receipts(place.store, n).values() for r in receipt.done]
        assert sorted(i for r in paid for i in range(*r)) == list(range(rounds * 2 * 2))
        place.store.close()

    assert steps >= rounds * 3  # an opening, one seal or two, and a commit a round
    for at in range(1, steps + 1):
        folder = tmp_path / f"death{at}"
        store = RunStore.create(folder / "run", {"task": "gpt2"}, keep=2)
        with pytest.raises(KeyboardInterrupt):
            run(dies(store, at))
        store.close()  # as the end of its process would
        run(resumes(folder))


def test_orders_of_the_open_round_are_sent_again_unchanged(tmp_path: Path, task: GPT2) -> None:
    async def first() -> tuple[Signed, ...]:
        place = make_place(tmp_path, task)
        await place.market.open_rounds(1)
        [opened] = place.market.dispatcher.rounds
        await place.market.close()
        place.store.close()
        return tuple(sent.signed for sent in opened.sent.values())

    async def second() -> tuple[Signed, ...]:
        place = make_place(tmp_path, task, miners=MINERS[:3])  # one more miner is there by now
        await place.market.open_rounds(1)
        [opened] = place.market.dispatcher.rounds
        await play(place.market, 1)
        return tuple(sent.signed for sent in opened.sent.values())

    assert run(first()) == run(second())
