"""What a peer may cost: each limit is a flag with its default, and none can be set to what nothing could keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest

import miner
import validator
from pilot.common.limits import Limits
from tests.processes import run_program
from tests.test_cli import Main, mistake

FLAGS = {field.name: f"--limits.{field.name.replace('_', '-')}" for field in fields(Limits)}
MAY_BE_ZERO = ("spool_bytes", "reserve_bytes")
PROGRAMS = {"miner": (miner.main, []), "validator": (validator.main, ["--axons", "8091"])}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_every_limit_with_its_default(program: str) -> None:
    shown = run_program(f"{program}.py", "--help-all").stdout
    words = " ".join(shown.replace("│", " ").split())
    for field in fields(Limits):
        _, _, after = words.partition(f"{FLAGS[field.name]} ")
        assert f"(default: {field.default})" in after[:400], field.name


def test_the_defaults_are_sane() -> None:
    Limits().check()
    replace(Limits(), **dict.fromkeys(MAY_BE_ZERO, 0)).check()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", FLAGS)
def test_a_wrong_limit_is_one_line(name: str, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    main: Main
    flags: Sequence[str]
    main, flags = PROGRAMS[program]
    wrong = ["-1"] if name in MAY_BE_ZERO else ["0", "-1"]
    wrong += ["nan", "inf"] if isinstance(getattr(Limits(), name), float) else ["1.5"]
    for value in wrong:
        line = mistake(main, [*flags, f"{FLAGS[name]}={value}"], capsys)
        assert FLAGS[name] in line, value
