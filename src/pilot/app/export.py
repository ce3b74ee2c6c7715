"""Save a run's model for other programs, and export one from a run's snapshots.

    pilot-export runs/demo                   # the newest snapshot, into runs/demo/exported
    pilot-export runs/demo --round 50 --out my-model

The run may be going on: its files are only read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilot.app import cli
from pilot.common import interrupts
from pilot.common.flags import arg

if TYPE_CHECKING:
    import torch

    from pilot.training.learner import Learner
    from tasks import Task

PROGRAM = "pilot-export"
DESCRIPTION = "model_files"  # folder of a run with what its models hold besides tensors
META = "meta.json"


def save_description(task: Task, folder: Path) -> None:
    """Write what the run's models hold besides tensors, such as the tokenizer, for `pilot-export`."""
    from pilot.common.files import make_folder, replacing

    meta, files = task.describe()
    place = make_folder(folder / DESCRIPTION)
    for name, content in {META: json.dumps(meta).encode(), **files}.items():
        with replacing(place / name) as file:
            file.write(content)


def save_model(task: Task, learner: Learner, rounds: int, folder: Path, keep: int) -> Path:
    """Save the model into the run's folder as a checkpoint for base_eval or Hugging Face's loaders.

    They read RUN/model as well as the step's folder in it, which is returned. The newest `keep` steps stay.
    """
    meta, files = task.describe()
    tensors = {name: p.detach() for name, p in learner.parameters.items()} | task.buffers(learner.model)
    return _write(folder / "model", rounds, tensors, meta, files, keep)


def _write(
    place: Path,
    rounds: int,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    files: Mapping[str, bytes],
    keep: int,
) -> Path:
    from nanochat import checkpoint_manager

    if place.is_file():  # no checkpoint of ours
        place.unlink()
    path = checkpoint_manager.save(place, rounds, tensors={"model": tensors}, meta=meta, files=files, keep=keep)
    checkpoint_manager.link_newest(place)
    return path


@dataclass(frozen=True)
class ExportConfig:
    """Export the model of a run's snapshot, also while the run is going on."""

    run: Path | None = arg(None, short=True)
    """Folder of the run, such as runs/demo. It may be given without the flag's name, first."""
    round: int | None = arg(None, short=True)
    """Export the snapshot after this many rounds. None: the newest."""
    out: Path | None = arg(None, short=True, path="folder")
    """Folder to write to. None: the folder exported in the run's."""


@cli.program(PROGRAM, ExportConfig)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the program with these arguments, by default the command line's."""
    if argv is None:
        interrupts.catch(PROGRAM)
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    config = cli.parse(ExportConfig, PROGRAM, argv)
    with cli.mistakes(PROGRAM):
        if config.run is None:
            raise ValueError("--run: name a run's folder, such as runs/demo")
        run = config.run.expanduser()
        print(f"model in {export(run, config.round, (config.out or run / 'exported').expanduser())}")


def export(run: Path, round: int | None, out: Path) -> Path:
    """Write the model of a snapshot as a checkpoint into `out`, and return the step's folder.

    Raises ValueError if there is no such run or snapshot, or if `out` holds something else.
    """
    from pilot.storage.snapshots import read_snapshot

    place = run / DESCRIPTION
    if not (place / META).is_file():
        known = (run / "snapshots").is_dir()
        raise ValueError(
            f"--run {run}: "
            + ("was begun by an older release: resume it once" if known else "not a run's folder; name one of runs/")
        )
    if out.is_dir() and any(path for path in out.iterdir() if not path.is_symlink() and path.suffix != ".tmp"):
        from nanochat.checkpoint_manager import steps

        if not steps(out):
            raise ValueError(f"--out {out}: holds other files; name a new folder")
    try:
        snapshot = read_snapshot(run / "snapshots", round)
    except ValueError as error:
        raise ValueError(f"--round: {error}") from None
    meta = json.loads((place / META).read_bytes())
    files = {path.name: path.read_bytes() for path in place.iterdir() if path.name != META}
    tensors = {
        name.partition("/")[2]: tensor
        for name, tensor in snapshot.tensors.items()
        if name.startswith(("model/", "buffer/"))
    }
    return _write(out, snapshot.round, tensors, meta, files, keep=0)


if __name__ == "__main__":
    main()
