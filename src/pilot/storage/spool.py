"""Payloads on disk, from the moment they arrive until no restart can need them.

    spool/00000012/<hotkey>.payload        streamed here by the transport; counts for nothing by itself
    spool/00000012/<hotkey>.reply.json     its appearance, after both are durable, is what makes the reply received

A restart finds here what was received of the open round, and what the rounds after its snapshot were made from.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import Buffer

from pilot.common.files import hash_rest, make_folder, replacing, sync_file
from pilot.common.limits import Limits
from pilot.interfaces import Faulted, ReceivedReply
from protocol import Count, Fault, Hasher, Hotkey, Part, Reply, Seconds, Signed

logger = logging.getLogger(__name__)

_HOTKEY: TypeAdapter[str] = TypeAdapter(Hotkey)
_REPLY = ".reply.json"
_PAYLOAD = ".payload"
_POPULATE_READ = 22  # maps all pages at once: 500 MB in 0.03 s, one by one in 0.2


class _Seal(Part):
    """The reply's file."""

    signed: Signed
    bytes_up: Count
    bytes_down: Count
    seconds: Seconds = 0.0  # as in `ReceivedReply`; earlier releases left it out


def _seal(r: ReceivedReply) -> _Seal:
    return _Seal(signed=r.signed, bytes_up=r.bytes_up, bytes_down=r.bytes_down, seconds=r.seconds)


