"""An epoch's progress, against sets of indices."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot.market.scheduling import EpochProgress, epoch_progress
from pilot.training.ranges import Cursor, indices, merge
from protocol import Range


def naive(cursor: Cursor, outstanding: list[Range], batches_per_epoch: int, shards: int) -> EpochProgress:
    """Index by index."""
    undone = {*indices(cursor.returned), *indices(outstanding)}
    top = max([cursor.next, *(r.stop for r in outstanding)]) + batches_per_epoch
    done = [index < cursor.next and index not in undone for index in range(top)]
    epoch = done.index(False) // batches_per_epoch
    ours = done[epoch * batches_per_epoch :][:batches_per_epoch]
    shards = min(shards, batches_per_epoch)
    slices: list[list[bool]] = [[] for _ in range(shards)]
    for index, is_done in enumerate(ours):
        slices[next(k for k in range(shards) if index < batches_per_epoch * (k + 1) // shards)].append(is_done)
    return EpochProgress(epoch, sum(ours), batches_per_epoch, tuple((sum(part), len(part)) for part in slices))


@given(
    st.integers(0, 2**32), st.integers(0, 90), st.integers(1, 40), st.integers(1, 20), st.integers(0, 9), st.booleans()
)
def test_it_is_what_sets_say(seed: int, top: int, per_epoch: int, shards: int, extra: int, ahead: bool) -> None:
    """Indices are done, back, or in open orders: taken from the cursor already, or by its successor (`ahead`)."""
    rng = random.Random(seed)
    what = [rng.choice(["done", "done", "returned", "outstanding"]) for _ in range(top)]
    pick = {kind: [Range(i, i + 1) for i in range(top) if what[i] == kind] for kind in what}
    outstanding = pick.get("outstanding", [])
    if ahead and extra:
        outstanding = [*outstanding, Range(top, top + extra)]
    rng.shuffle(outstanding)
    cursor = Cursor(top, merge(pick.get("returned", [])))
    assert epoch_progress(cursor, outstanding, per_epoch, shards) == naive(cursor, outstanding, per_epoch, shards)


def test_before_the_first_order_nothing_is_done() -> None:
    assert epoch_progress(Cursor(), [], 5, 2) == EpochProgress(0, 0, 5, ((0, 2), (0, 3)))


def test_a_complete_epoch_is_followed_by_the_next() -> None:
    assert epoch_progress(Cursor(10), [], 10).epoch == 1
    assert epoch_progress(Cursor(10), [Range(9, 10)], 10) == EpochProgress(0, 9, 10, (*[(1, 1)] * 9, (0, 1)))
    assert epoch_progress(Cursor(25, (Range(3, 4),)), [], 10, 1) == EpochProgress(0, 9, 10, ((9, 10),))


def test_before_and_after_the_orders_are_taken_it_says_the_same() -> None:
    before = Cursor(7, (Range(1, 3),))
    ranges, after = before.take(4)
    assert epoch_progress(before, ranges, 20) == epoch_progress(after, ranges, 20)


def test_a_row_of_metrics() -> None:
    assert epoch_progress(Cursor(12, (Range(0, 1),)), [], 8, 2).metrics() == {
        "epoch": 0,
        "epoch_done": 7,
        "epoch_total": 8,
        "shards": "3/4 4/4",
    }


@pytest.mark.parametrize("count", [0, 1, 4096])
def test_an_epoch_of_any_size_costs_by_its_ranges(count: int) -> None:
    """Sets of 2^50 indices could not be made."""
    back = tuple(Range(2 * i, 2 * i + 1) for i in range(count))
    found = epoch_progress(Cursor(2**50, back), [], 2**50)
    assert (found.epoch, found.done) == ((0, 2**50 - count) if count else (1, 0))
