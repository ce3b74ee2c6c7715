"""A miner's error feedback on its disk: a safetensors file that proves itself whole.

It is replaced each round, and as large as the model. So nobody waits until it is on the disk: it outlives the process,
however that ends, and what a power cut leaves of it the digest tells. Two files take turns, since the kernel clears the
pages of a new one, which takes ten times as long as writing over an old one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.common.files import TEMPORARY
from protocol import Digest, Hasher

if TYPE_CHECKING:
    import torch


class ResidualFile:
    """The one at `path`; beside it the file before, which the next is written over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = path.with_name(path.name + TEMPORARY)
        self._before = path.with_name(path.name + ".old")

    def save(self, header: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """fp32 or bytes, contiguous on the CPU; none is copied. Raises OSError: then nothing is kept any more."""
        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps each tensor aligned
        fields: dict[str, object] = {"__metadata__": {"header": header, "blake3": _digest(header, tensors)}}
        offset = 0
        for name, t in ordered:
            dtype = "F32" if t.is_floating_point() else "U8"
            fields[name] = {"dtype": dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
            offset += t.nbytes
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        try:
            self._end_turns()
            with open(self._next, "r+b" if self._next.exists() else "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for _, t in ordered:
                    file.write(_bytes(t))
                file.truncate()
            self._take_turns()
        except OSError:
            self.drop()
            raise

    def _take_turns(self) -> None:
        """Killed between two of these, there is a whole file under the first name, or else under the next one's."""
        if self._path.exists():
            os.replace(self._path, self._before)
        self._end_turns()

    def _end_turns(self) -> None:
        """Of a process that was killed among them too: what is under the next name may be the only whole file."""
        if not self._path.exists() and self._next.is_file():
            os.replace(self._next, self._path)
        if self._path.exists() and self._before.exists():
            os.replace(self._before, self._next)

    def load(self, most: int) -> tuple[str, dict[str, torch.Tensor]] | None:
        """Header and tensors, private to the caller; None where there is no file.

        Raises ValueError for one that is damaged, or has more than `most` bytes.
        """
        from safetensors import SafetensorError, safe_open

        self._end_turns()
        path = self._path
        if not path.is_file():
            return None
        if (size := path.stat().st_size) > most:
            raise ValueError(f"{path} has {size} bytes, at most {most} for this model")
        try:
            with safe_open(path, framework="pt") as file:  # mapped, and written over later: so copied
                fields = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error})") from None
        if fields.get("blake3") != _digest(fields.get("header", ""), tensors):
            raise ValueError(f"{path} is damaged")
        return fields["header"], tensors

    def drop(self) -> None:
        for path in (self._next, self._before, self._path):
            path.unlink(missing_ok=True)


def _digest(header: str, tensors: Mapping[str, torch.Tensor]) -> Digest:
    hasher = Hasher("residual file")
    hasher.update(header.encode())
    for name in sorted(tensors):
        hasher.update(f"\n{name} {list(tensors[name].shape)}\n".encode())
        hasher.update(_bytes(tensors[name]))
    return hasher.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data
