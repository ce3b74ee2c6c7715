"""Who is paid for what: properties of the ranker's scores, and the seam for a user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot.ranking import RANKERS, Evidence, Ranker, load_ranker
from pilot.ranking.accepted_work import AcceptedWork
from protocol import Fault

SETTINGS = settings(derandomize=True, max_examples=100, deadline=None, database=None)
MINERS = ("5A", "5B", "5C")

# A round is what each miner that got an order did of it: work out of 100, or a fault.
outcomes = st.integers(1, 100) | st.sampled_from(Fault)
histories = st.lists(st.dictionaries(st.sampled_from(MINERS), outcomes, max_size=3), max_size=12)


def evidence(**done: int | Fault) -> list[Evidence]:
    return [
        Evidence(m, d, 0, 100) if isinstance(d, Fault) else Evidence(m, None, d, 100) for m, d in sorted(done.items())
    ]


def naive_weights(history: Sequence[Mapping[str, int | Fault]], half_life: float) -> dict[str, float]:
    """sum over rounds of work x 2^(-age / half_life), as shares."""
    earned = dict.fromkeys((m for done in history for m in done), 0.0)
    for age, done in enumerate(reversed(history)):
        for miner, d in done.items():
            earned[miner] += 0.0 if isinstance(d, Fault) else d * 2 ** (-age / half_life)
    total = sum(earned.values())
    return {m: e / total for m, e in earned.items()} if total else {}


@SETTINGS
@given(histories, st.sampled_from([1.0, 7.5, 100.0]))
def test_weights_are_shares_of_decayed_work(history: list[dict[str, int | Fault]], half_life: float) -> None:
    ranker = AcceptedWork(half_life)
    for done in history:
        ranker.update(evidence(**done))
    weights = ranker.weights()
    assert weights == pytest.approx(naive_weights(history, half_life), rel=1e-9)
    assert not weights or sum(weights.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(w >= 0 for w in weights.values())


@SETTINGS
@given(histories, histories)
def test_state_through_json_continues_identically(
    before: list[dict[str, int | Fault]], after: list[dict[str, int | Fault]]
) -> None:
    ranker, restored = load_ranker("accepted_work"), load_ranker("accepted_work")
    for done in before:
        ranker.update(evidence(**done))
    restored.load_state_dict(json.loads(json.dumps(ranker.state_dict())))
    for done in after:
        assert restored.update(evidence(**done)) == ranker.update(evidence(**done))
    assert restored.weights() == ranker.weights()
    assert restored.state_dict() == ranker.state_dict()


def test_state_replaces_what_was_there() -> None:
    ranker = AcceptedWork()
    ranker.update(evidence(**{"5A": 50}))
    ranker.load_state_dict({"work": {"5B": 1.0}})
    assert ranker.weights() == {"5B": 1.0}


@pytest.mark.parametrize("fault", Fault)
def test_fault_earns_nothing(fault: Fault) -> None:
    ranker = AcceptedWork()
    assert ranker.weights() == {}  # nobody has earned anything
    ranker.update(evidence(**{"5A": fault}))
    assert ranker.weights() == {}
    scores = ranker.update(evidence(**{"5A": fault, "5B": 10}))
    assert ranker.weights() == {"5A": 0.0, "5B": 1.0}
    assert set(scores["5A"].values()) == {0.0}


def test_absence_fades_by_the_half_life() -> None:
    ranker = AcceptedWork(half_life=4)
    ranker.update(evidence(**{"5A": 80}))
    for _ in range(4):
        ranker.update([])
    scores = ranker.update(evidence(**{"5B": 40}))
    assert ranker.weights()["5A"] == pytest.approx(80 * 2**-1.25 / (80 * 2**-1.25 + 40))
    assert scores.keys() == {"5B"}


def test_scores_say_what_the_receipt_needs() -> None:
    ranker = AcceptedWork(half_life=1)
    ranker.update(evidence(**{"5A": 20}))
    assert ranker.update(evidence(**{"5A": 30, "5B": 90})) == {
        "5A": {"accepted_work": 40.0, "share_of_round": 0.25, "share_of_order": 0.3},
        "5B": {"accepted_work": 90.0, "share_of_round": 0.75, "share_of_order": 0.9},
    }


# --- the seam ---------------------------------------------------------------------------------------------------------


class Equal:
    """A user's own: everybody who was ever there gets the same."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def update(self, evidence: Sequence[Evidence]) -> Mapping[str, Mapping[str, float]]:
        self.seen = sorted({*self.seen, *(e.hotkey for e in evidence)})
        return {e.hotkey: {} for e in evidence}

    def weights(self) -> Mapping[str, float]:
        return dict.fromkeys(self.seen, 1 / len(self.seen)) if self.seen else {}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = list(state["seen"])


class Greedy(Equal):
    def __init__(self, share: float) -> None:
        super().__init__()


def test_users_own_ranker_loads_by_its_path() -> None:
    ranker = load_ranker(f"{__name__}:Equal")
    ranker.update(evidence(**{"5A": 1, "5B": Fault.LATE}))
    assert ranker.weights() == {"5A": 0.5, "5B": 0.5}


@pytest.mark.parametrize("name", RANKERS)
def test_every_ranker_of_ours_loads(name: str) -> None:
    assert isinstance(load_ranker(name), Ranker)
    assert load_ranker(name).weights() == {}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nope",
        ":Equal",
        "ranking:",
        ":",
        "no.such.package:Class",
        "ranking:NoSuchClass",
        "..ranking:Ranker",
        "os:sep",  # no class
        "json:JSONDecoder",  # no ranker
        f"{__name__}:Greedy",  # asks for arguments
        f"{__name__}:Equal.seen",
    ],
)
def test_bad_name_is_one_line_that_names_the_flag(name: str) -> None:
    with pytest.raises(ValueError, match=r"^--ranking ") as caught:
        load_ranker(name)
    assert str(caught.value).startswith(f"--ranking {name}: ")
    assert "\n" not in str(caught.value)
