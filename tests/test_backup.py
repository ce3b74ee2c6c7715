"""A backup of a run that goes on holds together, and a validator goes on from it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pilot.app import backup
from pilot.storage.checker import check_run
from pilot.transport.auth import verify_message
from tests.processes import RUN, eventually, quadratic_flags, start_miner, start_validator


def rounds_of(run: Path) -> int:
    if not (run / "ledger.sqlite").exists():
        return 0
    with closing(sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True)) as ledger:
        try:
            return int(ledger.execute("SELECT coalesce(max(round) + 1, 0) FROM rounds").fetchone()[0])
        except sqlite3.OperationalError:  # its tables are not made yet
            return 0


@pytest.mark.slow
def test_a_backup_of_a_running_run_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Backups are made while the run prunes; the last is resumed by the same miner, which has later receipts."""
    run, to = tmp_path / "runs" / RUN, tmp_path / "backups"
    with start_miner(tmp_path, "M1") as first:
        flags = ["--axons", first.endpoint, "--eval-every", "0", "--snapshot-every", "20", "--rounds", "100000"]
        with start_validator(tmp_path, *flags, task=quadratic_flags) as validator:
            for least in (3, 50, 90):
                eventually(lambda least=least: rounds_of(run) >= least, f"{least} rounds")  # type: ignore[misc]
                backup.main([str(run), str(to)])
                assert f"rounds of {run} are in {to / RUN}" in capsys.readouterr().out
                assert check_run(to / RUN, verify_message=verify_message).violations == []
            kept = rounds_of(to / RUN)
            eventually(lambda: rounds_of(run) >= kept + 10, "ten rounds more")
            validator.kill()
        again = ["--resume", "--runs", str(to), "--run", RUN, "--rounds", str(kept + 5), "--axons", first.endpoint]
        with start_validator(tmp_path, *again, task=quadratic_flags) as resumed:
            assert resumed.wait() == 0, resumed.said()
            assert f"resumed after round {kept} of {kept + 5}" in resumed.said()
        assert rounds_of(to / RUN) == kept + 5
        assert check_run(to / RUN, verify_message=verify_message).violations == []
        with closing(sqlite3.connect(to / RUN / "ledger.sqlite")) as ledger:
            faults = ledger.execute("SELECT reason FROM receipts WHERE fault IS NOT NULL AND round >= ?", (kept,))
            assert faults.fetchall() == []


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "--run: name a run; see --help"),
        (["PLACE"], "--to: name a folder; see --help"),
        (["PLACE/nothing", "PLACE/to"], "--run PLACE/nothing: no run is there; name its folder, such as runs/demo"),
        (
            ["PLACE/demo", "PLACE/taken"],
            "--to PLACE/taken: PLACE/taken/demo is no backup of pilot-backup; name another folder",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "ledger.sqlite").touch()
    (tmp_path / "taken" / "demo").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        backup.main([flag.replace("PLACE", str(tmp_path)) for flag in flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"pilot-backup: {reason.replace('PLACE', str(tmp_path))}\n"
    assert sorted(tmp_path.rglob("*")) == before
