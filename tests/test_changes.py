"""What the validator says of its miners and rounds, a line for each change, and what it calls healthy."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pilot.app.health import DISK_S, ValidatorHealth
from pilot.display.changes import Changes
from pilot.display.console import Console
from pilot.interfaces import MinerState
from pilot.simulation.virtual_time import run
from pilot.storage.run_store import RunStore
from protocol import Fault, Receipt
from tests.processes import RUN, quadratic_flags, start_miner, start_validator
from tests.tiny import MINERS, make_place, play, tiny_task

A, B = "5" + "A" * 47, "5" + "B" * 47


def miner(hotkey: str, state: str, problem: str = "") -> MinerState:
    return MinerState(f"10.0.0.1:{8090 + ord(hotkey[1])}", hotkey, state, 0, 4, 0.0, 0, 0, problem=problem)


def receipt_of(hotkey: str, round: int, verdict: str, reason: str) -> Receipt:
    return Receipt(
        run="r",
        round=round,
        hotkey=hotkey,
        order="0" * 64,
        verdict=verdict,
        reason=reason,
        done=(),
        work=0,
        scores={},
        weight=0.5,
    )


def test_a_miner_that_goes_and_comes_is_a_line_each() -> None:
    changes = Changes()
    assert list(changes.look([miner(A, "idle"), miner(B, "working")], 0.0)) == []
    assert list(changes.look([miner(A, "working"), miner(B, "away", "connection refused")], 1.0)) == [
        "miner 5BBBBBBB at 10.0.0.1:8156 is away: connection refused"
    ]
    assert list(changes.look([miner(A, "working"), miner(B, "away", "timed out")], 2.0)) == []
    assert list(changes.look([miner(A, "working"), miner(B, "idle")], 9.0)) == [
        "miner 5BBBBBBB at 10.0.0.1:8156 is back after 8 s"
    ]


def test_waiting_for_miners_is_said_at_once_and_then_ever_more_rarely() -> None:
    changes = Changes()
    list(changes.look([miner(A, "idle")], 0.0))
    said = [(t, line) for t in range(1, 4000) for line in changes.look([miner(A, "away")], float(t))]
    assert [t for t, _ in said] == [1, 1, 61, 301, 901, 3601]
    assert said[1][1] == "waiting for miners: none is there"
    assert said[3][1] == "waiting for miners: none is there since 5 min"
    assert list(changes.look([miner(A, "idle")], 4000.0)) == [
        "miner 5AAAAAAA at 10.0.0.1:8155 is back after 3999 s",
        "miners are there again, after 3999 s",
    ]


def test_a_verdict_is_said_when_it_changes() -> None:
    changes = Changes()

    def committed(round: int, verdict: str, reason: str) -> list[str]:
        return list(changes.committed(round, [receipt_of(A, round, verdict, reason)], float(round)))

    assert committed(0, "ACCEPTED", "all of it") == []
    assert committed(1, Fault.REFUSED, "refused with 403: pinned to another") == [
        "round 2: miner 5AAAAAAA REFUSED, refused with 403: pinned to another"
    ]
    assert committed(2, Fault.REFUSED, "refused with 403: pinned to another") == []
    assert committed(3, Fault.LATE, "no whole reply within 3.1 s") != []
    assert committed(4, Fault.LATE, "no whole reply within 2.7 s") == []  # the same but for its figures
    assert committed(5, "ACCEPTED", "all of it") == ["round 6: miner 5AAAAAAA accepted again"]


def test_a_slow_round_names_whom_it_waits_for() -> None:
    changes = Changes()
    miners = [miner(A, "working"), miner(B, "done")]
    list(changes.look(miners, 0.0))
    for round in range(5):
        list(changes.committed(round, [], 10.0 * round))
    assert list(changes.look(miners, 79.0)) == []
    assert list(changes.look(miners, 80.0)) == [
        "this round has taken 40 s, usually 10 s: waiting for 5AAAAAAA (working)"
    ]
    assert list(changes.look(miners, 100.0)) == []


# --- logs -------------------------------------------------------------------------------------------------------------


def test_each_line_of_a_json_log_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(3, as_json=True) as console:
        console.say("hello\x1b[31m\nthere")
        console.round({"round": 0, "loss": float("nan"), "val_loss": 2.5})
        console.heading("Who earned what")
        console.columns(["miner", "pay"], [("5A", "50 %")])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["event"] for row in rows] == ["hello\x1b[31m\nthere", "round", "5A"]
    assert (rows[1]["round"], rows[1]["loss"], rows[1]["val_loss"]) == (0, None, 2.5)
    assert rows[2]["pay"] == "50 %"
    assert {row["level"] for row in rows} == {"info"}
    assert all(row["time"].endswith("+00:00") for row in rows)


def test_lines_without_a_terminal_begin_with_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(3) as console:
        console.say("hello")
    said = capsys.readouterr().out
    time.strptime(said[:19], "%Y-%m-%d %H:%M:%S")
    assert said[19:] == " hello\n"


def test_a_level_hides_what_is_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    with Console(3, "warning") as console:
        console.say("hello")
        logging.getLogger("test").info("less")
        logging.getLogger("test").warning("more")
    assert capsys.readouterr().out[20:] == "WARNING test: more\n"


# --- patience ---------------------------------------------------------------------------------------------------------


def test_refusals_use_up_time_before_they_use_up_patience(tmp_path: Path) -> None:
    """With a pause after each round of refusals, a minute takes a dozen rounds, not a thousand."""
    task = tiny_task(tmp_path / "task")

    async def main() -> None:
        place = make_place(tmp_path, task, patience=3, patience_s=60.0)
        for key in MINERS[:2]:
            place.network.drop(key.ss58_address)
        began = place.network.now()
        await play(place.market, 1000)
        assert place.market.out_of_patience
        assert place.network.now() - began >= 60.0
        assert 3 <= place.store.head().round + 1 <= 12

    run(main())


# --- health -----------------------------------------------------------------------------------------------------------


def test_a_validator_is_ill_without_miners_commits_or_room(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "demo", {"task": "gpt2"}, 2)
    now, miners = [1000.0], [miner(A, "working"), miner(B, "away")]
    health = ValidatorHealth(tmp_path / "demo", A, store.ledger, 0, lambda: now[0])
    health.miners = lambda: miners
    assert (health().healthy, health().state, health().miners) == (True, "starting", {"working": 1, "away": 1})
    store.ledger.commits.extend([1000.0, 1010.0, 1020.0, 1030.0])
    now[0] = 1080.0
    assert (health().healthy, health().commit_age_s) == (True, 50.0)
    now[0] = 1091.0
    assert (health().healthy, health().state) == (False, "no commit for 61 s, usually one in 10 s")
    store.ledger.commits.append(1091.0)
    assert health().healthy
    miners[0] = miner(A, "away")
    now[0] = 1110.0
    assert health().healthy
    now[0] = 1122.0
    assert (health().healthy, health().state) == (False, "no miner is there for 31 s")
    miners[0] = miner(A, "done")
    assert health().healthy
    full = ValidatorHealth(tmp_path / "demo", A, store.ledger, 1 << 60, lambda: now[0] + DISK_S)
    assert not full().healthy
    assert "are free on the disk" in full().state
    store.close()


def test_a_killed_miner_is_a_line_and_makes_the_validator_wait_aloud(tmp_path: Path) -> None:
    with start_miner(tmp_path, "M1") as first:
        flags = ["--axons", first.endpoint, "--rounds", "100000", "--eval-every", "0"]
        with start_validator(tmp_path, *flags, task=quadratic_flags) as validator:
            validator.wait_for(r"^round \d+/100000")
            first.kill()
            validator.wait_for(rf"^miner {first.hotkey[:8]} at 127\.0\.0\.1:\d+ is away: ")
            validator.wait_for("^waiting for miners: none is there$")
            first.restart()
            validator.wait_for(rf"^miner {first.hotkey[:8]} at 127\.0\.0\.1:\d+ is back after \d+ s$")
            validator.wait_for(r"^miners are there again, after \d+ s$")
            validator.terminate()
            assert validator.wait() == 0
    assert (tmp_path / "runs" / RUN / "loss.png").exists()
