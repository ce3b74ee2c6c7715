"""Disks that fill up: the round goes on without that reply, and whoever reads the message knows what to free.

The file systems are real and small, in a mount namespace that ends with its processes.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from pilot.interfaces import Faulted
from pilot.storage.miner_store import FileBlobWriter, FileMinerStore
from protocol import BlobRef, Fault, Hotkey, Receipt, Signed, Status
from tests.echo import Echo, blobs_of, dendrite, make_order, make_receipt, served
from tests.processes import Process, program, start_miner, tiny_flags
from tests.test_transport import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-e", "-c"]
BIG = bytes(3 << 20)  # more than fits on SIZE
SIZE = "2m"


def mounted(folder: Path, size: str, command: list[str]) -> list[str]:
    """A command that runs with a file system of this size at `folder`."""
    folder.mkdir(exist_ok=True)
    return [*NAMESPACE, 'mount -t tmpfs -o size="$1" none "$2"; shift 2; exec "$@"', "sh", size, str(folder), *command]


@pytest.fixture(scope="module", autouse=True)
def _namespaces(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        command = mounted(tmp_path_factory.mktemp("small"), SIZE, ["true"])
        tried = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no small file system here: {error}")
    if tried.returncode:
        pytest.skip(f"no small file system here: {tried.stderr.strip()}")


def on_a_small_disk(scene: str, folder: Path) -> None:
    """Runs a coroutine of this file in such a namespace, with the small file system as its argument."""
    code = f"import asyncio, pathlib, sys; from tests.attacks.test_disk import {scene} as scene; "
    code += "asyncio.run(scene(pathlib.Path(sys.argv[1])))"
    command = mounted(folder / "small", SIZE, [sys.executable, "-c", code, str(folder / "small")])
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=90)
    assert ended.returncode == 0, ended.stderr


async def spool_is_full(small: Path) -> None:
    said: list[str] = []
    order = make_order(BIG)
    async with served(Echo()) as port, dendrite(port, said=said) as network:
        assert await network.wait_for_peer(20)
        with pytest.raises(Faulted) as caught:
            await network.exchange(order, network.sign(order), blobs_of(order, BIG), small / "p")
        assert caught.value.fault is Fault.VALIDATOR_FAILED
        assert "the validator's disk is full; delete old runs or other files" in caught.value.reason
        assert not list(small.iterdir())  # what came of it is gone: there is room for the next
        order = make_order(round=1)
        await network.exchange(order, network.sign(order), blobs_of(order), small / "p")
    assert len(said) == 1
    assert "is not taken" in said[0]


def test_a_spool_that_fills_up_while_a_payload_arrives(tmp_path: Path) -> None:
    on_a_small_disk("spool_is_full", tmp_path)


class Keeping(Echo):
    """Keeps blobs in a real cache."""

    def __init__(self, cache: FileMinerStore) -> None:
        super().__init__()
        self.cache = cache

    def open_blob(self, caller: Hotkey, ref: BlobRef, offset: int) -> FileBlobWriter:  # type: ignore[override]
        return self.cache.store(ref)

    def accept_receipt(self, caller: Hotkey, receipt: Receipt, signed: Signed) -> Status:
        self.cache.add_receipt(signed)
        return super().accept_receipt(caller, receipt, signed)


def test_a_receipt_that_finds_no_room_is_refused_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FileMinerStore(tmp_path / "cache")
    (tmp_path / "cache" / "receipts.jsonl").symlink_to("/dev/full")
    order = make_order()

    async def main() -> None:
        async with served(miner := Keeping(cache)) as port, dendrite(port) as network:
            assert await network.wait_for_peer(20)
            signed = network.sign(make_receipt(order, network.sign(order).digest))
            assert not await network.deliver(order.hotkey, signed)
            assert not miner.receipts
            assert "/v1/receipt: this miner's disk is full" in caplog.text
            (tmp_path / "cache" / "receipts.jsonl").unlink()
            assert await network.deliver(order.hotkey, signed)
            assert len(miner.receipts) == 1

    asyncio.run(main())


async def cache_is_full(small: Path) -> None:
    order = make_order(BIG)
    async with served(miner := Keeping(FileMinerStore(small))) as port, dendrite(port) as network:
        assert await network.wait_for_peer(20)
        with pytest.raises(Faulted) as caught:
            await network.exchange(order, network.sign(order), blobs_of(order, BIG), small / "p")
        assert "507: this miner's disk is full; delete old files, in its --cache" in caught.value.reason
        assert miner.cache.blob(order.update.refs[0]) is None
        small_blob = order.data.blobs["tokens"]
        (target := miner.cache.store(small_blob)).write(blobs_of(order)[small_blob.digest])
        target.commit()  # there is room again


def test_a_miner_s_cache_that_fills_up(tmp_path: Path) -> None:
    on_a_small_disk("cache_is_full", tmp_path)


@pytest.mark.slow
def test_a_run_folder_that_fills_up(tmp_path: Path) -> None:
    """Accepted as long as there is room; then every reply is refused with its reason, and the ledger is kept whole."""
    port = free_port()
    flags = [*tiny_flags(tmp_path), "--axons", str(port), "--connect-timeout", "60", "--rounds", "1000"]
    flags += ["--limits.reserve-bytes", str(2 << 20), "--patience", "3", "--patience-seconds", "0", "--eval-every", "0"]
    flags += ["--codec.up", "fp32"]  # large payloads
    command = mounted(tmp_path / "runs", "5m", program("validator.py", *flags))
    with start_miner(tmp_path, "M1", port) as m1, Process(command, tmp_path / "validator.log") as process:
        assert process.wait() == 1
        said = process.said()
        m1.wait_for("VALIDATOR_FAILED, no room for .* free on the validator's disk")
    assert "Traceback" not in said
    assert m1.hotkey in said
    assert said.count("is not taken: no room for") == 3
    assert "delete old runs or other files" in said
    assert "stopped after --patience 3 rounds" in said
    assert "ACCEPTED" in m1.said()
