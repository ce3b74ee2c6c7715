"""Checkpoints: folders that are written atomically and verified when read.

    <folder>/step_000123/meta.json                the caller's values, and each file's size and digest
                        /model.safetensors        parameters by name, fp32
                        /optimizer.safetensors    its state by parameter name; optional
                        /tokenizer.json           and other files of the caller

A checkpoint is written under a temporary name, synced to disk and renamed, so a step's folder is always complete.
`load` detects later changes. One process at a time writes to a folder; many may read it. Anything wrong raises a
ValueError of one line that names the file.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nanochat.config import GPTConfig
from pilot.common.files import hash_rest, make_folder, sync_file
from protocol import Digest, Hasher, digest

if TYPE_CHECKING:
    import torch

    from nanochat.gpt import GPT

META = "meta.json"
CONFIG = "config"  # the metadata's key of the GPTConfig, a dictionary
TOKENIZER = "tokenizer"  # and that of the tokenizer's digest
_DOMAIN = "checkpoint"
_SUFFIX = ".safetensors"
_STEP = re.compile(r"step_(\d{6,})")
_TEMPORARY = re.compile(r"\.step_\d{6,}\.[0-9a-f]{8}\.tmp")
_REPLACED = re.compile(r"\.(step_\d{6,})\.old")
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified."""

    path: Path
    step: int
    meta: dict[str, Any]  # the caller's
    files: frozenset[str]  # names of all files, such as "model.safetensors"

    def tensors(self, part: str = "model") -> dict[str, torch.Tensor]:
        """Return the tensors of "model" or "optimizer" by name, on the CPU, read on first use.

        Raises ValueError if the checkpoint has none.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._existing(part + _SUFFIX)
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path}: no tensors can be read: {error}") from None

    def read(self, name: str) -> bytes:
        """Return a file that was given to `save`. Raises ValueError if there is none of that name."""
        return self._existing(name).read_bytes()

    @cached_property
    def config(self) -> GPTConfig:
        """Return the model's shape. Raises ValueError if the metadata has none."""
        found = self.meta.get(CONFIG)
        names = {field.name for field in fields(GPTConfig)}
        if not isinstance(found, dict) or found.keys() != names:
            raise ValueError(
                f"{self.path / META}: {CONFIG} is not a model's shape: it must have {', '.join(sorted(names))}"
            )
        try:
            return GPTConfig(**found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path / META}: {CONFIG}: {error}") from None

    def _existing(self, name: str) -> Path:
        if name not in self.files:
            raise ValueError(f"{self.path}: this checkpoint has no {name}")
        return self.path / name


# --- writing ----------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    meta: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    keep: int = 0,
) -> Path:
    """Write `tensors` ({"model": …, "optimizer": …}), `meta` (plain JSON) and `files` as the checkpoint of `step`.

    Replaces a checkpoint of the same step. Keeps the last `keep` checkpoints up to `step` (0: all), and any later ones,
    which a run has that was resumed from an older step. Tensors may be on any device; one at a time is copied.
    """
    make_folder(folder)
    _clear(folder)
    final = folder / f"step_{step:06d}"
    with _temporary(folder, final.name) as temporary:
        digests: dict[str, dict[str, int | str]] = {}
        for part, named in tensors.items():
            with _writing(temporary, part + _SUFFIX, digests) as file:
                write_tensors(file, named)
        for name, content in (files or {}).items():
            with _writing(temporary, name, digests) as file:
                file.write(content)
        body = json.loads(json.dumps({"files": digests, "meta": dict(meta), "step": step}, allow_nan=False))
        text = json.dumps({"blake3": _body_digest(body), **body}, indent=2, ensure_ascii=False)
        with _writing(temporary, META, {}) as file:
            file.write(text.encode())
        sync_file(temporary)
        _take_name(temporary, final)
    if keep > 0:
        for old in [s for s in steps(folder) if s <= step][:-keep]:
            _delete(folder / f"step_{old:06d}")
    return final


def clear(folder: Path) -> None:
    """Delete every checkpoint in the folder."""
    for step in steps(folder):
        _delete(folder / f"step_{step:06d}")


def link_newest(folder: Path) -> None:
    """Make the folder a checkpoint itself, by links to the files of its newest step."""
    step = _path(folder, steps(folder)[-1])
    for file in step.iterdir():
        link = folder / f".{file.name}.{secrets.token_hex(4)}"
        link.symlink_to(Path(step.name) / file.name)
        os.replace(link, folder / file.name)


class _Writer:
    """Hash and count a file as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hasher = Hasher(_DOMAIN)
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)
        self._bytes += self._file.write(data)

    def summary(self) -> dict[str, int | str]:
        return {"bytes": self._bytes, "blake3": self._hasher.hexdigest()}


@contextmanager
def _writing(folder: Path, name: str, digests: dict[str, dict[str, int | str]]) -> Iterator[_Writer]:
    """Write a new file, synced when the block ends; its size and digest are then in `digests`."""
    if Path(name).name != name:
        raise ValueError(f"{name}: not a plain file name")
    with (folder / name).open("xb") as file:
        writer = _Writer(file)
        yield writer
        file.flush()
        os.fsync(file.fileno())
    digests[name] = writer.summary()


def write_tensors(file: _Writer | BinaryIO, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, one tensor in memory at a time; safetensors' own writer copies all of them."""
    import torch

    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # keeps each aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    offset = 0
    for name, tensor in ordered:
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)


