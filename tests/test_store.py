"""Test a run's folder: after a SIGKILL at any moment all that was acknowledged is there, and nothing is torn."""

from __future__ import annotations

import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from io import FileIO
from itertools import count
from pathlib import Path

import pytest
import torch
from records_samples import HOTKEYS, orders, payload, receipt, received, record
from small_disk import mounted, skip_without

from pilot.interfaces import RoundRecord
from pilot.storage.run_store import DiskFull, RunStore
from protocol import Fault, Receipt

META = {"task": '"gpt2"', "seed": "1"}
SNAPSHOT_EVERY = 3
KILLS = 30
FRESH_EVERY = 5  # kills between new folders, so that some hit the creation
A, B, C = HOTKEYS


def state(round: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((4_000_000,), float(round)), "step": torch.tensor(float(round))}


def play_round(store: RunStore, round: int) -> None:
    """C is late in every round; A and B are accepted."""
    store.open_round(round, orders(round))
    for hotkey in (A, B):
        data = payload(round, hotkey)
        store.payload_path(round, hotkey).write_bytes(data)
        store.make_durable(received(round, hotkey, data))
    store.commit(record(round, (receipt(round, A), receipt(round, B), receipt(round, C, Fault.LATE))))


def play(folder: Path, acknowledge: int) -> None:
    """Play rounds forever, each acknowledged on a pipe once its commit has returned."""
    store = RunStore.open(folder, 2) if is_created(folder) else RunStore.create(folder, META, 2)
    head = store.head()
    for round in count(head.round + 1 if head else 0):
        if round % SNAPSHOT_EVERY == 0:
            store.save_snapshot(round, {"round": str(round)}, state(round))
        play_round(store, round)
        os.write(acknowledge, f"{round}\n".encode())


def is_created(folder: Path) -> bool:
    """Exactly one of `open` and `create` works, whatever a kill left."""
    try:
        RunStore.open(folder, 2).close()
    except ValueError as error:
        if "start it without --resume" not in str(error):
            raise
        return False
    with pytest.raises(ValueError, match="--resume"):
        RunStore.create(folder, META, 2)
    return True


# --- kills ------------------------------------------------------------------------------------------------------------


def serve_children(ready: int) -> None:
    """A process that has imported everything, and forks a player for each folder it reads: pid out, then its death."""
    os.write(ready, b"ready\n")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            play(Path(line.rstrip("\n")), ready)
        os.write(ready, f"pid {pid}\n".encode())
        os.waitpid(pid, 0)
        os.write(ready, b"dead\n")


