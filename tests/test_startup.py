"""What a person sees first: `--help` answers without the heavy libraries, and explains each flag with its unit."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pilot.app import cli
from pilot.app.base_train_flags import BaselineConfig
from pilot.app.miner_flags import MinerConfig
from pilot.app.validator_flags import ValidatorConfig
from pilot.simulation.flags import SimulateConfig

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "src/validator.py": ValidatorConfig,
    "src/miner.py": MinerConfig,
    "scripts/base_train.py": BaselineConfig,
    "scripts/simulate.py": SimulateConfig,
}
HEAVY = {"torch", "transformers", "datasets", "wandb", "bittensor", "matplotlib", "pyarrow", "aiohttp"}

# As `python program --help`, and on standard error what that had imported by its end.
HELP_AND_MODULES = """
import json, os, runpy, sys
program = sys.argv[1]
sys.path[0] = os.path.dirname(program)
sys.argv = [program, "--help"]
try:
    runpy.run_path(program, run_name="__main__")
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""

# What a number may be of. A flag whose help names none of these leaves its reader guessing.
UNITS = re.compile(
    r"seconds|rounds?|micro-batch|sequences|tokens|bytes|documents|snapshots|threads|port|process(es)?\b|seed"
    r"|fraction|share|decay|norm|rate|added to|connections|requests|layers?|heads?\b|steps?|checkpoints",
    re.IGNORECASE,
)


@cache
def helped(program: str) -> tuple[str, frozenset[str]]:
    """The help text, and the top-level modules that were imported to show it."""
    ended = subprocess.run(
        [sys.executable, "-c", HELP_AND_MODULES, str(ROOT / program)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    modules = json.loads(ended.stderr.splitlines()[-1])
    return ended.stdout, frozenset(module.partition(".")[0] for module in modules)


@cache
def options(program: str) -> dict[str, str]:
    """Flag to help text, both as `--help` shows them."""
    texts: dict[str, str] = {}
    flag = ""
    for line in helped(program)[0].splitlines():
        inside = line.strip("│ ")
        if re.match(r"│ -", line):
            names, _, text = inside.partition("  ")
            flag = names.replace(",", " ").split()[0]
            texts[flag] = text.strip()
        elif re.match(r"│  ", line):
            texts[flag] = f"{texts[flag]} {inside}".strip()
    return texts


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


every_program = pytest.mark.parametrize("program", PROGRAMS)


@every_program
def test_help_imports_nothing_heavy(program: str) -> None:
    assert not HEAVY & helped(program)[1]


@every_program
def test_help_explains_every_flag(program: str) -> None:
    shown = options(program)
    for name in cli.flatten(PROGRAMS[program]()):
        text = re.sub(r"\(default: .*\)", "", shown[flag_of(name)])
        assert len(text.split()) >= 3, f"{program} {flag_of(name)}: {text!r}"


@every_program
def test_help_names_the_unit_of_every_number(program: str) -> None:
    shown = options(program)
    for name, value in cli.flatten(PROGRAMS[program]()).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert UNITS.search(shown[flag_of(name)]), f"{program} {flag_of(name)}: {shown[flag_of(name)]!r}"


@every_program
def test_help_shows_every_default(program: str) -> None:
    shown = options(program)
    for name, value in cli.flatten(PROGRAMS[program]()).items():
        if isinstance(value, bool | int | float):
            assert f"(default: {value})" in shown[flag_of(name)]


def test_hyphens_and_underscores_both_parse() -> None:
    hyphens = ["--connect-timeout", "3", "--gpt2.eval-sequences", "4", "--optimizer.weight-decay", "0.5"]
    underscores = ["--connect_timeout", "3", "--gpt2.eval_sequences", "4", "--optimizer.weight_decay", "0.5"]
    first = cli.parse(ValidatorConfig, "validator.py", hyphens)
    assert first == cli.parse(ValidatorConfig, "validator.py", underscores)
    assert (first.connect_timeout, first.gpt2.eval_sequences, first.optimizer.weight_decay) == (3.0, 4, 0.5)


def test_the_flags_of_the_handbook_parse() -> None:
    miner = cli.parse(
        MinerConfig,
        "miner.py",
        shlex.split(
            "--wallet.name miners --wallet.hotkey M1 --device cuda:1 --axon.port 8091 --axon.ip 0.0.0.0 "
            "--axon.external-ip 10.0.0.7 --allow 5A 5B --tasks gpt2 --data d.txt --cache c --logging.debug"
        ),
    )
    assert (miner.wallet.hotkey, miner.axon.port, miner.axon.external_ip) == ("M1", 8091, "10.0.0.7")
    assert (miner.allow, miner.tasks, miner.data, miner.logging.debug) == (("5A", "5B"), ("gpt2",), Path("d.txt"), True)
    validator = cli.parse(
        ValidatorConfig,
        "validator.py",
        shlex.split(
            "--wallet.name validator --wallet.hotkey default --device cuda:0 --axons 8091 far:8092@5A --local 2 "
            "--task gpt2 --run demo --rounds 7 --deadline 30 --batches 3 --seed 1 --wandb.mode offline --codec.up bf16 "
            "--snapshot-every 5 --optimizer.lr 0.1"
        ),
    )
    assert (validator.axons, validator.local, validator.run) == (("8091", "far:8092@5A"), 2, "demo")
    assert (validator.rounds, validator.deadline, validator.batches, validator.seed) == (7, 30, 3, 1)
    assert (validator.codec.up, validator.codec.down, validator.snapshot_every) == ("bf16", "", 5)
