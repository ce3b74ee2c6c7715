"""Ranges against plain sets: what is ordered, what comes back, and that nothing is lost or ordered twice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pilot.training.ranges import Cursor, indices, merge, size, subtract, within
from protocol import Range

SETTINGS = settings(derandomize=True, max_examples=100, deadline=None, database=None)

sets = st.sets(st.integers(0, 40))


def ranges_of(numbers: Iterable[int]) -> tuple[Range, ...]:
    """One range an index: as many, and as short, as they can be."""
    return tuple(Range(i, i + 1) for i in sorted(numbers))


@st.composite
def pieces(draw: st.DrawFn) -> tuple[Range, ...]:
    """Ascending and disjoint, some of them touching: what a Ranges field of a message may hold."""
    bounds = sorted(draw(st.lists(st.integers(0, 40), max_size=12)))
    return tuple(Range(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=False) if a < b)


def is_normal(ranges: tuple[Range, ...]) -> bool:
    """Ascending, none empty, none touching the next: the shortest list of them."""
    return all(r.start < r.stop for r in ranges) and all(a.stop < b.start for a, b in pairwise(ranges))


class Orders(RuleBasedStateMachine):
    """Orders go out and come back, in part or whole, with restarts in between."""

    def __init__(self) -> None:
        super().__init__()
        self.cursor = Cursor()
        self.out: list[set[int]] = []  # ordered, not yet answered
        self.done: set[int] = set()

    @rule(count=st.integers(0, 9))
    def order(self, count: int) -> None:
        waiting = sorted(i for r in self.cursor.returned for i in range(*r))
        ranges, self.cursor = self.cursor.take(count)
        taken = list(indices(ranges))
        assert len(taken) == size(ranges) == count
        assert is_normal(ranges)
        assert taken[: len(waiting)] == waiting[:count]  # what came back goes out first
        self.out.append(set(taken))

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        if not self.out:
            return
        ordered = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        done = {i for i in sorted(ordered) if data.draw(st.booleans())}
        self.cursor = self.cursor.give_back(subtract(merge(ranges_of(ordered)), ranges_of(done)))
        self.done |= done

    @rule()
    def restart(self) -> None:
        text = self.cursor.dumps()
        assert Cursor.loads(text) == self.cursor
        assert Cursor.loads(text).dumps() == json.dumps(json.loads(text))
        self.cursor = Cursor.loads(text)

    @invariant()
    def every_index_is_in_one_place(self) -> None:
        returned = [i for r in self.cursor.returned for i in range(*r)]
        everywhere = [*returned, *self.done, *(i for ordered in self.out for i in ordered)]
        assert sorted(everywhere) == list(range(self.cursor.next))
        assert is_normal(self.cursor.returned)


TestOrders = Orders.TestCase
TestOrders.settings = settings(SETTINGS, max_examples=60, stateful_step_count=20)


@SETTINGS
@given(pieces(), st.integers(40, 50), st.lists(st.integers(0, 9), max_size=5))
def test_several_takes_are_one(returned: tuple[Range, ...], next_: int, counts: list[int]) -> None:
    """A round's orders leave the cursor where one order of their sum would: how a restart finds it again."""
    cursor = start = Cursor(next_, merge(returned))
    taken: list[int] = []
    for count in counts:
        ranges, cursor = cursor.take(count)
        taken += indices(ranges)
    ranges, at_once = start.take(sum(counts))
    assert taken == list(indices(ranges))
    assert cursor == at_once


@SETTINGS
@given(sets)
def test_merge_is_the_set_in_its_shortest_form(numbers: set[int]) -> None:
    merged = merge(reversed(ranges_of(numbers)))
    assert list(indices(merged)) == sorted(numbers)
    assert is_normal(merged)
    assert merge(merged) == merged


@SETTINGS
@given(pieces(), st.data())
def test_subtract_is_the_sets_difference(ranges: tuple[Range, ...], data: st.DataObject) -> None:
    ordered = set(indices(ranges))
    done = {i for i in sorted(ordered) if data.draw(st.booleans())}
    for form in (ranges_of(done), merge(ranges_of(done))):  # a miner's list may be split or joined as it likes
        left = subtract(ranges, form)
        assert set(indices(left)) == ordered - done
        assert is_normal(left)


@SETTINGS
@given(pieces(), pieces())
def test_within_is_the_subset(done: tuple[Range, ...], ordered: tuple[Range, ...]) -> None:
    assert within(done, ordered) == (set(indices(done)) <= set(indices(ordered)))
    assert within(ordered, ordered)


@SETTINGS
@given(pieces())
def test_size_counts_the_indices(ranges: tuple[Range, ...]) -> None:
    assert size(ranges) == len(list(indices(ranges))) == len(set(indices(ranges)))


def test_taking_nothing_changes_nothing() -> None:
    cursor = Cursor(7, (Range(1, 3),))
    assert cursor.take(0) == ((), cursor)
    assert cursor.give_back(()) == cursor
