"""What one miner leaves undone goes to another: no miner keeps a range from ever being done, or ends the run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pilot.interfaces import Faulted
from pilot.market.scheduling import History
from pilot.simulation.virtual_time import run
from pilot.training.gradient import GradientAccumulator
from pilot.training.ranges import Cursor, indices, size, subtract
from pilot.worker.job import Job
from protocol import Fault, Hotkey, Order, Range
from tasks.gpt2 import GPT2
from tests.test_volatile import accepted, orders, receipt
from tests.tiny import MINERS, TERMS, Place, make_place, play, receipts, tiny_task

A, B, C = sorted(k.ss58_address for k in MINERS[:3])
Bad = Callable[[Order], bool]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


class Losing:
    """A network that loses the work of orders that are `bad`."""

    def __init__(self, network: Any, bad: Bad, fault: Fault) -> None:
        self._network, self._bad, self._fault = network, bad, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    async def exchange(self, order: Order, *rest: Any) -> Any:
        if self._bad(order):
            await asyncio.sleep(0.1)
            raise Faulted(self._fault, "lost")
        return await self._network.exchange(order, *rest)


def place_of(folder: Path, task: GPT2, bad: Bad, fault: Fault = Fault.SILENT, **policy: Any) -> Place:
    return make_place(folder, task, network=lambda network: Losing(network, bad, fault), **policy)  # type: ignore[arg-type]


def receipt_ranges(place: Place, round: int, hotkey: Hotkey) -> list[int]:
    return list(indices(receipts(place.store, round)[hotkey].done))


def from_miners(*hotkeys: Hotkey) -> Bad:
    return lambda order: order.hotkey in hotkeys


@pytest.mark.parametrize("silent", [(A,), (B,), (C,), (A, B), (A, C), (B, C)])
@pytest.mark.parametrize("fault", [Fault.SILENT, Fault.LEAVING])
def test_once_an_epoch_ends_though_some_miners_answer_nothing(
    tmp_path: Path, task: GPT2, silent: tuple[Hotkey, ...], fault: Fault
) -> None:
    class Short:
        """The task with an epoch of eleven micro-batches."""

        batches_per_epoch = 11

        def __getattr__(self, name: str) -> Any:
            return getattr(task, name)

    async def main() -> None:
        bad = from_miners(*silent)
        place = place_of(tmp_path, Short(), bad, fault, miners=MINERS[:3], once=True, batches=3)  # type: ignore[arg-type]
        await play(place.market, 12)
        assert set(range(11)) <= set(accepted(place.store))
        assert not place.market.out_of_patience
        assert len(accepted(place.store)) == len(set(accepted(place.store)))

    run(main())


@pytest.mark.parametrize("silent", [(A,), (B,), (A, B)])
@pytest.mark.parametrize("coverage", ["stream", "once"])
def test_lost_work_is_done_in_the_next_rounds(
    tmp_path: Path, task: GPT2, silent: tuple[Hotkey, ...], coverage: str
) -> None:
    async def main() -> None:
        place = place_of(tmp_path, task, from_miners(*silent), miners=MINERS[:3], batches=4, once=coverage == "once")
        await play(place.market, 10)
        done = accepted(place.store)
        missing = set(range(max(done))) - set(done)
        assert len(missing) <= 2 * len(silent)  # of the last round
        last = [size(orders(place.store, n)[silent[0]].ranges) for n in range(4)]
        assert last == [4, 2, 1, 1]

    run(main())


def test_an_index_that_one_miner_cannot_do_goes_to_the_other(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        poison = 3

        def bad(order: Order) -> bool:
            return order.hotkey == A and poison in indices(order.ranges)

        place = place_of(tmp_path, task, bad, batches=4, miners=MINERS[:3])
        await play(place.market, 3)
        assert poison in receipt_ranges(place, 1, B)

    run(main())


def test_what_a_miner_leaves_out_of_good_work_goes_to_another(tmp_path: Path, task: GPT2) -> None:
    """It is accepted in every round, so it comes first in every round."""

    async def main() -> None:
        def compute(job: Job, accumulator: GradientAccumulator) -> None:
            for index in job.indices:
                job.batches_left -= 1
                if index != 1:
                    accumulator.add(index)

        place = make_place(tmp_path, task, batches=4, miners=MINERS[:3])
        place.workers[A]._compute = compute  # type: ignore[method-assign]
        await play(place.market, 3)
        assert receipt_ranges(place, 0, A) == [0, 2, 3]
        assert receipt_ranges(place, 1, B)[0] == 1

    run(main())


def test_a_restart_gives_the_same_ranges_to_the_same_miners(tmp_path: Path, task: GPT2) -> None:
    def bad(order: Order) -> bool:
        return (order.hotkey == A and order.round != 2) or (order.hotkey == B and order.round == 1)

    async def play_to(folder: Path, *stops: int) -> list[dict[Hotkey, tuple[Range, ...]]]:
        for stop in stops:
            place = place_of(folder, task, bad, miners=MINERS[:3])
            await place.market.replay(0)
            await play(place.market, stop)
            found = [{h: o.ranges for h, o in orders(place.store, n).items()} for n in range(stop)]
            await place.market.close()
            place.store.close()
        return found

    assert run(play_to(tmp_path / "calm", 7)) == run(play_to(tmp_path / "restarted", 1, 2, 3, 5, 7))


def test_one_miner_alone_is_ordered_again_what_it_lost(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = place_of(tmp_path, task, lambda order: order.round < 2, miners=MINERS[:1])
        await play(place.market, 4)
        assert accepted(place.store) == [0, 1, 2, 3]

    run(main())


# --- the history and the cursor ---------------------------------------------------------------------------------------


def failed(hotkey: Hotkey, fault: Fault = Fault.LATE) -> Any:
    return receipt(hotkey, 1.0, (Range(0, 1),)).model_copy(update={"verdict": fault, "done": ()})


def shares(history: History, hotkeys: Collection[Hotkey], **policy: Any) -> dict[Hotkey, int]:
    return history.shares(hotkeys, replace(TERMS, batches=8, **policy))


def test_each_failure_in_a_row_halves_a_share_and_moves_the_miner_back() -> None:
    history = History()
    for failures in range(6):
        found = shares(history, [A, B])
        assert list(found.items()) == ([(B, 8), (A, max(1, 8 >> failures))] if failures else [(A, 8), (B, 8)])
        history.observe([failed(A), receipt(B, 1.0, (Range(0, 8),))])
    history.observe([receipt(A, 1.0, (Range(0, 1),))])
    assert list(shares(history, [A, B]).items()) == [(A, 8), (B, 8)]


def test_when_all_fail_alike_nobody_gets_less() -> None:
    history = History()
    history.observe([failed(A), failed(B)])
    assert shares(history, [A, B]) == {A: 8, B: 8}
    assert shares(history, [A]) == {A: 8}


def test_what_is_avoided_stays_and_nothing_is_lost() -> None:
    cursor = Cursor(20, (Range(2, 6), Range(10, 12)))
    taken, rest = cursor.take(5, None, [Range(3, 5)])
    assert taken == (Range(2, 3), Range(5, 6), Range(10, 12), Range(20, 21))
    assert rest == Cursor(21, (Range(3, 5),))
    assert cursor.take(5, 20, [Range(0, 20)]) == ((), cursor)
    assert cursor.take(3, 11, [Range(2, 5)]) == (
        (Range(5, 6), Range(10, 11)),
        Cursor(20, (Range(2, 5), Range(11, 12))),
    )


def test_work_in_pieces_takes_no_time_to_hand_out_again() -> None:
    """Each of 64 miners leaves every other micro-batch undone, for eight rounds."""
    history, miners = History(), [f"{n:03}" for n in range(64)]
    cursor = Cursor()
    for _ in range(8):
        given = []
        for hotkey in miners:
            ranges, cursor = cursor.take(128)
            made = receipt(A, 1.0, [Range(i, i + 1) for i in list(indices(ranges))[::2]])
            name = f"{hotkey}-{cursor.next}"
            given.append((made.model_copy(update={"hotkey": hotkey, "order": name}), ranges))
        history.observe(
            [r for r, _ in given],
            {r.order: Order.model_construct(ranges=ranges) for r, ranges in given},
        )
        cursor = cursor.give_back(left for r, ranges in given for left in subtract(ranges, r.done))
    began = time.perf_counter()
    undone = history.left_undone()
    for hotkey in miners:
        _, cursor = cursor.take(128, None, undone[hotkey])
    assert time.perf_counter() - began < 2.0
