"""Check that --help and --help-all answer without heavy imports, and that every flag is explained."""

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
from pilot.app.help import shown_option
from pilot.app.miner_flags import MinerConfig
from pilot.app.validator_flags import ValidatorConfig
from pilot.common.flags import flags_of
from pilot.simulation.flags import SimulateConfig

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "src/validator.py": ValidatorConfig,
    "src/miner.py": MinerConfig,
    "scripts/base_train.py": BaselineConfig,
    "scripts/simulate.py": SimulateConfig,
}
HEAVY = {"torch", "transformers", "datasets", "wandb", "bittensor", "matplotlib", "pyarrow", "aiohttp"}

# Run as `python program --help` does, then print the imported modules on standard error.
HELP_AND_MODULES = """
import json, os, runpy, sys
program = sys.argv[1]
sys.path[0] = os.path.dirname(program)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(program, run_name="__main__")
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""

# Units of numbers. The help of a number that names none of these leaves its reader guessing.
UNITS = re.compile(
    r"seconds|rounds?|micro-batch|sequences|tokens|bytes|documents|snapshots|threads|port|process(es)?\b|seed"
    r"|fraction|share|decay|norm|rate|added to|connections|requests|layers?|heads?\b|steps?|checkpoints|logarithm",
    re.IGNORECASE,
)


@cache
def run_help(program: str, flag: str) -> tuple[str, frozenset[str]]:
    """Return the help text, and the top-level modules that were imported to show it."""
    ended = subprocess.run(
        [sys.executable, "-c", HELP_AND_MODULES, str(ROOT / program), flag],
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
def options(program: str, flag: str = "--help-all") -> dict[str, str]:
    """Return each flag's help text as the program shows it, by the flag."""
    texts: dict[str, str] = {}
    name = ""
    for line in run_help(program, flag)[0].splitlines():
        if line.startswith("  -"):
            left, _, text = line.strip().partition("  ")
            name = left.split()[0]
            texts[name] = text.strip()
        elif line.startswith(" " * 20):
            texts[name] = f"{texts[name]} {line.strip()}".strip()
    return texts


every_program = pytest.mark.parametrize("program", PROGRAMS)


@every_program
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_imports_nothing_heavy(program: str, flag: str) -> None:
    assert not (HEAVY | {"tyro"}) & run_help(program, flag)[1]


@every_program
def test_help_all_explains_every_flag(program: str) -> None:
    shown = options(program)
    for flag in flags_of(PROGRAMS[program]).values():
        text = re.sub(r"\(default: .*\)", "", shown[shown_option(flag)])
        assert len(text.split()) >= 3, f"{program} {flag.option}: {text!r}"


@every_program
def test_help_all_names_the_unit_of_every_number(program: str) -> None:
    shown = options(program)
    for flag in flags_of(PROGRAMS[program]).values():
        if isinstance(flag.default, int | float) and not isinstance(flag.default, bool):
            assert UNITS.search(shown[flag.option]), f"{program} {flag.option}: {shown[flag.option]!r}"


@every_program
def test_help_all_shows_the_default_of_every_number(program: str) -> None:
    shown = options(program)
    for flag in flags_of(PROGRAMS[program]).values():
        if isinstance(flag.default, int | float) and not isinstance(flag.default, bool):
            assert f"(default: {flag.default})" in shown[flag.option]


@every_program
def test_help_is_short_and_leads_to_the_rest(program: str) -> None:
    text, _ = run_help(program, "--help")
    config = PROGRAMS[program]
    assert len(text.splitlines()) <= 75
    assert f"--help-all shows all {len(flags_of(config))} flags" in text
    shown = {flag.option for flag in flags_of(config).values() if flag.short}
    assert options(program, "--help").keys() == shown


@every_program
def test_every_flag_is_in_a_group_that_the_program_orders(program: str) -> None:
    config = PROGRAMS[program]
    assert {flag.group for flag in flags_of(config).values()} <= set(config.groups)


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