class Spool:
    """One folder a round. Hotkeys become file names only after they matched the protocol's pattern."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder)
        self._lock = threading.Lock()
        self._sealed: dict[Path, int] | None = None  # bytes of the received replies, by their round's folder
        self._expected: dict[Path, int] = {}  # bytes that each payload will have which is not one of them yet

    def payload_path(self, round: int, hotkey: Hotkey) -> Path:
        """Where the payload of this miner's reply goes; its folder exists."""
        return make_folder(self._round(round)) / (_HOTKEY.validate_python(hotkey) + _PAYLOAD)

    def discard(self, round: int, hotkey: Hotkey) -> None:
        """What has come of a payload that will not be finished."""
        path = self.payload_path(round, hotkey)
        path.unlink(missing_ok=True)
        with self._lock:
            self._expected.pop(path, None)

    def make_room(self, path: Path, size: int, limits: Limits) -> None:
        """Before a payload of `size` bytes is written to its `payload_path`. Raises Faulted where it does not fit."""
        if self._sealed is None:
            self._look()
            assert self._sealed is not None
        with self._lock:
            expected = {**self._expected, path: size}
            sealed = sum(self._sealed.values())
        coming = missing = sum(expected.values())  # at most: to look at each file costs as much as all else here
        free = shutil.disk_usage(path.parent).free
        if free - missing < limits.reserve_bytes or 0 < limits.spool_bytes < sealed + coming:
            coming, missing = _look_closely(expected, path)
        spooled = sealed + coming - size
        free += size - missing
        if limits.spool_bytes and spooled + size > limits.spool_bytes:
            keeps = f"the spool keeps {spooled >> 20} MB of the {limits.spool_bytes >> 20} MB of --limits.spool-bytes"
            raise Faulted(
                Fault.VALIDATOR_FAILED, f"no room for {size >> 20} MB: {keeps}; raise it, or save snapshots sooner"
            )
        if free - size < limits.reserve_bytes:
            left = f"{free >> 20} MB are free on the validator's disk, {limits.reserve_bytes >> 20} MB are kept free"
            raise Faulted(
                Fault.VALIDATOR_FAILED, f"no room for {size >> 20} MB: {left}; delete old runs or other files"
            )
        with self._lock:
            self._expected[path] = size

    def _look(self) -> None:
        """What lies here from before. The books are kept from then on, for all the rounds that are open at once."""
        self._sealed = {}
        for path in self._folder.glob("*/*"):
            if path.suffix != _PAYLOAD or path.with_name(path.stem + _REPLY).exists():
                self._count(path.parent, _size(path) or 0)
            else:
                self._expected[path] = _size(path) or 0

    def _count(self, folder: Path, more: int) -> None:
        """Bytes that came, or went. Before the first look they are not counted."""
        with self._lock:
            if self._sealed is not None:
                self._sealed[folder] = self._sealed.get(folder, 0) + more

    def payload(self, round: int, hotkey: Hotkey) -> Buffer:
        """A payload as it lies in its file: a private map, so that views of it cost no memory and outlive the file."""
        with open(self.payload_path(round, hotkey), "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # which no map can be
                return b""
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if sys.platform == "linux":
            with suppress(OSError):  # before Linux 5.14
                view.madvise(_POPULATE_READ)
        return view

    def make_durable(self, *received: ReceivedReply) -> None:
        """Make replies durable, and their payloads, which lie whole in their `payload_path`. Now they are received."""
        folders: set[Path] = set()
        for r in received:
            payload = self.payload_path(r.reply.round, r.reply.hotkey)
            text = _seal(r).model_dump_json().encode()
            sync_file(payload)
            with replacing(payload.with_name(r.reply.hotkey + _REPLY), sync_folder=False) as file:
                file.write(text)
            with self._lock:
                self._expected.pop(payload, None)
            self._count(payload.parent, r.reply.payload_bytes + len(text))
            folders.add(payload.parent)
        for folder in folders:  # for payloads and replies
            sync_file(folder)

    def received(self, round: int) -> tuple[ReceivedReply, ...]:
        """The received replies of a round whose payloads are whole, in the order of the hotkeys.

        For a restart, while nothing arrives: what is damaged is deleted, and has to be sent again. A payload without
        its reply may be the beginning of one: it stays, for the transport to go on from.
        """
        folder = self._round(round)
        whole: dict[str, ReceivedReply] = {}
        for path in sorted(folder.glob("*" + _REPLY)):
            hotkey = path.name.removesuffix(_REPLY)
            try:
                whole[hotkey] = _open(round, hotkey, path)
            except ValueError as error:
                logger.warning("round %d: the reply of %s is dropped: %s", round, hotkey, str(error).splitlines()[0])
        for path in sorted(folder.glob("*")):
            beginning = path.suffix == _PAYLOAD and not path.with_name(path.stem + _REPLY).exists()
            if path.name.split(".")[0] not in whole and not beginning:
                logger.warning("round %d: %s is deleted: not part of a whole reply", round, path.name)
                self._count(folder, -(_size(path) or 0))
                path.unlink()
        return tuple(whole[hotkey] for hotkey in sorted(whole))

    def prune(self, before: int) -> None:
        """Delete the rounds before `before`."""
        for folder in self._folder.iterdir():
            if folder.name.isdecimal() and int(folder.name) < before:
                shutil.rmtree(folder)
                with self._lock:
                    (self._sealed or {}).pop(folder, None)
                    self._expected = {path: size for path, size in self._expected.items() if path.parent != folder}

    def _round(self, round: int) -> Path:
        return self._folder / f"{round:08d}"


def _look_closely(expected: Mapping[Path, int], path: Path) -> tuple[int, int]:
    """Bytes that the files will have, the one at `path` among them, and how many of those are not there yet."""
    coming = missing = 0
    for other, total in expected.items():
        there = _size(other)
        if there is not None or other == path:  # else it was of no use, and is gone
            coming += max(there or 0, total)
            missing += max(0, total - (there or 0))
    return coming, missing


def _size(path: Path) -> int | None:
    """Bytes of a file; None where it is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _open(round: int, hotkey: str, path: Path) -> ReceivedReply:
    """Raises ValueError unless the files are what `seal` left."""
    seal = _Seal.model_validate_json(path.read_bytes())
    reply = Reply.parse(seal.signed.body)
    if (reply.round, reply.hotkey) != (round, hotkey):
        raise ValueError(f"it is the reply of {reply.hotkey} to round {reply.round}")
    payload = path.with_name(hotkey + _PAYLOAD)
    if not payload.is_file() or payload.stat().st_size != reply.payload_bytes:
        raise ValueError(f"its payload is not {reply.payload_bytes} bytes long")
    hasher = Hasher("payload")
    with open(payload, "rb") as file:
        hash_rest(file, hasher)
    if hasher.hexdigest() != reply.payload_digest:
        raise ValueError("its payload does not have its digest")
    return ReceivedReply(
        reply=reply, signed=seal.signed, bytes_up=seal.bytes_up, bytes_down=seal.bytes_down, seconds=seal.seconds
    )
