"""Run a small marketplace of real processes under random faults, and check that nothing was lost.

python scripts/chaos.py --seed 1 --rounds 200
python scripts/chaos.py --check runs/demo            # only the check, of any run

Processes are killed, paused, stopped and restarted; their connections stall and reset; clocks are wrong by an hour;
disks are full. Afterwards the checker (pilot/storage/checker.py) holds the ledger, the spool and the miners' receipts
against its rules, and the loss is compared with that of a run without faults. The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pilot.common import interrupts

PROGRAM = "chaos.py"
if __name__ == "__main__":
    interrupts.catch(PROGRAM)

import asyncio
import shutil
import tempfile
from collections.abc import Sequence

from pilot.app import cli
from pilot.simulation.chaos.check import check_and_print, local_caches
from pilot.simulation.chaos.run import ChaosConfig, run


@cli.program(PROGRAM, ChaosConfig)
def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(ChaosConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    with cli.mistakes(PROGRAM):
        config.validate()
        if config.check is not None:
            folder = config.check.expanduser().absolute()
            violations = check_and_print(folder, [*local_caches(folder), *config.caches], config.replay)
            raise SystemExit(1 if violations else 0)
        folder = make_folder(config)
    interrupts.says(f"stopped; its files are in {folder}")
    good = asyncio.run(run(config, folder))
    if good and config.folder is None:
        shutil.rmtree(folder)
    elif not good:
        print(f"all files are in {folder}")
    raise SystemExit(0 if good else 1)


def make_folder(config: ChaosConfig) -> Path:
    if config.folder is None:
        return Path(tempfile.mkdtemp(prefix="chaos-"))
    folder = config.folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--folder {config.folder}: is not empty; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