def _body_digest(body: Mapping[str, Any]) -> Digest:
    """Hash the metadata's canonical JSON, so its layout in the file does not matter."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return digest(_DOMAIN, text.encode())


@contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """Make a folder to write in, locked while its writer lives. Afterwards no folder has this name."""
    temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        with _locked(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock the folder; False if another process holds it. The kernel releases the lock when its holder ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # locked, or a file system without locks, where leftovers stay
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _take_name(temporary: Path, final: Path) -> None:
    """Rename the folder to its final name. An old one is first moved aside, where readers find it in the meantime."""
    aside = final.with_name(f".{final.name}.old")
    if final.exists():
        os.replace(final, aside)
    os.replace(temporary, final)
    sync_file(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _delete(path: Path) -> None:
    """Delete a folder, atomically as far as readers can see."""
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what killed writers left."""
    for path in list(folder.iterdir()):
        if (replaced := _REPLACED.fullmatch(path.name)) and not (folder / replaced[1]).exists():
            os.replace(path, folder / replaced[1])
        elif replaced:
            shutil.rmtree(path, ignore_errors=True)
        elif _TEMPORARY.fullmatch(path.name):
            with suppress(FileNotFoundError), _locked(path) as dead:
                if dead:
                    shutil.rmtree(path, ignore_errors=True)


# --- reading ----------------------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, ascending; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    names = (_STEP.fullmatch(_plain(path.name)) for path in folder.iterdir())
    return sorted({int(name[1]) for name in names if name})


def load(folder: Path, step: int | None = None, *, parts: Collection[str] | None = None) -> Checkpoint:
    """Return the checkpoint of `step`, or the newest one; `folder` may also be a checkpoint itself.

    Verifies every file. With `parts`, such as {"model"}, only these tensors are verified. Raises ValueError if there is
    no checkpoint, or if a file is missing, truncated or changed.
    """
    there = steps(folder)
    if not there and ((folder / META).is_file() or _STEP.fullmatch(folder.name)):
        return _load_one(folder, step, parts)
    if not there:
        raise ValueError(f"{folder}: no checkpoint here" + ("" if folder.is_dir() else ": no such folder"))
    if step is None and len(there) > 1:
        try:
            return _verified(_path(folder, there[-1]), parts)
        except ValueError as error:
            raise ValueError(f"{error}; delete it to go on from the one before, of step {there[-2]}") from None
    if step is not None and step not in there:
        raise ValueError(f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, there))}")
    return _verified(_path(folder, there[-1] if step is None else step), parts)


def _load_one(path: Path, step: int | None, parts: Collection[str] | None) -> Checkpoint:
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint")
    checkpoint = _verified(path, parts)
    if step not in (None, checkpoint.step):
        raise ValueError(f"{path}: the checkpoint of step {checkpoint.step}, not of {step}")
    return checkpoint


def _verified(path: Path, parts: Collection[str] | None) -> Checkpoint:
    body = _read_meta(path / META)
    files: dict[str, dict[str, Any]] = body["files"]
    wanted = {
        name for name in files if parts is None or name.removesuffix(_SUFFIX) in parts or not name.endswith(_SUFFIX)
    }
    for name in sorted(wanted):
        file, size = path / name, files[name]["bytes"]
        if not file.is_file():
            raise ValueError(f"{file}: missing from the checkpoint")
        if (there := file.stat().st_size) != size:
            raise ValueError(f"{file}: {'cut short' if there < size else 'too long'}: {there:,} bytes of {size:,}")
        if _file_digest(file) != files[name]["blake3"]:
            raise ValueError(f"{file}: changed since it was written: its digest is not that in {META}")
    return Checkpoint(path, body["step"], body["meta"], frozenset(wanted))


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing from the checkpoint") from None
    except ValueError:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: cut short or changed: not JSON") from None
    if not isinstance(body, dict) or body.pop("blake3", None) != _body_digest(body):
        raise ValueError(f"{path}: changed since it was written: its digest is not that of its content")
    return body


def _file_digest(file: Path) -> Digest:
    hasher = Hasher(_DOMAIN)
    with file.open("rb") as opened:
        hash_rest(opened, hasher)
    return hasher.hexdigest()


def _path(folder: Path, step: int) -> Path:
    path = folder / f"step_{step:06d}"
    aside = folder / f".{path.name}.old"  # exists between a writer's two renames
    return path if path.exists() or not aside.exists() else aside


def _plain(name: str) -> str:
    replaced = _REPLACED.fullmatch(name)
    return replaced[1] if replaced else name


# --- models -----------------------------------------------------------------------------------------------------------


def load_model(checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> GPT:
    """Return the model with the checkpoint's weights, its activations in `dtype`.

    Raises ValueError if the weights do not have the shape that the checkpoint states.
    """
    import torch

    from nanochat.gpt import GPT

    tensors = checkpoint.tensors("model")
    expected = GPT(checkpoint.config, dtype, device="meta").state_dict()
    where = checkpoint.path / f"model{_SUFFIX}"
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{where}: {name} is missing, which a model of the checkpoint's shape has")
        if name not in expected:
            raise ValueError(f"{where}: {name} is not of a model of the checkpoint's shape")
        if tensors[name].shape != expected[name].shape:
            shapes = tuple(tensors[name].shape), tuple(expected[name].shape)
            raise ValueError(f"{where}: {name} has the shape {shapes[0]}, the checkpoint's model has {shapes[1]}")
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{where}: {name} holds NaN or infinity: its run diverged; name another step")
    model = GPT(checkpoint.config, dtype, device=device)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            target.copy_(tensors[name])
    return model


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Digest) -> None:
    """Raise ValueError unless the checkpoint's model was trained with the tokenizer of this digest."""
    expected = checkpoint.meta.get(TOKENIZER)
    if expected != tokenizer:
        raise ValueError(f"{checkpoint.path}: trained with the tokenizer {expected}, not with {tokenizer}")
