"""A user's ranker that returns what it may not: one line that names it, and nothing of it in the ledger.

And a ranker of ours that is flooded with keys: its state, the records and a commit stay small.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records_samples import order, record, signed

import validator
from pilot.ranking import BadRanker, Evidence, rank
from pilot.ranking.accepted_work import KEPT, AcceptedWork
from pilot.simulation.virtual_time import run
from pilot.storage.ledger import Ledger
from protocol import Fault, Receipt
from tests.tiny import MINERS, make_place, play, tiny_task

A, B = sorted(k.ss58_address for k in MINERS[:2])
ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Mine:
    """A user's own ranker, which says what a test wants."""

    scores: Any = None  # None: none for each
    shares: Any = {A: 0.5, B: 0.5}  # noqa: RUF012
    state: Any = {}  # noqa: RUF012

    def update(self, evidence: Sequence[Evidence]) -> Mapping[str, Mapping[str, float]]:
        return {e.hotkey: {"seen": 1} for e in evidence} if self.scores is None else self.scores

    def weights(self) -> Mapping[str, float]:
        return self.shares  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        return self.state  # type: ignore[no-any-return]

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Negative(Mine):
    shares = {A: 6.0, B: -5.0}  # noqa: RUF012


def ranker(**says: Any) -> Mine:
    mine = Mine()
    vars(mine).update(says)
    return mine


