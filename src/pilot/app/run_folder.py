"""Name and open run folders, record the flags of a run, and check those of a resumed run."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilot.app import cli
from pilot.app.validator_flags import ValidatorConfig
from pilot.common.flags import flags_of, option
from pilot.common.paths import expanded
from pilot.storage import LEDGER

if TYPE_CHECKING:
    from pilot.storage.run_store import RunStore
    from protocol import Digest, Hotkey

DATA = "data_digest"


def resume_flags(argv: Sequence[str]) -> list[str]:
    """Return the flags that a resumed run was started with, as defaults. Raises ValueError if there is no such run."""
    if "--resume" not in argv:
        return []
    from pilot.storage.run_store import check_ledger_is_there, missing

    runs = Path(expanded("--runs", cli.flag_value(argv, "--runs") or str(ValidatorConfig().runs)))
    name = cli.flag_value(argv, "--run") or _newest(runs)
    check_ledger_is_there(runs / name)
    if not (runs / name / LEDGER).exists():
        raise missing(runs / name)
    return ["--run", name, *cli.recorded_flags(_flags_of(runs / name), ValidatorConfig)]


def _newest(runs: Path) -> str:
    from pilot.storage.run_store import remains

    def changed(folder: Path) -> float:  # SQLite writes to the log beside the ledger first
        files = [*folder.glob(f"{LEDGER}*"), *folder.glob("snapshots"), *folder.glob("spool")]
        return max((path.stat().st_mtime for path in files), default=0.0)

    for folder in sorted((path for path in runs.glob("*") if path.is_dir()), key=changed, reverse=True):
        if ((folder / LEDGER).exists() and _flags_of(folder)) or remains(folder):  # a lost ledger is not passed over
            return folder.name
    raise ValueError(f"--resume: there is no run in {runs}; name their folder with --runs")


def _flags_of(folder: Path) -> dict[str, Any]:
    """Return the flags that a run was started with, or nothing if it stopped before `begin`."""
    from pilot.storage.ledger import Ledger, naming_damage

    with naming_damage(folder / LEDGER), closing(Ledger(folder / LEDGER)) as ledger:
        return {key: json.loads(text) for key, text in ledger.meta().items() if key != DATA}


def folder_of(config: ValidatorConfig) -> Path:
    """Return the folder of the run. Raises ValueError for a name that does not fit messages and paths."""
    name = config.run or f"{config.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,63}", name):  # it is in every message, as protocol.Name
        raise ValueError(f"--run {name}: must be a plain name of letters, digits and _.+-, such as demo")
    return config.runs.expanduser() / name


def open_store(config: ValidatorConfig, folder: Path) -> RunStore:
    """Create a new run's store, or open a resumed run's. Raises ValueError if a flag that a run keeps has changed."""
    from pilot.storage.run_store import RunStore

    if not config.resume or not _flags_of(folder):
        return RunStore.create(folder, {}, config.snapshot_keep)  # `begin` records its flags
    store = RunStore.open(folder, config.snapshot_keep, config.resume_at)
    if (run := store.ledger.run()) not in (None, folder.name):
        store.close()
        raise ValueError(
            f"--run {folder.name}: {folder / LEDGER} is the record of run {run}; put back the right one, or give the "
            f"folder the name {run}"
        )
    known, flags = flags_of(ValidatorConfig), _texts(config)
    for name, began_with in store.ledger.meta().items():
        if name in known and known[name].resume == "fixed" and flags[name] != began_with:
            store.close()
            raise ValueError(
                f"{option(name)} {flags[name]}: run {folder.name} was started with {began_with}; "
                "resume it with that, or start another --run"
            )
    return store


def remove_unbegun(folder: Path) -> None:
    """Delete the folder of a run that did not begin, unless logs of --local miners in it may tell why."""
    if (folder / LEDGER).is_file() and not (folder / "miners").exists() and not _flags_of(folder):
        shutil.rmtree(folder, ignore_errors=True)


def begin(config: ValidatorConfig, store: RunStore, data: Digest) -> None:
    """Record the flags and the data of a run, once all parts are ready. A start that fails before leaves the name free.

    Raises ValueError if a resumed run would continue with other data.
    """
    flags = _texts(config)
    began_with = store.ledger.meta().get(DATA, data)
    if began_with != data:
        now = " ".join(f"{option(name)} {flags[name]}" for name in _sources(config))
        raise ValueError(
            f"--run {store.folder.name}: its data were {began_with[:12]}, are now {data[:12]}: the text of {now} is "
            "another; give the one that the run was started with, or start another --run"
        )
    store.set_meta({**flags, DATA: data})


def _sources(config: ValidatorConfig) -> list[str]:
    """Return the task's flags that may change in a resumed run if they lead to the same data: a text may move."""
    task, optimizer = f"{config.task}.", f"{config.task}.optimizer."
    free = [name for name, flag in flags_of(ValidatorConfig).items() if flag.resume == "free"]
    return [name for name in free if name.startswith(task) and not name.startswith(optimizer)]


def read_pins(path: Path) -> dict[str, Hotkey]:
    """Return which hotkey answers at which endpoint. Raises ValueError if the file is damaged."""
    from pydantic import TypeAdapter

    from protocol import Hotkey

    if not path.exists():
        return {}
    try:
        return TypeAdapter(dict[str, Hotkey]).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a JSON object of hotkeys"
        raise ValueError(
            f"{path}: {reason}, but which hotkey answers where; restore it, or delete it to trust whoever answers first"
        ) from None


def _texts(config: ValidatorConfig) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in cli.flatten(config).items()}
