"""Run folders: their names, the flags a run was started with, and what a resumed run must keep."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from market.config import ValidatorConfig

if TYPE_CHECKING:
    from records.store import Store

# The committed rounds' arithmetic depends on these: a run is resumed with them as they were.
FIXED = (
    *("task", "gpt2.", "seed", "broadcast", "codec.", "aggregation", "ranking"),
    *("optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip"),
)
# Said anew each time, or only of the moment.
FLEETING = ("resume", "config", "run", "runs")


def resume_flags(argv: Sequence[str]) -> list[str]:
    """With --resume the run's own flags are the defaults. ValueError where there is no such run."""
    if "--resume" not in argv:
        return []
    runs = Path(cli.flag_value(argv, "--runs") or ValidatorConfig().runs)
    name = cli.flag_value(argv, "--run") or _newest(runs)
    path = runs / name / "config.json"
    if not path.is_file():
        raise ValueError(f"--run {name}: there is no such run in {runs}; start it without --resume")
    known = cli.flatten(ValidatorConfig())
    values = {key: value for key, value in json.loads(path.read_text()).items() if key in known}
    flags = ["--run", name]
    for key, value in values.items():
        if key not in FLEETING and value is not None and value != known[key]:
            flags += cli.as_flags(key, value)
    return flags


def _newest(runs: Path) -> str:
    found = sorted(runs.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"--resume: there is no run in {runs}; name its folder with --runs")
    return found[-1].parent.name


def folder_of(config: ValidatorConfig) -> Path:
    name = config.run or f"{config.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"--run {name}: must be a plain name, such as demo")
    return config.runs.expanduser() / name


def open_store(config: ValidatorConfig, folder: Path) -> Store:
    """A new run's store, or with --resume the run's own; ValueError where that is of another task or model."""
    from records.store import Store

    flags = cli.flatten(config)
    if not config.resume:
        store = Store.create(folder, {key: json.dumps(value) for key, value in flags.items()}, config.snapshot.keep)
    else:
        store = Store.open(folder, config.snapshot.keep)
        for key, text in store.meta().items():
            if key.startswith(FIXED) and json.loads(text) != flags.get(key):
                store.close()
                raise ValueError(
                    f"--{key.replace('_', '-')} {flags.get(key)}: run {folder.name} was started with "
                    f"{json.loads(text)}; resume it with that, or start another --run"
                )
    (folder / "config.json").write_text(json.dumps(flags, indent=2) + "\n")
    return store
