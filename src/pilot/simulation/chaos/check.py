"""Check a run's folder: the checker's rules, a replay, and figures of its rounds."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.simulation.chaos.marketplace import ROOT
from pilot.storage import LEDGER
from pilot.storage.checker import RULES, check_run
from pilot.storage.run_reader import Violation

if TYPE_CHECKING:
    from pilot.app.validator_flags import ValidatorConfig
    from pilot.storage.run_store import RunStore
    from tasks import Task

BASELINE = "baseline"


def check_and_print(run: Path, caches: Sequence[Path], replay: bool) -> list[Violation]:
    """Print the violations and the rules that hold. Raises ValueError if there is no run that can be checked."""
    from pilot.ranking import load_ranker
    from pilot.transport.auth import verify_message

    config = config_of(run)
    task = task_of(config) if replay else None
    report = check_run(
        run,
        verify_message=verify_message,
        miners=caches,
        ranker=lambda: load_ranker(config.ranking),
        count=task.count if task else None,
        batches_per_epoch=task.batches_per_epoch if task else None,
    )
    violations = [*report.violations, *(replay_violations(run, config, task) if task else ())]
    print(f"checked {run}: " + ", ".join(f"{number:,} {what}" for what, number in report.proved.items()))
    for rule, text in (RULES | ({"replay": REPLAY_RULE} if task else {})).items():
        broken = sum(violation.rule == rule for violation in violations)
        print(f"  {f'BROKEN {broken} times' if broken else 'holds'}: {text}")
    for violation in violations:
        print(f"violation: {violation}")
    return violations


def config_of(run: Path) -> ValidatorConfig:
    """Return the flags that a run was started with."""
    from pilot.app import cli
    from pilot.app import run_folder as runs
    from pilot.app.validator_flags import ValidatorConfig

    if not (run / LEDGER).is_file():
        raise ValueError(f"--check {run}: there is no run in it; name a folder with a {LEDGER}, such as runs/demo")
    flags = ["--runs", str(run.parent), "--run", run.name, "--resume"]
    return cli.parse(ValidatorConfig, "chaos.py", flags, runs.resume_flags(flags))


def task_of(config: ValidatorConfig) -> Task:
    from pilot.app import cli
    from tasks import load_task

    cli.set_threads(config.threads)
    flags, cache, device = getattr(config, config.task), config.cache.expanduser(), cli.pick_device(config.device)
    return load_task(config.task).prepare(flags, seed=config.seed, cache=cache, device=device, progress=print)


def local_caches(run: Path) -> list[Path]:
    """Return the caches of the miners that the validator started itself."""
    return [path.parent for path in run.glob("miners/*/*/receipts.jsonl")]


# --- replay -----------------------------------------------------------------------------------------------------------

REPLAY_RULE = (
    "replaying the spool's payloads from the second-newest snapshot on gives the ledger's versions bit for bit"
)


def replay_violations(run: Path, config: ValidatorConfig, task: Task) -> list[Violation]:
    """Replay a run like a restart whose newest snapshot is damaged, and compare versions with the ledger."""
    from pilot.storage.run_reader import copy_of_run
    from pilot.storage.run_store import RunStore
    from pilot.storage.snapshots import Snapshots

    with copy_of_run(run) as copy:
        for round in Snapshots(copy / "snapshots", 2).rounds()[-1:]:
            (copy / "snapshots" / f"{round:08d}.safetensors").unlink()
        with closing(RunStore.open(copy, keep=2)) as store:
            try:
                asyncio.run(_restore(copy, config, task, store))
            except ValueError as error:
                head = store.head()
                return [Violation("replay", head.round if head else None, None, str(error))]
    return []


async def _restore(run: Path, config: ValidatorConfig, task: Task, store: RunStore) -> None:
    from pilot.app.build_validator import restored_market
    from pilot.display.console import Console
    from pilot.simulation.network import EmulatedNetwork
    from pilot.transport.auth import Keypair

    network = EmulatedNetwork(Keypair.create_from_uri("//nobody"), {}, {})  # a replay sends nothing
    with ThreadPoolExecutor(1) as tensors:
        await restored_market(config, run, task, network, store, tensors, Console(config.rounds))


# --- figures ----------------------------------------------------------------------------------------------------------


def final_loss(run: Path) -> float:
    """Return the validation loss of the last evaluation."""
    query = "SELECT value FROM evaluations WHERE name = 'val_loss' ORDER BY round DESC LIMIT 1"
    with closing(sqlite3.connect(run / LEDGER)) as db:
        return float(db.execute(query).fetchone()[0])


def count_faults(run: Path) -> dict[str, int]:
    """Count receipts by verdict, late replies, and rounds in which nothing was accepted."""
    with closing(sqlite3.connect(run / LEDGER)) as db:
        found = dict(db.execute("SELECT coalesce(fault, 'ACCEPTED'), count(*) FROM receipts GROUP BY 1").fetchall())
        late = db.execute("SELECT count(*) FROM late").fetchone()[0]
        empty = "SELECT count(*) FROM rounds WHERE round NOT IN (SELECT round FROM receipts WHERE fault IS NULL)"
        return {**found, "late replies": late, "empty rounds": db.execute(empty).fetchone()[0]}


def format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(Counter(counts).items())) or "none"


def baseline_loss(folder: Path, miners: int, flags: Sequence[str]) -> float:
    """Run as many rounds without faults, and return the final loss. Raises RuntimeError if the run fails."""
    command = [sys.executable, str(ROOT / "src" / "validator.py"), *flags, "--local", str(miners), "--run", BASELINE]
    command += ["--runs", str(folder / "runs"), "--wallet.name", "validator", "--wallet.path", str(folder / "wallets")]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"the baseline run exited with {ended.returncode}: {ended.stderr[-2000:]}")
    return final_loss(folder / "runs" / BASELINE)
