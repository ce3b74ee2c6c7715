"""Give error feedback a damaged file, another model's file, and receipts that lie.

Each has one outcome: it starts over, says so in one line, and works on; or it ignores what it was given.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pilot.storage.residuals import ResidualFile
from pilot.transport.auth import sign_message
from pilot.worker.error_feedback import residual_digest
from protocol import Fault, Receipt, Reply
from tests.test_feedback import CALLER, MALLORY, SHAPES, VALIDATOR, Miner, Textbook, gradient, make_verdict, zeros

torch.set_num_threads(1)

Damage = Callable[[Path], object]


def flip(at: float) -> Damage:
    """One bit, at that fraction of the file."""

    def damage(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[int(at * (len(raw) - 1))] ^= 1
        path.write_bytes(raw)

    return damage


def cut(to: float) -> Damage:
    return lambda path: os.truncate(path, int(to * path.stat().st_size))


def grown(path: Path) -> None:
    """Sparse: its size costs nobody a disk."""
    os.truncate(path, 1 << 40)


def header_of_a_terabyte(path: Path) -> None:
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def other_header(path: Path) -> None:
    """The same tensors under another header, whose digest is of the first one."""
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'\\"decay\\": 1.0', b'\\"decay\\": 0.5'))
    assert path.read_bytes() != raw


def other_tensors(path: Path) -> None:
    """Whole, by somebody who knows the format: but not what a header says that it holds."""
    loaded = ResidualFile(path).load(1 << 30)
    assert loaded is not None
    header, tensors = loaded
    del tensors["payload"]
    ResidualFile(path).save(header, {name: t.clone() for name, t in tensors.items()})


def not_json(path: Path) -> None:
    ResidualFile(path).save("{", {"payload": torch.zeros(1, dtype=torch.uint8)})


def a_list(path: Path) -> None:
    ResidualFile(path).save(json.dumps(["key"]), {"payload": torch.zeros(1, dtype=torch.uint8)})


DAMAGES: dict[str, Damage] = {
    "nothing in it": lambda path: path.write_bytes(b""),
    "not safetensors": lambda path: path.write_bytes(b"residual" * 1000),
    "a bit of its length": flip(0),
    "a bit of its header": flip(0.05),
    "a bit of its digest": lambda path: path.write_bytes(path.read_bytes().replace(b'"blake3":"', b'"blake3":"0')),
    "a bit of the sum": flip(0.8),
    "its last bit": flip(1),
    "cut in its header": cut(0.05),
    "cut in its tensors": cut(0.7),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a terabyte": grown,
    "a header of a terabyte": header_of_a_terabyte,
    "another header": other_header,
    "no payload": other_tensors,
    "a header that is no JSON": not_json,
    "a header of another kind": a_list,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_no_residual(tmp_path: Path, damage: Damage) -> None:
    miner = Miner(tmp_path)
    miner.hear(miner.encode(miner.order(0), gradient(0)))
    damage(tmp_path / "residual.safetensors")
    miner.restart()
    reply = miner.encode(miner.order(1), gradient(1))
    assert reply.residual_before == residual_digest(zeros())
    [line] = miner.said
    assert line.startswith("error feedback starts over: ")
    assert "\n" not in line
    goes_on(miner, reply)


def goes_on(miner: Miner, reply: Reply) -> None:
    """The next one, over a restart, is what is left of `reply`."""
    miner.hear(reply)
    miner.restart()
    assert miner.encode(miner.order(reply.round + 1), gradient(9)).residual_before == reply.residual_after


@pytest.mark.parametrize("shapes", [{"w": (5, 130)}, {**SHAPES, "more": (3,)}, {**SHAPES, "w": (130, 5)}, {"w": (4,)}])
def test_a_file_of_another_model_is_no_residual(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Larger, smaller, or of the same size and another shape."""
    miner = Miner(tmp_path)
    miner.hear(miner.encode(miner.order(0), gradient(0)))
    miner.restart()
    of_this = {name: torch.ones(shape) for name, shape in shapes.items()}
    reply = miner.encode(miner.order(1), of_this)
    nothing = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert reply.residual_before == residual_digest(nothing)
    assert miner.said == ["error feedback starts over: the residual is of another model"]


