"""The validator killed with SIGKILL at seeded random moments, resumed each time: as if nothing had happened.

Real processes, real sockets, real files. The miners live on, so what they say shows that no work was asked for twice.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pilot.interfaces import RoundRecord
from pilot.storage.run_store import RunStore
from protocol import Receipt
from tests.processes import PATIENCE_S, Miner, run_validator, start_miner, start_validator

LOOKS = ("--eval-every", "10", "--snapshot-every", "15")


@pytest.fixture(scope="module")
def miners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Miner]]:
    folder = tmp_path_factory.mktemp("miners")
    with start_miner(folder, "M1") as first, start_miner(folder, "M2") as second:
        yield [first, second]


def history(folder: Path, run: str) -> tuple[list[RoundRecord], dict[int, dict[str, float]]]:
    with closing(RunStore.open(folder / "runs" / run, keep=2)) as store:
        return store.committed(0), store.ledger.evaluations()


def flags(miners: list[Miner], run: str, rounds: int) -> list[str]:
    axons = [miner.endpoint for miner in miners]
    return ["--axons", *axons, "--run", run, "--rounds", str(rounds), *LOOKS]


def kill_and_resume(folder: Path, miners: list[Miner], kills: int, rounds: int, seed: int) -> None:
    """Kills until `kills` have struck a validator at work, then lets it finish and compares with a calm run."""
    rng = random.Random(seed)
    calm = run_validator(folder, *flags(miners, "calm", rounds))
    assert calm.returncode == 0, calm.stderr
    struck = 0
    while struck < kills:
        resume = ["--resume"] if (folder / "runs" / "killed" / "ledger.sqlite").exists() else []
        log = f"validator{struck}"
        with start_validator(folder, *flags(miners, "killed", rounds), *resume, log=log) as validator:
            if rng.random() < 0.8:  # while it works; otherwise while it starts
                validator.wait_for("miners are there")
                time.sleep(rng.uniform(0.0, 0.6))
            else:
                time.sleep(rng.uniform(0.0, 6.0))
            assert validator.survivors(), f"it was done after {struck} kills: give it more rounds\n{validator.said()}"
            validator.kill()
        struck += 1
    with start_validator(folder, *flags(miners, "killed", rounds), "--resume", log="last") as validator:
        assert validator.wait(5 * PATIENCE_S) == 0, validator.said()  # on a slow machine most rounds may be left

    expected, expected_looks = history(folder, "calm")
    found, looks = history(folder, "killed")
    assert [r.version for r in found] == [r.version for r in expected]
    assert [r.metrics["loss"] for r in found] == [r.metrics["loss"] for r in expected]
    assert [r.cursor for r in found] == [r.cursor for r in expected]
    assert [dict(r.weights) for r in found] == [dict(r.weights) for r in expected]
    assert looks == expected_looks
    receipts = [Receipt.parse(s.body) for r in found for s in r.receipts]
    assert {r.verdict for r in receipts} == {"ACCEPTED"}
    done = [i for receipt in receipts for r in receipt.done for i in range(*r)]
    assert sorted(done) == list(range(len(done)))  # nothing was paid twice, nothing was skipped
    rows = (folder / "runs" / "killed" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == rounds


def computed(miner: Miner) -> Counter[str]:
    """How often the miner set to work on each version."""
    return Counter(re.findall(r"micro-batches on version (\w+)", miner.said()))


def assert_no_work_was_asked_for_twice(miners: list[Miner]) -> None:
    """The calm run and the killed one make the same versions: each miner worked on each exactly twice."""
    for miner in miners:
        assert set(computed(miner).values()) == {2}


@pytest.mark.slow
def test_kill_and_resume(tmp_path: Path, miners: list[Miner]) -> None:
    kill_and_resume(tmp_path, miners, kills=3, rounds=80, seed=1)
    assert_no_work_was_asked_for_twice(miners)


@pytest.mark.slow
def test_thirty_kills(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("miners")
    with start_miner(folder, "M1") as first, start_miner(folder, "M2") as second:
        kill_and_resume(tmp_path, [first, second], kills=30, rounds=500, seed=2)
        assert_no_work_was_asked_for_twice([first, second])
