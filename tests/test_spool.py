"""The spool, and the miner's cache: bytes count only when they are whole."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from records_samples import HOTKEYS, VALIDATOR, payload, receipt, received

from pilot.common.limits import Limits
from pilot.interfaces import Faulted, ReceivedReply
from pilot.storage.miner_store import FileMinerStore
from pilot.storage.spool import Spool
from protocol import BlobRef, Fault, ProtocolError, Signed, digest

A, B, C = HOTKEYS


def deliver(spool: Spool, round: int, hotkey: str) -> ReceivedReply:
    data = payload(round, hotkey)
    spool.payload_path(round, hotkey).write_bytes(data)
    reply = received(round, hotkey, data)
    spool.make_durable(reply)
    return reply


def test_sealed_replies_come_back_in_the_order_of_the_hotkeys(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    expected = [deliver(spool, 4, hotkey) for hotkey in (C, A, B)]
    again = Spool(tmp_path / "spool")
    assert again.received(4) == (expected[1], expected[2], expected[0])
    assert bytes(memoryview(again.payload(4, B))) == payload(4, B)
    assert again.received(5) == ()


def test_a_reply_sealed_by_an_earlier_release_has_no_seconds(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    reply = deliver(spool, 0, A)
    assert spool.received(0)[0].seconds == reply.seconds > 0
    path = spool.payload_path(0, A).with_name(A + ".reply.json")
    fields = json.loads(path.read_text())
    del fields["seconds"]
    path.write_text(json.dumps(fields))
    assert spool.received(0) == (replace(reply, seconds=0.0),)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated payload": (".payload", truncate),
    "flipped payload": (".payload", flip),
    "missing payload": (".payload", Path.unlink),
    "truncated reply": (".reply.json", truncate),
    "empty reply": (".reply.json", lambda path: write(path, b"")),
    "another's reply": (".reply.json", lambda path: write(path, path.with_name(B + ".reply.json").read_bytes())),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    spool = Spool(tmp_path)
    deliver(spool, 0, A)
    whole = deliver(spool, 0, B)
    suffix, harm = DAMAGE[damage]
    harm(spool.payload_path(0, A).with_name(A + suffix))
    with caplog.at_level(logging.WARNING):
        assert spool.received(0) == (whole,)
    assert A in caplog.text
    assert sorted(path.name for path in (tmp_path / "00000000").iterdir()) == [B + ".payload", B + ".reply.json"]
    again = deliver(spool, 0, A)  # and can be received anew
    assert spool.received(0) == (again, whole)


def test_the_beginning_of_a_payload_stays_and_is_not_received(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    beginning = spool.payload_path(0, A)
    beginning.write_bytes(b"the first bytes")
    assert spool.received(0) == ()
    assert beginning.read_bytes() == b"the first bytes"


def test_room_is_counted_while_payloads_arrive(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for hotkey in (A, B):
        deliver(spool, 0, hotkey)
    before = sum(path.stat().st_size for path in (tmp_path / "00000000").iterdir())
    limits = replace(Limits(), spool_bytes=before + 1000, reserve_bytes=0)
    here, there = spool.payload_path(1, A), spool.payload_path(1, B)
    spool.reserve(here, 600, limits)
    here.write_bytes(b"on its way")
    with pytest.raises(Faulted, match=r"--limits.spool-bytes; raise it") as faulted:
        spool.reserve(there, 600, limits)
    assert faulted.value.fault is Fault.VALIDATOR_FAILED
    here.unlink()  # it was of no use
    spool.reserve(there, 600, limits)
    there.write_bytes(bytes(600))
    spool.prune(1)
    spool.reserve(here, 400 + before, limits)


def test_room_is_counted_over_all_the_rounds_that_are_open(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    limits = replace(Limits(), spool_bytes=10_000, reserve_bytes=0)
    for round in range(3):  # 3 of 3,000 bytes are on their way at once
        path = spool.payload_path(round, A)
        spool.reserve(path, 3000, limits)
        path.touch()
    for round in range(3):
        with pytest.raises(Faulted, match=r"--limits\.spool-bytes"):
            spool.reserve(spool.payload_path(round, B), 3000, limits)
    deliver(spool, 0, A)
    again = Spool(tmp_path)
    again.reserve(again.payload_path(1, A), 3000, limits)  # goes on from its beginning
    for books in (spool, again):
        with pytest.raises(Faulted):
            books.reserve(books.payload_path(1, B), 6000, limits)
    spool.prune(3)
    spool.reserve(spool.payload_path(3, A), 10_000, limits)


def test_a_damaged_reply_takes_no_room(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    limits = replace(Limits(), spool_bytes=6000, reserve_bytes=0)
    path = spool.payload_path(0, A)
    spool.reserve(path, 3000, limits)
    deliver(spool, 0, A)
    flip(path)
    assert spool.received(0) == ()
    spool.reserve(path, 6000, limits)


def test_the_reserve_on_the_disk_is_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    limits = replace(Limits(), reserve_bytes=1 << 60)
    with pytest.raises(Faulted, match="delete old runs"):
        spool.reserve(spool.payload_path(0, A), 1, limits)


def test_an_empty_payload_is_bytes_too(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.payload_path(0, A).touch()
    spool.make_durable(received(0, A, b""))
    assert len(spool.received(0)) == 1
    assert len(memoryview(spool.payload(0, A))) == 0


def test_a_payload_outlives_its_file_and_is_the_readers_own(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    deliver(spool, 0, A)
    view = memoryview(spool.payload(0, A))
    view[0] = 0
    assert len(spool.received(0)) == 1
    spool.prune(1)
    assert bytes(view[1:]) == payload(0, A)[1:]


def test_prune(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for round in range(5):
        deliver(spool, round, A)
    spool.prune(3)
    assert [len(spool.received(round)) for round in range(5)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("hotkey", ["", "../../etc/passwd", A + "/..", A[:-1] + "/", A + "\n", "5" + "0" * 47])
def test_only_a_hotkey_names_a_file(tmp_path: Path, hotkey: str) -> None:
    with pytest.raises(ValueError, match="String should match pattern"):
        Spool(tmp_path).payload_path(0, hotkey)


# --- the miner's cache ------------------------------------------------------------------------------------------------

DATA = b"the state of a model " * 1000
REF = BlobRef(kind="state", digest=digest("state", DATA), bytes=len(DATA))


def blobs(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "blobs").glob("*/*"))


def test_a_blob_is_there_after_commit_only(tmp_path: Path) -> None:
    cache = FileMinerStore(tmp_path)
    writer = cache.store(REF)
    for start in range(0, len(DATA), 4096):
        writer.write(memoryview(DATA)[start : start + 4096])
    assert cache.blob(REF) is None
    writer.commit()
    path = FileMinerStore(tmp_path).blob(REF)
    assert path is not None
    assert path.read_bytes() == DATA


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (DATA[:-1], "not the"),
        (DATA[:-1] + b"?", "not the"),
        (DATA + b"?", "more than"),
        (b"", "not the"),
    ],
    ids=["short", "wrong", "long", "empty"],
)
def test_a_blob_that_is_not_the_one_announced_leaves_nothing(tmp_path: Path, data: bytes, reason: str) -> None:
    cache = FileMinerStore(tmp_path)
    writer = cache.store(REF)

    def receive() -> None:
        writer.write(data)
        writer.commit()

    with pytest.raises(ProtocolError, match=reason):
        receive()
    assert writer.held == 0
    assert cache.blob(REF) is None
    writer.write(DATA)  # the sender may try again
    writer.commit()
    assert cache.blob(REF) is not None


def test_a_blob_given_up_leaves_nothing(tmp_path: Path) -> None:
    writer = FileMinerStore(tmp_path).store(REF)
    writer.write(DATA[:-1])
    assert writer.held == len(DATA) - 1
    writer.abort()
    writer.abort()  # may be said twice
    assert blobs(tmp_path) == []


def test_a_blobs_kind_is_part_of_its_name(tmp_path: Path) -> None:
    writer = FileMinerStore(tmp_path).store(BlobRef(kind="data", digest=REF.digest, bytes=REF.bytes))
    writer.write(DATA)
    with pytest.raises(ProtocolError, match="not the"):
        writer.commit()


def test_a_truncated_blob_is_dropped(tmp_path: Path) -> None:
    cache = FileMinerStore(tmp_path)
    writer = cache.store(REF)
    writer.write(DATA)
    writer.commit()
    truncate(tmp_path / "blobs" / "state" / REF.digest)
    assert cache.blob(REF) is None
    assert blobs(tmp_path) == []


def test_leftovers_of_a_killed_miner_go_and_live_writers_stay(tmp_path: Path) -> None:
    live = FileMinerStore(tmp_path).store(REF)
    live.write(DATA)
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from protocol import BlobRef; from pilot.storage.miner_store import FileMinerStore\n"
        "store = FileMinerStore(Path(sys.argv[1]))\n"
        "writer = store.store(BlobRef.model_validate_json(sys.argv[2])); writer.write(b'half')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), REF.model_dump_json()], env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(blobs(tmp_path)) == 2
    cache = FileMinerStore(tmp_path)
    assert len(blobs(tmp_path)) == 1
    live.commit()
    assert cache.blob(REF) is not None


def test_pin(tmp_path: Path) -> None:
    cache = FileMinerStore(tmp_path)
    assert cache.pin() is None
    cache.set_pin(VALIDATOR)
    assert FileMinerStore(tmp_path).pin() == VALIDATOR
    cache.unpin()
    cache.unpin()
    assert cache.pin() is None


def test_a_damaged_pin_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "validator").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="--unpin"):
        FileMinerStore(tmp_path).pin()


def test_receipts_are_kept(tmp_path: Path) -> None:
    cache = FileMinerStore(tmp_path)
    receipts = [receipt(round, A) for round in range(3)]
    for signed in receipts:
        cache.add_receipt(signed)
    assert [Signed.parse(line) for line in (tmp_path / "receipts.jsonl").read_text().splitlines()] == receipts
