"""Snapshots of the validator's state, each one safetensors file that proves itself whole.

    snapshots/00000040.safetensors     the state with rounds 0 to 39 applied

The file's own digest lies at a fixed place in its header (computed with zeros there), so a snapshot is one file,
appears by one rename, and any safetensors reader opens it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.common.files import delete_leftovers, hash_rest, make_folder, replacing
from protocol import Hasher

if TYPE_CHECKING:
    import torch

_BEFORE_DIGEST = b'{"__metadata__":{"blake3":"'  # every snapshot's header begins so
_DIGEST_AT = 8 + len(_BEFORE_DIGEST)
_BLANK = "0" * 64
_DAMAGED = ".damaged"
_NAME = re.compile(r"(\d{8,})\.safetensors(\.damaged)?")
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Snapshot:
    """The state with `round` committed rounds applied. Tensors are on the CPU, private to the caller."""

    round: int
    header: dict[str, str]
    tensors: dict[str, torch.Tensor]


class Snapshots:
    """The last `keep` snapshots of a run."""

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 2:
            raise ValueError(f"{keep} snapshots kept: at least 2, so that a damaged one has one before it")
        self._folder = make_folder(folder)
        self._keep = keep
        delete_leftovers(folder)

    def save(self, round: int, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Path:
        """Write the state with `round` rounds applied, then delete the snapshots that are no longer kept.

        Tensors are of any shape and device, and must not change until this returns. Beyond them it takes the memory of
        one tensor, where that is not contiguous on the CPU. `header` must not use the key `blake3`.
        """
        path = self._path(round)
        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps each tensor aligned
        head = _header(header, ordered)
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

    def newest(self, warn: Callable[[str], None]) -> Snapshot | None:
        """The newest whole snapshot. A damaged one is set aside, and `warn` gets one line that names it."""
        rounds = self.rounds()
        for index in reversed(range(len(rounds))):
            path = self._path(rounds[index])
            if _is_whole(path):
                return _load(rounds[index], path)
            instead = f"{self._path(rounds[index - 1]).name} is used instead" if index else "there is none before it"
            warn(f"snapshot {path} is damaged: {instead}")
            os.replace(path, path.with_name(path.name + _DAMAGED))
        return None

    def rounds(self) -> list[int]:
        """The rounds that there is a snapshot of, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(name[1]) for name in names if name and not name[2])

    def _path(self, round: int) -> Path:
        return self._folder / f"{round:08d}.safetensors"

    def _delete_old(self) -> None:
        oldest = self.rounds()[-self._keep :][0]
        for path in self._folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name and int(name[1]) < oldest:
                path.unlink()


def _header(header: Mapping[str, str], tensors: list[tuple[str, torch.Tensor]]) -> bytes:
    """safetensors' length and JSON, with zeros for the digest."""
    assert "blake3" not in header
    fields: dict[str, object] = {"__metadata__": {"blake3": _BLANK, **header}}
    offset = 0
    for name, tensor in tensors:
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        fields[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Its little-endian buffer; without a copy where it is contiguous on the CPU."""
    import torch

    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def _is_whole(path: Path) -> bool:
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