EVIDENCE = [Evidence(A, None, 10, 10), Evidence(B, Fault.LATE, 0, 10)]
WRONG: dict[str, tuple[Mine, str]] = {
    "negative": (ranker(shares={A: 6.0, B: -5.0}), f"weights() {B}: Input should be greater than or equal to 0"),
    "a little": (ranker(shares={A: 1.0, B: -1e-9}), f"weights() {B}: Input should be greater"),
    "nan": (ranker(shares={A: math.nan}), f"weights() {A}: Input should be a finite number, it is nan"),
    "infinite": (ranker(shares={A: math.inf}), "finite"),
    "text": (ranker(shares={A: "1.0"}), f"weights() {A}: Input should be a valid number, it is '1.0'"),
    "nothing": (ranker(shares={A: None}), "it is None"),
    "true": (ranker(shares={A: True}), "it is True"),
    "complex": (ranker(shares={A: 1j}), "it is 1j"),
    "list": (ranker(shares=[0.5, 0.5]), "weights() returned list, it must return a dict by hotkey"),
    "none": (ranker(shares=None), "weights() returned NoneType"),
    "number": (ranker(shares=1.0), "weights() returned float"),
    "a name": (ranker(shares={"alice": 1.0}), "weights() alice: String should match"),
    "a number": (ranker(shares={0: 1.0}), "weights() 0: Input should be a valid string"),
    "a short key": (ranker(shares={A[:-5]: 1.0}), "should match"),
    "sum": (ranker(shares={A: 3.0, B: 0.25}), "weights() sum to 3.25, they must sum to 1"),
    "huge": (ranker(shares={A: 1e308, B: 1e308}), "they must sum to 1"),
    "score nan": (ranker(scores={A: {"x": math.nan}, B: {}}), f"update() {A} x: Input should be a finite number"),
    "score name": (ranker(scores={A: {"x y": 1.0}, B: {}}), f"update() {A} x y: String should match"),
    "score type": (ranker(scores={A: [1.0], B: {}}), f"update() {A}: Input should be a valid dict"),
    "scores missing": (ranker(scores={A: {}}), f"update() gave no scores to {B}"),
    "scores none": (ranker(scores=0), "update() returned int"),
    "state nan": (ranker(state={"x": math.nan}), "state_dict() is not JSON"),
    "state set": (ranker(state={"x": {1}}), "state_dict() is not JSON"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_ranker_may_not_say_is_one_line_that_names_it(name: str) -> None:
    mine, expected = WRONG[name]
    with pytest.raises(BadRanker) as caught:
        rank(mine, EVIDENCE)
    line = str(caught.value)
    assert line.startswith(f"--ranking {__name__}:Mine: ")
    assert expected in line
    assert "\n" not in line
    assert len(line) < 400


@pytest.mark.parametrize("shares", [{}, {A: 0.0, B: 0}, {A: 1}, {A: 1 / 3, B: 2 / 3}, {A: 1 - 1e-9}])
def test_what_it_may_say(shares: dict[str, float]) -> None:
    assert rank(ranker(shares=shares), EVIDENCE).weights == shares


def test_a_bad_weight_is_never_committed_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "tiny")

    async def main() -> None:
        place = make_place(tmp_path, task, ranker=f"{__name__}:Negative")
        with pytest.raises(BadRanker, match=rf"^--ranking {__name__}:Negative: weights\(\) {B}: .* it is -5.0; "):
            await play(place.market, 2)
        assert place.store.head() is None
        await place.market.close()
        place.store.close()
        again = make_place(tmp_path, task, ranker=f"{__name__}:Mine")
        await again.market.replay(0)
        await play(again.market, 2)
        assert again.store.head().weights == {A: 0.5, B: 0.5}

    run(main())


def test_the_program_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def bad(config: object) -> None:
        rank(Negative(), EVIDENCE)

    monkeypatch.setattr(validator, "run", bad)
    with pytest.raises(SystemExit) as ended:
        validator.main(["--axons", "8091", "--task", "quadratic"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- a flood of keys --------------------------------------------------------------------------------------------------


def key(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return "5" + digits.rjust(47, "1")


def test_the_ranker_forgets_those_that_worked_least() -> None:
    ours = AcceptedWork()
    ours.update([Evidence(A, None, 1000, 1000)])
    for round in range(20):
        rank(ours, [Evidence(key(1000 * round + i), None, 1, 1) for i in range(256)])
        assert len(ours.weights()) <= KEPT
    assert ours.weights()[A] > 0.4
    assert len(json.dumps(ours.state_dict())) < 100 * KEPT
    assert key(19_000) in ours.weights()
    assert key(0) not in ours.weights()


def test_a_commit_costs_by_the_round_s_own_miners(tmp_path: Path) -> None:
    """The newest round has the weights of all, older ones those of their own miners."""
    ledger, ours, rounds = Ledger(tmp_path / "ledger.sqlite"), AcceptedWork(), 40
    for round in range(rounds):
        hotkeys = [key(1000 * round + i) for i in range(64)]
        found = rank(ours, [Evidence(hotkey, None, 100, 100) for hotkey in hotkeys])
        made = []
        for hotkey in hotkeys:
            signed_order = order(round, hotkey)
            receipt = Receipt(
                run="run", round=round, hotkey=hotkey, order=signed_order.digest, verdict="ACCEPTED", reason="",
                done=(), work=100, scores=found.scores[hotkey], weight=found.weights.get(hotkey, 0.0),
            )  # fmt: skip
            made.append((signed_order, signed(receipt)))
        ledger.open_round(round, [o for o, _ in made])
        kept = replace(record(round), receipts=tuple(r for _, r in made), weights=found.weights, ranker=found.state)
        ledger.commit(kept)
    sizes = [len(r.weights) for r in ledger.committed(0)]
    assert sizes == [64] * (rounds - 1) + [KEPT]
    assert len(ledger.totals()) == 64 * rounds
    ledger.close()


def test_a_plug_in_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pilot.aggregation import load_aggregator
    from pilot.aggregation.means import mean
    from pilot.ranking import load_ranker

    (tmp_path / "mine_of_this_test.py").write_text(
        "from pilot.aggregation.means import mean\nfrom pilot.ranking.accepted_work import AcceptedWork\n"
        "class Own(AcceptedWork): pass\nNUMBER = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert type(load_ranker("mine_of_this_test:Own")).__name__ == "Own"
    assert load_aggregator("mine_of_this_test:mean") is mean
    for name, reason in (("mine_of_this_test:NUMBER", "not a function"), ("mine_of_this_test:no", "no")):
        with pytest.raises(ValueError, match=f"--aggregation {name}: .*{reason}"):
            load_aggregator(name)
