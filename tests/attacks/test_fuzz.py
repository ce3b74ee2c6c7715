"""A seeded subset of `make fuzz`, so that what it has shown stays so; and the fuzzer, which must see what is wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz import replay
from tests.fuzz_targets import TARGETS, inputs, spoil

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", TARGETS)
def test_valid_bytes_are_accepted(name: str) -> None:
    assert all(TARGETS[name].check(seed) for seed in TARGETS[name].seeds)


@pytest.mark.parametrize("name", TARGETS)
@SETTINGS
@given(st.data())
def test_odd_structure_is_right_or_refused(name: str, data: st.DataObject) -> None:
    TARGETS[name].check(data.draw(inputs(TARGETS[name])))


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_bytes_are_right_or_refused(name: str) -> None:
    target, rng = TARGETS[name], random.Random(0)
    outcomes = [target.check(spoil(rng.choice(target.seeds), target, rng)) for _ in range(1500)]
    assert 0 < sum(outcomes) < len(outcomes) / 2  # some are still valid, so the others are near to it


def fuzz(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


def test_make_fuzz_counts_its_inputs(tmp_path: Path) -> None:
    options = ("--runs=400", "--structured=100", "--engine=chance")
    ran = fuzz("-m", "tests.fuzz", "endpoint", *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    first, endpoint, total = ran.stdout.splitlines()
    assert "atheris is not used" in first
    assert endpoint.split()[:3] == ["endpoint", "400", "inputs"]
    assert "400 inputs" in total
    assert "no findings" in total


BROKEN = """
from tests.fuzz import Session

class Target:
    seeds = (b"good",)
    def check(self, data):
        return bool(%s)

session = Session("broken", Target(), 2)
session.run(b"good")
session.run(b"bad")
"""


@pytest.mark.parametrize(
    ("check", "says"),
    [
        ("1 / (data != b'bad')", "ZeroDivisionError"),
        ("b'x' * (1 + (100 << 20) * (data == b'bad'))", "memory out of proportion"),
    ],
)
def test_a_finding_is_kept_with_the_command_that_replays_it(check: str, says: str, tmp_path: Path) -> None:
    ran = fuzz("-c", BROKEN % check, cwd=tmp_path)
    result = json.loads(ran.stdout)
    (found,) = (tmp_path / "build" / "fuzz").iterdir()
    assert ran.returncode == 1
    assert result["done"] == 1
    assert says in result["finding"]
    assert f"-m tests.fuzz broken --replay {found.relative_to(tmp_path)}" in result["finding"]
    assert found.read_bytes() == b"bad"


def test_replay_says_what_became_of_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "input"
    for data, became in ((b"8091", "accepted"), (b"80 91", "refused")):
        path.write_bytes(data)
        replay("endpoint", path)
        assert capsys.readouterr().out == f"endpoint: {path}: {became}, as it should be\n"
