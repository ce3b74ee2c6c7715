"""A miner's error feedback on its disk: one safetensors file with a digest over its header and tensors.

The file is as large as the model and replaced each round, atomically but without waiting for the disk: it survives
the process, however that ends, and after a power cut the digest tells whether it is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.common.files import delete_leftovers, replacing
from pilot.common.safetensors_header import safetensors_header
from protocol import Digest, Hasher

if TYPE_CHECKING:
    import torch


class ResidualFile:
    """A `pilot.interfaces.ResidualStore` in the file `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, header: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write fp32 or uint8 tensors, contiguous on the CPU, without a copy of them.

        Raises OSError; then nothing is kept any more, since an older file would be taken for the newest.
        """
        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps each tensor aligned
        metadata = {"header": header, "blake3": _digest(header, tensors)}
        try:
            with replacing(self._path, sync=False) as file:
                file.write(safetensors_header([(name, t.dtype, t.shape) for name, t in ordered], metadata))
                for _, t in ordered:
                    file.write(_bytes(t))
        except OSError:
            self.drop()
            raise

    def load(self, most: int) -> tuple[str, dict[str, torch.Tensor]] | None:
        """Return header and tensors, private to the caller; None if there is no file.

        Raises ValueError if the file is damaged, or has more than `most` bytes.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path
        if not path.is_file():
            return None
        if (size := path.stat().st_size) > most:
            raise ValueError(f"{path} has {size} bytes, at most {most} for this model")
        try:
            with safe_open(path, framework="pt") as file:  # memory-mapped: copied, so that the file can go
                fields = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error})") from None
        if fields.get("blake3") != _digest(fields.get("header", ""), tensors):
            raise ValueError(f"{path} is damaged")
        return fields["header"], tensors

    def drop(self) -> None:
        delete_leftovers(self._path.parent, self._path.name)
        self._path.unlink(missing_ok=True)


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