class Players:
    """The other end of `serve_children`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin
        assert process.stdout
        self.input, self.output = process.stdin, process.stdout
        assert self.output.readline() == "ready\n"

    def play_and_kill(self, folder: Path, rounds: int, after_s: float) -> int:
        """Kill a player that long after it committed so many rounds; the last round it acknowledged, -1 for none."""
        self.input.write(f"{folder}\n")
        self.input.flush()
        lines = iter(self.output.readline, "dead\n")
        pid, acknowledged = 0, []
        for line in lines:
            if line.startswith("pid"):
                pid = int(line.split()[1])
            else:
                acknowledged.append(int(line))
            if pid and len(acknowledged) >= rounds:
                break
        select.select([], [], [], after_s)
        os.kill(pid, signal.SIGKILL)
        acknowledged += [int(line) for line in lines]
        return max(acknowledged, default=-1)


@contextmanager
def players() -> Iterator[Players]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Players(process)


def test_nothing_is_lost_to_a_kill_at_any_moment(tmp_path: Path) -> None:
    rng = random.Random(0)
    committed = 0
    with players() as server:
        for kill in range(KILLS):
            folder = tmp_path / f"run{kill // FRESH_EVERY}"
            fresh = kill % FRESH_EVERY == 0
            after_s = rng.uniform(0, 0.02 if fresh else 0.1)
            last = server.play_and_kill(folder, 0 if fresh else rng.randrange(3), after_s)
            if is_created(folder):
                committed = max(committed, check(folder, last))
            else:
                assert last == -1
    assert committed > 0


def check(folder: Path, last: int) -> int:
    """The invariants; returns the number of committed rounds."""
    store = RunStore.open(folder, 2)
    rounds = store.committed(0)
    assert store.ledger.meta() == META
    assert [r.round for r in rounds] == list(range(len(rounds)))
    assert len(rounds) > last  # what was acknowledged is there

    def no_warning(line: str) -> None:
        raise AssertionError(line)

    snapshot = store.snapshots.newest(no_warning)
    assert (snapshot is None) == (not list((folder / "snapshots").glob("*.safetensors")))
    assert not rounds or snapshot is not None
    if snapshot is not None:
        assert snapshot.header == {"round": str(snapshot.round)}
        assert all(torch.equal(snapshot.tensors[name], tensor) for name, tensor in state(snapshot.round).items())
        assert len(rounds) - SNAPSHOT_EVERY <= snapshot.round <= len(rounds)
    oldest = max(0, snapshot.round - SNAPSHOT_EVERY) if snapshot else 0
    for played in rounds[oldest:]:
        check_payloads(store, played)
    assert store.orders(len(rounds)) in ((), orders(len(rounds)))
    for reply in store.received(len(rounds)):
        hotkey = reply.reply.hotkey
        assert bytes(memoryview(store.payload(len(rounds), hotkey))) == payload(len(rounds), hotkey)
    store.close()
    return len(rounds)


def check_payloads(store: RunStore, played: RoundRecord) -> None:
    receipts = [Receipt.parse(signed.body) for signed in played.receipts]
    accepted = [r.hotkey for r in receipts if r.verdict == "ACCEPTED"]
    assert accepted == [A, B]
    assert [r.reply.hotkey for r in store.received(played.round)] == accepted
    assert store.orders(played.round) == orders(played.round)


# --- one validator a folder -------------------------------------------------------------------------------------------


def test_a_second_validator_is_told_the_firsts_pid(tmp_path: Path) -> None:
    first = RunStore.create(tmp_path / "demo", META, 2)
    in_use = rf"--run demo: another validator \(pid {os.getpid()}\) is using it"
    with pytest.raises(ValueError, match=in_use):
        RunStore.open(tmp_path / "demo", 2)
    with pytest.raises(ValueError, match=in_use):
        RunStore.create(tmp_path / "demo", META, 2)
    first.close()
    RunStore.open(tmp_path / "demo", 2).close()


def test_the_lock_is_not_inherited_by_miners_that_it_starts(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "demo", META, 2)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as miner:
        store.close()
        RunStore.open(tmp_path / "demo", 2).close()
        assert miner.poll() is None


def test_create_needs_a_new_name_and_open_an_old_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--run demo: there is no such run in .*; start it without --resume"):
        RunStore.open(tmp_path / "demo", 2)
    assert not (tmp_path / "demo").exists()
    RunStore.create(tmp_path / "demo", META, 2).close()
    with pytest.raises(ValueError, match=r"--run demo: .* exists; go on with --resume"):
        RunStore.create(tmp_path / "demo", {"task": "other"}, 2)
    store = RunStore.open(tmp_path / "demo", 2)
    assert store.ledger.meta() == META
    store.close()


def test_a_run_of_another_protocol_is_not_resumed(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "demo", META, 2)
    store.open_round(0, orders(0))
    store.close()
    with sqlite3.connect(tmp_path / "demo" / "ledger.sqlite") as ledger:
        ledger.execute("UPDATE orders SET body = replace(body, 'pilot/2', 'pilot/1')")
    for _ in range(2):  # and the folder is free again
        with pytest.raises(ValueError, match="--run demo: its messages are of pilot/1, this release speaks pilot/2"):
            RunStore.open(tmp_path / "demo", 2)


def test_an_unreadable_ledger_releases_the_lock(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "ledger.sqlite").write_bytes(b"?" * 5000)
    for _ in range(2):
        with pytest.raises(ValueError, match="not a ledger"):
            RunStore.open(tmp_path / "demo", 2)


# --- a run's life -----------------------------------------------------------------------------------------------------


def test_a_reopened_store_returns_the_same(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "demo", META, 2)
    play_round(store, 0)
    store.add_evaluation(1, {"val_loss": 2.5})
    store.open_round(1, orders(1))
    before = (
        store.head(),
        store.committed(0),
        store.orders(1),
        store.received(0),
        store.ledger.totals(),
        store.ledger.evaluations(),
    )
    store.close()
    store = RunStore.open(tmp_path / "demo", 2)
    after = (
        store.head(),
        store.committed(0),
        store.orders(1),
        store.received(0),
        store.ledger.totals(),
        store.ledger.evaluations(),
    )
    assert after == before
    store.close()


def test_payloads_are_kept_back_to_the_second_newest_snapshot(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "demo", META, 3)
    kept = []
    for round in range(7):
        if round % 2 == 0:
            store.save_snapshot(round, {}, state(round))
        play_round(store, round)
        kept.append([r for r in range(round + 1) if store.received(r)])
    assert kept == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [2, 3, 4], [2, 3, 4, 5], [4, 5, 6]]
    store.close()


def test_a_damaged_snapshot_only_makes_the_replay_longer(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "demo", META, 2)
    for round in range(5):
        if round % 2 == 0:
            newest = store.save_snapshot(round, {}, state(round))
        play_round(store, round)
    newest.write_bytes(newest.read_bytes()[:-100])
    lines: list[str] = []
    snapshot = store.snapshots.newest(lines.append)
    assert snapshot is not None
    assert snapshot.round == 2
    assert len(lines) == 1
    assert "00000004.safetensors is damaged" in lines[0]
    for played in store.committed(snapshot.round):
        check_payloads(store, played)
    store.close()


# --- a disk that fills up ---------------------------------------------------------------------------------------------

SMALL = "4m"


def fill_up(folder: Path) -> None:
    """On a small file system of its own: a run whose disk is full, freed, and resumed."""
    store = RunStore.create(folder / "demo", META, 2)
    (folder / "old run").write_bytes(bytes(1 << 20))
    acknowledged: list[int] = []
    with pytest.raises(DiskFull, match=r"--runs .*: demo: the disk is full; .* free some space, then --resume"):
        play_on(store, acknowledged)
    with pytest.raises(OSError, match="No space left"), open(folder / "rest", "wb", buffering=0) as filler:
        fill(filler)
    after = len(acknowledged)
    head = store.head()
    assert head is not None
    assert head.round == acknowledged[-1]
    with pytest.raises(DiskFull):
        store.open_round(after, orders(after))
    with pytest.raises(DiskFull):
        store.save_snapshot(after, {}, state(after))
    with pytest.raises(DiskFull):
        store.make_durable(received(after, A, written(store, after)))
    store.close()

    (folder / "old run").unlink()
    store = RunStore.open(folder / "demo", 2)
    rounds = store.committed(0)
    assert [r.round for r in rounds] == acknowledged
    for played in rounds:
        check_payloads(store, played)
    play_round(store, after)
    store.close()
    with closing(sqlite3.connect(folder / "demo" / "ledger.sqlite")) as ledger:
        assert ledger.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def play_on(store: RunStore, acknowledged: list[int]) -> None:
    for round in count():
        play_round(store, round)
        acknowledged.append(round)


def fill(file: FileIO) -> None:
    while True:
        file.write(bytes(512))


def written(store: RunStore, round: int) -> bytes:
    """A payload, or the part of it that the disk takes."""
    with suppress(OSError):
        store.payload_path(round, A).write_bytes(payload(round, A))
    return payload(round, A)


def test_a_disk_that_fills_up_keeps_what_was_committed(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from test_store import fill_up; fill_up(Path(sys.argv[1]))"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent / 'src'}"}
    command = [sys.executable, "-c", code, str(tmp_path / "small")]
    skip_without(tmp_path / "small")
    subprocess.run(mounted(tmp_path / "small", SMALL, command), check=True, env=environment)


if __name__ == "__main__":
    serve_children(sys.stdout.fileno())
