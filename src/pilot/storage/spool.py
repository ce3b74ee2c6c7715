"""Keep payloads on disk from their arrival until no restart can need them.

    spool/00000012/<hotkey>.payload        streamed here by the transport; not received yet
    spool/00000012/<hotkey>.reply.json     appears once both are durable: now the reply is received

A restart reads what the open round had received, and what the rounds after its snapshot were made of.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import Buffer

from pilot.common.files import delete, hash_rest, make_folder, replacing, sync_file
from pilot.common.limits import Limits
from pilot.interfaces import Faulted, ReceivedReply
from protocol import Count, Digest, Fault, Hasher, Hotkey, Part, Reply, Seconds, Signed

logger = logging.getLogger(__name__)

_HOTKEY: TypeAdapter[str] = TypeAdapter(Hotkey)
_REPLY = ".reply.json"
_PAYLOAD = ".payload"
_POPULATE_READ = 22  # MADV_POPULATE_READ maps all pages at once: 500 MB in 0.03 s instead of 0.2 s


class _ReplyFile(Part):
    """The contents of a `.reply.json`."""

    signed: Signed
    bytes_up: Count
    bytes_down: Count
    seconds: Seconds = 0.0  # as in `ReceivedReply`; earlier releases left it out


class Spool:
    """One folder per round. A hotkey is used as a file name only if it matches the protocol's pattern."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder)
        self._lock = threading.Lock()
        self._received: dict[Path, int] | None = None  # bytes by round folder; None: not measured yet
        self._expected: dict[Path, int] = {}  # final bytes of each payload that is not received yet

    def payload_path(self, round: int, hotkey: Hotkey) -> Path:
        """Return the file for the payload of this miner's reply; its folder exists."""
        return make_folder(self._round(round)) / (_HOTKEY.validate_python(hotkey) + _PAYLOAD)

    def discard(self, round: int, hotkey: Hotkey) -> None:
        """Delete what has arrived of a payload that will not be completed."""
        path = self.payload_path(round, hotkey)
        path.unlink(missing_ok=True)
        with self._lock:
            self._expected.pop(path, None)

    def reserve(self, path: Path, size: int, limits: Limits) -> None:
        """Reserve space for a payload of `size` bytes at its `payload_path`. Raises Faulted if it does not fit."""
        if self._received is None:
            self._measure()
            assert self._received is not None
        with self._lock:
            expected = {**self._expected, path: size}
            received = sum(self._received.values())
        coming = missing = sum(expected.values())  # an upper bound: measuring each file doubles the cost of this
        free = shutil.disk_usage(path.parent).free
        if free - missing < limits.reserve_bytes or 0 < limits.spool_bytes < received + coming:
            coming, missing = _measure_expected(expected, path)
        spooled = received + coming - size
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

    def _measure(self) -> None:
        """Measure what an earlier process left; from here on the bytes are counted as they come and go."""
        self._received = {}
        for path in self._folder.glob("*/*"):
            if path.suffix != _PAYLOAD or path.with_name(path.stem + _REPLY).exists():
                self._count(path.parent, _size(path) or 0)
            else:
                self._expected[path] = _size(path) or 0

    def _count(self, folder: Path, more: int) -> None:
        """Add to a round's received bytes, once they have been measured."""
        with self._lock:
            if self._received is not None:
                self._received[folder] = self._received.get(folder, 0) + more

    def payload(self, round: int, hotkey: Hotkey) -> Buffer:
        """Map a payload's file privately: views of it cost no memory and outlive the file."""
        with open(self.payload_path(round, hotkey), "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
                return b""
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if sys.platform == "linux":
            with suppress(OSError):  # before Linux 5.14
                view.madvise(_POPULATE_READ)
        return view

    def make_durable(self, *received: ReceivedReply) -> None:
        """Make replies durable, and their payloads in their `payload_path`. From then on they count as received."""
        folders: set[Path] = set()
        for r in received:
            payload = self.payload_path(r.reply.round, r.reply.hotkey)
            contents = _ReplyFile(signed=r.signed, bytes_up=r.bytes_up, bytes_down=r.bytes_down, seconds=r.seconds)
            text = contents.model_dump_json().encode()
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
        """Return the received replies of a round whose payloads are intact, sorted by hotkey.

        Call it at a restart, before anything arrives: damaged files are deleted, and have to be sent again. A payload
        without a reply stays: it may be incomplete, and the transport resumes it.
        """
        folder = self._round(round)
        intact: dict[str, ReceivedReply] = {}
        for path in sorted(folder.glob("*" + _REPLY)):
            hotkey = path.name.removesuffix(_REPLY)
            try:
                intact[hotkey] = _open(round, hotkey, path)
            except ValueError as error:
                logger.warning("round %d: dropped the reply of %s: %s", round, hotkey, str(error).splitlines()[0])
        for path in sorted(folder.glob("*")):
            incomplete = path.suffix == _PAYLOAD and path.is_file() and not path.with_name(path.stem + _REPLY).exists()
            if path.name.split(".")[0] not in intact and not incomplete:
                logger.warning("round %d: deleted %s, which belongs to no intact reply", round, path.name)
                self._count(folder, -(_size(path) or 0))
                delete(path)
        return tuple(intact[hotkey] for hotkey in sorted(intact))

    def reply(self, round: int, hotkey: Hotkey, order: Digest) -> ReceivedReply:
        """Return the reply to an order. Raises ValueError, which names the file, if it is not intact any more."""
        path = self._round(round) / (hotkey + _REPLY)
        received = _open(round, hotkey, path)
        if received.reply.order != order:
            raise ValueError(f"{path} answers another order")
        return received

    def set_aside(self, since: int, folder: Path) -> None:
        """Move the rounds from `since` on into another folder."""
        for path in sorted(self._folder.iterdir()):
            if path.name.isdecimal() and int(path.name) >= since:
                os.replace(path, make_folder(folder) / path.name)
        sync_file(self._folder)

    def reply_after(self, round: int) -> Path | None:
        """Return a reply's file of a round after this one, if there is one."""
        replies = (path for path in self._folder.glob(f"*/*{_REPLY}") if path.parent.name.isdecimal())
        return max((path for path in replies if int(path.parent.name) > round), default=None)

    def prune(self, before: int) -> None:
        """Delete the rounds before `before`."""
        self._delete(lambda round: round < before)

    def delete_after(self, round: int) -> None:
        """Delete the rounds after this one, whose orders are void."""
        self._delete(lambda other: other > round)

    def _delete(self, unwanted: Callable[[int], bool]) -> None:
        for folder in self._folder.iterdir():
            if folder.name.isdecimal() and unwanted(int(folder.name)):
                delete(folder)
                with self._lock:
                    (self._received or {}).pop(folder, None)
                    self._expected = {path: size for path, size in self._expected.items() if path.parent != folder}

    def _round(self, round: int) -> Path:
        return self._folder / f"{round:08d}"


def _measure_expected(expected: Mapping[Path, int], path: Path) -> tuple[int, int]:
    """Return the final bytes of the files, including the one at `path`, and how many of those are missing yet."""
    coming = missing = 0
    for other, total in expected.items():
        there = _size(other)
        if there is not None or other == path:  # else it was discarded
            coming += max(there or 0, total)
            missing += max(0, total - (there or 0))
    return coming, missing


def _size(path: Path) -> int | None:
    """Return the bytes of a file; None if it is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _open(round: int, hotkey: str, path: Path) -> ReceivedReply:
    """Read a reply whose files are as `make_durable` left them. Raises ValueError, which names the file, for others."""
    if not path.is_file():
        raise ValueError(f"{path} is gone")
    try:
        contents = _ReplyFile.model_validate_json(path.read_bytes())
        reply = Reply.parse(contents.signed.body)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]})") from None
    if (reply.round, reply.hotkey) != (round, hotkey):
        raise ValueError(f"{path} is the reply of {reply.hotkey} to round {reply.round}")
    payload = path.with_name(hotkey + _PAYLOAD)
    if not payload.is_file():
        raise ValueError(f"{payload} is gone")
    if (size := payload.stat().st_size) != reply.payload_bytes:
        raise ValueError(f"{payload} has {size} bytes instead of {reply.payload_bytes}")
    hasher = Hasher("payload")
    with open(payload, "rb") as file:
        hash_rest(file, hasher)
    if hasher.hexdigest() != reply.payload_digest:
        raise ValueError(f"{payload} is damaged: it has another digest than its reply says")
    return ReceivedReply(
        reply=reply,
        signed=contents.signed,
        bytes_up=contents.bytes_up,
        bytes_down=contents.bytes_down,
        seconds=contents.seconds,
    )