def test_a_file_of_a_larger_model_is_not_even_read(tmp_path: Path) -> None:
    ResidualFile(tmp_path / "residual.safetensors").save("{}", {"sum/w": torch.zeros(4 << 20)})
    miner = Miner(tmp_path)
    miner.encode(miner.order(0), gradient(0))
    [line] = miner.said
    assert "bytes, at most" in line


def test_what_a_killed_process_wrote_half_of_is_not_taken_for_whole(tmp_path: Path) -> None:
    miner = Miner(tmp_path)
    reply = miner.encode(miner.order(0), gradient(0))
    (tmp_path / "residual.safetensors.1-2.tmp").write_bytes(b"half")
    goes_on(miner, reply)
    assert not miner.said


def test_a_full_disk_costs_the_residual_only_at_a_restart(tmp_path: Path) -> None:
    """No older file is left, which would be taken for the newest."""
    miner, textbook = Miner(tmp_path), Textbook()
    textbook.encode(gradient(0))
    textbook.settle(True)
    miner.hear(miner.encode(miner.order(0), gradient(0)))
    textbook.encode(gradient(1))
    textbook.settle(True)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, most))  # EFBIG: the disk that this process may use is full
    try:
        reply = miner.encode(miner.order(1), gradient(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not list(tmp_path.glob("residual.*"))
    assert miner.said == ["the disk is full, so error feedback is not saved: after a restart it starts over"]
    miner.hear(reply)
    third = miner.encode(miner.order(2), gradient(2))
    assert third.residual_before == residual_digest(textbook.e)
    miner.hear(third)
    miner.restart()
    assert miner.encode(miner.order(3), gradient(3)).residual_before == third.residual_after


def test_a_kill_in_the_middle_of_a_save_loses_nothing(tmp_path: Path) -> None:
    """The kernel kills the process at the 20th byte. The file before it is used, and the half one deleted."""
    miner, textbook = Miner(tmp_path), Textbook()
    for round in range(3):
        textbook.encode(gradient(round))
        textbook.settle(True)
        miner.hear(miner.encode(miner.order(round), gradient(round)))
    script = """
import resource, signal, sys
from pathlib import Path

import torch

from pilot.storage.residuals import ResidualFile

signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
ResidualFile(Path(sys.argv[1])).save("{}", {"w": torch.zeros(9)})
"""
    environment = {**os.environ, "PYTHONPATH": "src"}
    path = tmp_path / "residual.safetensors"
    killed = subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGXFSZ
    assert len(list(tmp_path.glob("residual.*"))) == 2
    miner.restart()
    reply = miner.encode(miner.order(3), gradient(3))
    assert reply.residual_before == residual_digest(textbook.e)
    assert list(tmp_path.glob("residual.*")) == [path]
    goes_on(miner, reply)
    assert not miner.said


KILLS = """
import os, random, signal, sys, time
from pathlib import Path

import torch

from pilot.storage.residuals import ResidualFile

torch.set_num_threads(1)
path, rng, last = Path(sys.argv[1]), random.Random(0), 0
ResidualFile(path).save("0", {"w": torch.full((1 << 18,), 0.0)})
for _ in range(30):
    told, tells = os.pipe()
    child = os.fork()
    if not child:
        for i in range(last + 1, last + 10_000):
            ResidualFile(path).save(str(i), {"w": torch.full((1 << 18,), float(i))})
            os.write(tells, i.to_bytes(4, "little"))
    os.read(told, 4)
    time.sleep(rng.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(tells)
    done = last + 1
    while word := os.read(told, 4):
        done = int.from_bytes(word, "little")
    os.close(told)
    header, tensors = ResidualFile(path).load(1 << 30)
    assert int(header) in (done, done + 1), (header, done)
    assert (tensors["w"] == float(header)).all()
    last = int(header)
print("whole", last)
"""


def test_a_kill_at_any_moment_leaves_the_file_or_the_one_before(tmp_path: Path) -> None:
    """Thirty of them, of a process that saves all the time."""
    environment = {**os.environ, "PYTHONPATH": "src"}
    command = [sys.executable, "-c", KILLS, str(tmp_path / "residual.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("whole ")


# --- receipts ---------------------------------------------------------------------------------------------------------


def unmoved(miner: Miner, tell: Callable[[Reply], object]) -> None:
    """What `tell` says moves nothing: the next encoding is plain, and the true receipt still counts."""
    textbook = Textbook()
    textbook.encode(gradient(0))
    reply = miner.encode(miner.order(0), gradient(0))
    tell(reply)
    assert miner.encode(miner.order(1), gradient(1)).residual_before is None
    miner.hear(reply)
    textbook.settle(True)
    assert miner.encode(miner.order(2), gradient(2)).residual_before == residual_digest(textbook.e)


def test_a_receipt_for_another_order_moves_nothing(tmp_path: Path) -> None:
    miner = Miner(tmp_path)
    unmoved(miner, lambda reply: miner.hear(reply.model_copy(update={"order": "f" * 64})))


def test_a_receipt_of_another_validator_moves_nothing(tmp_path: Path) -> None:
    """Its signature is good, and it may call: but the order was not its own."""
    miner = Miner(tmp_path)
    unmoved(miner, lambda reply: miner.hear(reply, caller=MALLORY))


def test_a_receipt_that_is_replayed_moves_nothing(tmp_path: Path) -> None:
    """That of the round before, a hundred times: it is kept once, and takes its payload from the sum once."""
    miner, textbook = Miner(tmp_path), Textbook()
    for round in range(3):
        textbook.encode(gradient(round))
        textbook.settle(True)
        reply = miner.encode(miner.order(round), gradient(round))
        signed, receipt = sign_message(VALIDATOR, make_verdict(reply)), make_verdict(reply)
        for _ in range(100):
            miner.cache.add_receipt(signed)
            miner.feedback.record_receipt(CALLER, receipt)
    assert miner.encode(miner.order(3), gradient(3)).residual_before == residual_digest(textbook.e)
    assert len((tmp_path / "receipts.jsonl").read_text().splitlines()) == 3


def test_a_flood_of_receipts_costs_little_memory_and_at_most_one_verdict(tmp_path: Path) -> None:
    miner = Miner(tmp_path)
    reply = miner.encode(miner.order(0), gradient(0))
    for i in range(10_000):
        receipt: Receipt = make_verdict(reply.model_copy(update={"order": f"{i:064x}"}), Fault.LATE)
        miner.feedback.record_receipt(MALLORY.ss58_address, receipt)
    assert len(miner.feedback._verdicts) <= 64
    miner.hear(reply)
    assert miner.encode(miner.order(1), gradient(1)).residual_before == reply.residual_after


def test_a_receipts_file_with_junk_in_it_is_read_past(tmp_path: Path) -> None:
    """As a killed process left it, or a careless hand."""
    miner = Miner(tmp_path)
    reply = miner.encode(miner.order(0), gradient(0))
    with (tmp_path / "receipts.jsonl").open("ab") as file:
        file.write(b"\xff\xfe not JSON\n{}\n" + sign_message(VALIDATOR, reply).model_dump_json().encode() + b"\n")
        file.write(b'{"kind":"receipt","si')
    miner.restart()
    miner.hear(reply)
    miner.restart()
    assert miner.encode(miner.order(1), gradient(1)).residual_before == reply.residual_after
    assert not miner.said
