"""Save the validator's state, each snapshot as one safetensors file that carries its own digest.

    snapshots/00000040.safetensors     the state after rounds 0 to 39

The digest lies at a fixed place in the header, and is computed with zeros there. So a snapshot is a single file that
any safetensors reader opens.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.common.files import delete, delete_leftovers, hash_rest, make_folder, replacing, sync_file
from pilot.common.safetensors_header import safetensors_header
from protocol import Hasher

if TYPE_CHECKING:
    import torch

_BEFORE_DIGEST = b'{"__metadata__":{"blake3":"'  # every snapshot's header begins so
_DIGEST_AT = 8 + len(_BEFORE_DIGEST)
_BLANK = "0" * 64
_DAMAGED = ".damaged"
_NAME = re.compile(r"(\d{8,})\.safetensors(\.damaged)?")


@dataclass(frozen=True)
class Snapshot:
    """The state after `round` committed rounds. Tensors are on the CPU, private to the caller."""

    round: int
    header: dict[str, str]
    tensors: dict[str, torch.Tensor]


class Snapshots:
    """The newest `keep` snapshots of a run."""

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 2:
            raise ValueError(f"{keep} snapshots kept: keep at least 2, in case the newest is damaged")
        self._folder = make_folder(folder)
        self._keep = keep
        delete_leftovers(folder)

    def save(self, round: int, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Path:
        """Write the state after `round` rounds, then delete the oldest snapshots.

        Tensors may have any shape and device, and must not change until this returns. It needs extra memory for one
        tensor at a time, if that is not contiguous on the CPU. `header` must not contain the key `blake3`.
        """
        path = self._path(round)
        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps each tensor aligned
        assert "blake3" not in header
        layout = ((name, tensor.dtype, tensor.shape) for name, tensor in ordered)
        head = safetensors_header(layout, {"blake3": _BLANK, **header})
        hasher = Hasher("snapshot")
        hasher.update(head)
        with replacing(path) as file:
            file.write(head)
            for _, tensor in ordered:
                data = _bytes(tensor)
                hasher.update(data)
                file.write(data)
            file.seek(_DIGEST_AT)
            file.write(hasher.hexdigest().encode())
        self._delete_old()
        return path

    def newest(
        self,
        warn: Callable[[str], None],
        version: Callable[[int], str | None] = lambda rounds: None,
        most: int | None = None,
    ) -> Snapshot | None:
        """Return the newest intact snapshot, with `most` after so many rounds at most, or None.

        `version` gives the model's version after so many rounds, where it is known. A snapshot of another one is passed
        over, a damaged one is renamed; `warn` is called with a line on each.
        """
        rounds = [round for round in self.rounds() if most is None or round <= most]
        for index in reversed(range(len(rounds))):
            path, expected = self._path(rounds[index]), version(rounds[index])
            instead = f"using {self._path(rounds[index - 1]).name} instead" if index else "there is no older one"
            if not _is_intact(path):
                warn(f"snapshot {path} is damaged: {instead}")
                delete(damaged := path.with_name(path.name + _DAMAGED))
                os.replace(path, damaged)
            elif expected not in (None, self.version(rounds[index])):
                warn(f"snapshot {path} is of another run, as its version is not the ledger's: {instead}")
            else:
                return _load(rounds[index], path)
        return None

    def version(self, round: int) -> str | None:
        """Return the model's version that a snapshot names; None if it cannot be read."""
        try:
            with open(self._path(round), "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            return str(header["__metadata__"]["version"])
        except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
            return None

    def set_aside(self, after: int, folder: Path) -> None:
        """Move the snapshots of the states after more than so many rounds into another folder."""
        for round in self.rounds():
            if round > after:
                os.replace(self._path(round), make_folder(folder) / self._path(round).name)
        sync_file(self._folder)

    def rounds(self) -> list[int]:
        """Return the rounds that have a snapshot, ascending."""
        return snapshot_rounds(self._folder)

    def _path(self, round: int) -> Path:
        return self._folder / f"{round:08d}.safetensors"

    def _delete_old(self) -> None:
        oldest = self.rounds()[-self._keep :][0]
        for path in self._folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name and int(name[1]) < oldest:
                delete(path)


def snapshot_rounds(folder: Path) -> list[int]:
    """Return the rounds that have a snapshot in the folder, ascending; none if it does not exist."""
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name[1]) for name in names if name and not name[2])


def read_snapshot(folder: Path, round: int | None) -> Snapshot:
    """Return the snapshot of a round, or the newest, of a run that may be going on. Changes nothing.

    Raises ValueError if there is none, or if it is damaged.
    """
    while rounds := snapshot_rounds(folder):
        wanted = rounds[-1] if round is None else round
        if wanted not in rounds:
            break
        path = folder / f"{wanted:08d}.safetensors"
        try:
            if not _is_intact(path) and path.exists():
                raise ValueError(f"{path}: damaged; take another round of {', '.join(map(str, rounds))}")
            return _load(wanted, path)
        except FileNotFoundError:  # the run has just deleted it, in favour of a newer one
            continue
    if not rounds:
        raise ValueError(f"{folder}: holds no snapshot")
    raise ValueError(f"{folder}: no snapshot of round {round}; there are those of {', '.join(map(str, rounds))}")


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's little-endian bytes, without a copy if it is contiguous on the CPU."""
    import torch

    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def _is_intact(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(_DIGEST_AT + len(_BLANK))
        hasher = Hasher("snapshot")
        hasher.update(head[:_DIGEST_AT] + _BLANK.encode())
        hash_rest(file, hasher)
    return head[8:_DIGEST_AT] == _BEFORE_DIGEST and head[_DIGEST_AT:] == hasher.hexdigest().encode()


def _load(round: int, path: Path) -> Snapshot:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:  # memory-mapped, copied on write
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    del header["blake3"]
    return Snapshot(round, header, tensors)
