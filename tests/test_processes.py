"""Run real processes over real sockets: check the output, the cost of a kill, and that no process is left behind."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

import validator
from nanochat.checkpoint_manager import load, steps
from pilot.storage.run_store import RunStore
from pilot.training.ranges import Cursor, indices
from protocol import Receipt
from tests.processes import RUN, SRC, Miner, Process, eventually, quadratic_flags, start_miner, start_validator

PNG = b"\x89PNG\r\n\x1a\n"
MANY = "100000"  # rounds: more than any test waits for


def receipts(run: Path) -> list[Receipt]:
    """Return all receipts of a run's ledger, in the order of the rounds."""
    with closing(RunStore.open(run, keep=2)) as store:
        return [Receipt.parse(signed.body) for record in store.committed(0) for signed in record.receipts]


def cursor(run: Path) -> Cursor:
    with closing(RunStore.open(run, keep=2)) as store:
        head = store.head()
        assert head is not None
        return Cursor.loads(head.cursor)


def accepted(run: Path, miner: Miner) -> int:
    """Return how many replies of a miner were accepted, from a ledger that a validator is writing."""
    if not (run / "ledger.sqlite").exists():
        return 0
    with closing(sqlite3.connect(f"file:{run}/ledger.sqlite?mode=ro", uri=True)) as ledger:
        if not ledger.execute("SELECT 1 FROM sqlite_master WHERE name = 'receipts'").fetchone():
            return 0
        [(count,)] = ledger.execute("SELECT count(*) FROM receipts WHERE hotkey = ? AND fault IS NULL", (miner.hotkey,))
        return int(count)


@pytest.fixture(scope="module")
def own_miners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Start a run with --local, which proceeds while other tests wait for their own processes."""
    folder = tmp_path_factory.mktemp("own")
    flags = ["--local", "2", "--baseline", "--rounds", "5", "--eval-every", "2", "--save-every", "2"]
    with start_validator(folder, *flags) as process:
        yield process


# --- miners that come and go ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """The result of a run whose second miner starts late, is killed and returns, and which Ctrl-C then stops."""

    place: Path
    first: Miner
    late: Miner
    code: int
    said: str
    receipts: list[Receipt]
    cursor: Cursor

    @property
    def rounds(self) -> int:
        return self.receipts[-1].round + 1

    def rounds_of(self, miner: Miner) -> list[int]:
        return [r.round for r in self.receipts if r.hotkey == miner.hotkey]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, own_miners: Process) -> Iterator[Story]:
    place = tmp_path_factory.mktemp("place")
    run = place / "runs" / RUN
    with socket.create_server(("127.0.0.1", 0)) as vacated:
        port = vacated.getsockname()[1]
    with start_miner(place, "first") as first:
        axons = ["--axons", first.endpoint, str(port), "--connect-timeout", "0.5"]
        axons += ["--serve.port", "0", "--admit", "everyone"]
        with start_validator(place, *axons, "--rounds", MANY, task=quadratic_flags) as process:
            eventually(lambda: accepted(run, first) >= 3, "rounds of one miner")
            with start_miner(place, "late", port) as late:
                eventually(lambda: accepted(run, late) >= 3, "rounds of both")
                late.kill()
                alone = accepted(run, first)
                eventually(lambda: accepted(run, first) >= alone + 20, "rounds without the killed miner")
                before = accepted(run, late)
                late.restart()
                eventually(lambda: accepted(run, late) >= before + 3, "rounds of both again")
                process.interrupt()
                code = process.wait()
                yield Story(place, first, late, code, process.said(), receipts(run), cursor(run))


def test_a_miner_that_starts_late_is_picked_up(story: Story) -> None:
    assert "1 of 2 miners are there" in story.said
    assert story.rounds_of(story.first) == list(range(story.rounds))
    assert story.rounds_of(story.late)[0] >= 3


def test_a_killed_miner_costs_only_its_part_and_is_used_again(story: Story) -> None:
    faults = [
        r for r in story.receipts if r.verdict != "ACCEPTED" and r.round < story.rounds - 1
    ]  # not what Ctrl-C cut
    assert [(r.hotkey, r.verdict, r.done, r.work) for r in faults] in (
        [(story.late.hotkey, "SILENT", (), 0)],  # it died at work, and was not asked again
        [],  # it died between two orders
    )
    [away] = [after - before for before, after in pairwise(story.rounds_of(story.late)) if after > before + 1]
    assert away >= 18  # twenty rounds without it, but for those that were under way
    done = [index for r in story.receipts for index in indices(r.done)]
    left = indices(story.cursor.returned)  # what Ctrl-C cut
    assert sorted([*done, *left]) == list(range(story.cursor.next))  # nothing twice, and nothing is skipped


def test_ctrl_c_ends_a_run_that_can_be_resumed(story: Story) -> None:
    assert story.code == 0
    assert story.said.splitlines()[-1] == f"stopped after round {story.rounds} of {MANY}; --resume goes on from here"
    assert "Traceback" not in story.said
    runs = story.place / "runs"
    assert load(runs / RUN / "model").step == story.rounds
    assert (runs / RUN / "loss.png").read_bytes().startswith(PNG)
    assert json.loads((runs / RUN / "summary.json").read_text())["rounds"] == story.rounds

    validator.main(["--resume", "--runs", str(runs), "--rounds", str(story.rounds + 2)])
    resumed = receipts(runs / RUN)
    assert resumed[: len(story.receipts)] == story.receipts
    assert [r.round for r in resumed[len(story.receipts) :]] == [story.rounds] * 2 + [story.rounds + 1] * 2


# --- a miner and its validators ---------------------------------------------------------------------------------------


def test_a_miner_serves_its_first_validator_until_it_is_unpinned_and_ends_on_sigterm(
    story: Story, tmp_path: Path
) -> None:
    """The story's first miner, which that validator has pinned."""
    miner = story.first
    flags = [
        *quadratic_flags(tmp_path),
        "--axons",
        miner.endpoint,
        "--rounds",
        "1",
        "--patience",
        "1",
        "--patience-seconds",
        "0",
    ]
    with pytest.raises(SystemExit) as ended:
        validator.main([*flags, "--run", "refused"])
    assert ended.value.code == 1
    [refused] = receipts(tmp_path / "runs" / "refused")
    assert "refused with 403: this miner is pinned to" in refused.reason

    miner.restart("--unpin")
    validator.main([*flags, "--run", "served"])
    assert [r.verdict for r in receipts(tmp_path / "runs" / "served")] == ["ACCEPTED"]

    miner.terminate()
    assert miner.wait() == 0
    assert "Traceback" not in miner.said()


