"""Copy a run, also while its validator is working, to a folder from which --resume goes on.

    pilot-backup runs/demo backups/           # makes backups/demo, or replaces the backup that is there
    python src/validator.py --resume --runs backups --run demo

The copy is checked before it takes its name: signatures, receipts, payloads and the chain of versions.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pilot.app import cli
from pilot.common import interrupts
from pilot.common.files import TEMPORARY, make_folder, sync_file, temporary_folder
from pilot.common.flags import arg
from pilot.storage import LEDGER
from pilot.storage.snapshots import snapshot_rounds

PROGRAM = "pilot-backup"
MARK = "backup.json"  # only a backup has it
FILES = ("peers.json", "clock", "metrics.jsonl")
TRIES = 5  # the run may delete what the copy needs, if it makes two snapshots while it is copied


@dataclass(frozen=True)
class BackupConfig:
    """Copy a run, also while its validator is working."""

    run: Path | None = arg(None, short=True)
    """Folder of the run, such as runs/demo. It may be given without the flag's name, first."""
    to: Path | None = arg(None, short=True, path="folder")
    """Folder to put the copy in, under the run's name. It may be given without the flag's name, second."""


@cli.program(PROGRAM, BackupConfig)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the program with these arguments, by default the command line's."""
    if argv is None:
        interrupts.catch(PROGRAM)
    argv = sys.argv[1:] if argv is None else list(argv)
    for number, flag in enumerate(("--run", "--to")):
        if len(argv) > 2 * number and not argv[2 * number].startswith("-"):
            argv.insert(2 * number, flag)
    config = cli.parse(BackupConfig, PROGRAM, argv)
    with cli.mistakes(PROGRAM):
        if config.run is None or config.to is None:
            raise ValueError(f"{'--run: name a run' if config.run is None else '--to: name a folder'}; see --help")
        rounds, place = back_up(config.run.expanduser(), config.to.expanduser())
        print(f"{rounds:,} rounds of {config.run} are in {place}")


def back_up(run: Path, to: Path) -> tuple[int, Path]:
    """Copy a run into the folder `to`. Returns its committed rounds, and the copy's folder.

    Raises ValueError if there is no such run, or something else in the copy's place.
    """
    from pilot.storage.checker import check_run
    from pilot.transport.auth import verify_message

    if not (run / LEDGER).is_file():
        raise ValueError(f"--run {run}: no run is there; name its folder, such as runs/demo")
    place = to / run.resolve().name
    if place.exists() and not (place / MARK).is_file():
        raise ValueError(f"--to {to}: {place} is no backup of pilot-backup; name another folder")
    make_folder(to)
    for _ in range(TRIES):
        with temporary_folder(f".{place.name}.", to) as temporary:
            copy = temporary / place.name
            rounds = _copy(run, copy)
            broken = check_run(copy, verify_message=verify_message).violations
            if not broken:
                _take_place(copy, place)
                return rounds, place
    raise ValueError(f"--run {run}: its copy does not hold together: {broken[0]}; see python scripts/chaos.py --check")


def _copy(run: Path, copy: Path) -> int:
    """Copy the files of a run, the ledger as of one moment and what it refers to. Returns its rounds.

    Links hold what the run may delete in the meantime: payloads before the snapshots that need them, and again after
    the ledger, for the rounds since.
    """
    make_folder(copy)
    with temporary_folder(".backup.", run) as stage:
        for part in ("spool", "versions", "snapshots", "model_files"):
            _link_all(run / part, stage / part)
        ledger = f"file:{run / LEDGER}?mode=ro"
        with closing(sqlite3.connect(ledger, uri=True)) as source, closing(sqlite3.connect(copy / LEDGER)) as target:
            source.backup(target)
            [(rounds,)] = target.execute("SELECT coalesce(max(round) + 1, 0) FROM rounds")
        for part in ("spool", "versions"):
            _link_all(run / part, stage / part)
        for path in sorted(path for path in stage.rglob("*") if path.is_file()):
            target_path = copy / path.relative_to(stage)
            shutil.copyfile(path, make_folder(target_path.parent) / path.name)
            sync_file(target_path)
    for name in FILES:
        if (run / name).is_file():
            shutil.copyfile(run / name, copy / name)
    if not snapshot_rounds(copy / "snapshots"):
        raise ValueError(f"--run {run}: it has no snapshot yet; try again in a moment")
    (copy / MARK).write_text(json.dumps({"run": str(run.resolve()), "rounds": rounds, "time": time.time()}) + "\n")
    return int(rounds)


def _link_all(folder: Path, stage: Path) -> None:
    """Link the folder's files that are complete, but for those that are linked already."""
    for place, _, names in os.walk(folder):  # which passes over what has just been deleted
        for name in names:
            path = Path(place, name)
            link = stage / path.relative_to(folder)
            if not name.endswith(TEMPORARY) and not link.exists():
                make_folder(link.parent)
                _link(path, link)


def _link(path: Path, link: Path) -> None:
    try:
        os.link(path, link)
    except FileNotFoundError:
        pass  # deleted since: a payload or a snapshot that is not needed any more
    except OSError:  # a file system without links
        shutil.copyfile(path, link)


def _take_place(copy: Path, place: Path) -> None:
    """Give the copy its name; an older backup is deleted after that."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(copy, place)
    sync_file(place.parent)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    main()