def test_the_installed_programs_end_on_sigterm_like_the_files(tmp_path: Path) -> None:
    """pilot-miner and pilot-validator import the modules and call `main`."""
    with start_miner(tmp_path, "M1") as installed:
        installed.close()
        installed.command[1:2] = ["-c", f"import sys; sys.path.insert(0, {str(SRC)!r}); from miner import main; main()"]
        installed.start()
        flags = ["--axons", installed.endpoint, "--rounds", MANY, "--eval-every", "0"]
        with start_validator(tmp_path, *flags, task=quadratic_flags) as process:
            process.close()
            process.command[1:2] = [
                "-c",
                f"import sys; sys.path.insert(0, {str(SRC)!r}); from validator import main; main()",
            ]
            process.start()
            process.wait_for(r"^round \d+/")
            process.terminate()
            assert process.wait() == 0
            assert re.search(rf"^stopped after round \d+ of {MANY}; --resume goes on from here$", process.said(), re.M)
        installed.terminate()
        assert installed.wait() == 0


# --- local miners -----------------------------------------------------------------------------------------------------


def test_a_run_with_local_miners(own_miners: Process) -> None:
    assert own_miners.wait() == 0, own_miners.said()
    assert not own_miners.survivors()
    said = own_miners.said()
    private = own_miners.log.parent / "runs"
    made = [private, *private.rglob("*")]  # the ledger with its WAL, the spool, the local miners' wallets and caches
    assert [path for path in made if path.stat().st_mode & 0o077] == []
    assert {"ledger.sqlite", "spool", "M1", "hotkeys"} <= {path.name for path in made}
    for shown in ("plain training on the same batches", "Bytes: ", "Speed: ", "Who earned what", "model"):
        assert shown in said
    run = own_miners.log.parent / "runs" / RUN
    assert f"plot {run / 'loss.png'}, every figure {run / 'summary.json'}" in said
    assert (run / "loss.png").read_bytes().startswith(PNG)
    assert steps(run / "model") == [4, 5]  # --save-every 2, of which --save-keep 2 are left

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(5))
    assert [row["round"] for row in rows if "val_loss" in row] == [1, 3, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 5
    assert summary["val_loss"] == rows[-1]["val_loss"] < summary["val_loss_before"]
    assert summary["baseline_val_loss"] < summary["val_loss_before"]
    assert len(summary["weights"]) == 2
    assert sum(summary["weights"].values()) == pytest.approx(1)
    assert {(r.verdict, r.work) for r in receipts(run)} == {("ACCEPTED", 4 * 4 * 32)}  # batches, sequences, tokens


STARTS_A_MINER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from pilot.app.local_miners import LocalMiners
with LocalMiners(1, Path(sys.argv[2]), "gpt2", "cpu", 1) as miners:
    print("started", miners.endpoints(print), flush=True)
    time.sleep(600)
"""


def test_local_miners_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_A_MINER, str(SRC), str(tmp_path)]
    with Process(command, tmp_path / "parent.log") as parent:
        parent.wait_for("^started")
        assert len(parent.survivors()) == 2
        parent.kill()
        eventually(lambda: not parent.survivors(), "end of the local miner")
