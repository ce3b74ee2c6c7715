"""Damage each file of a run's folder in each way: a resumed run is the same run, or one line says what to do."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

import validator
from pilot.storage.ledger import Ledger
from pilot.storage.run_store import RunStore
from tests.processes import RUN, Miner, quadratic_flags, start_miner

ROUNDS = 5  # committed; the newest snapshot is of the state after four
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def worker(place: Path) -> Iterator[Miner]:
    with start_miner(place, "M1") as started:
        yield started


@pytest.fixture(scope="module")
def finished(place: Path, worker: Miner) -> Path:
    """Return a run of five rounds, as a killed validator leaves it, and another one beside it. Tests only read them."""
    save = RunStore.save_snapshot
    flags = [*quadratic_flags(place), "--axons", worker.endpoint, "--rounds", str(ROUNDS), "--snapshot-every", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunStore, "save_snapshot", lambda self, done, *rest: done < ROUNDS and save(self, done, *rest))
        validator.main(flags)
        validator.main([*flags, "--run", "other", "--seed", "1"])
    keep_rows_in_wal(place / "runs" / RUN / "ledger.sqlite", rounds=3)
    return place / "runs"


def keep_rows_in_wal(path: Path, rounds: int) -> None:
    """Leave a ledger as a SIGKILL does: what came after its first rounds lies in the log beside it."""
    full, work = path.with_name("full.sqlite"), path.with_name("work.sqlite")
    shutil.move(path, full)
    shutil.copyfile(full, work)
    with closing(Ledger(work)) as ledger:
        ledger.truncate(rounds, path.with_name("copy.sqlite"))
    with closing(sqlite3.connect(work, isolation_level=None)) as db:
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute("ATTACH ? AS full", (str(full),))
        for table in ("rounds", "orders", "receipts", "weights", "evaluations", "late"):
            db.execute(f"INSERT OR IGNORE INTO main.{table} SELECT * FROM full.{table}")
        for ending in ("", "-wal"):
            shutil.copyfile(f"{work}{ending}", f"{path}{ending}")
    for name in ("full", "work", "copy"):
        for leftover in path.parent.glob(f"{name}.sqlite*"):
            leftover.unlink()


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs" / RUN


def versions(run: Path) -> list[str]:
    with closing(sqlite3.connect(run / "ledger.sqlite")) as ledger:
        return [version for (version,) in ledger.execute("SELECT version FROM rounds ORDER BY round")]


def resume(run: Path, worker: Miner, *flags: str) -> None:
    argv = ["--resume", "--run", RUN, "--runs", str(run.parent), "--axons", worker.endpoint]
    validator.main([*argv, "--rounds", str(ROUNDS + 1), *flags])


def resumed(run: Path, worker: Miner) -> object:
    """Resume a run, and return the exit code."""
    try:
        resume(run, worker)
    except SystemExit as ended:
        return ended.code
    return 0


FILES: dict[str, str] = {
    "ledger": "ledger.sqlite",
    "log": "ledger.sqlite-wal",
    "index": "ledger.sqlite-shm",
    "payload": "spool/00000004/*.payload",
    "reply": "spool/00000004/*.reply.json",
    "round": "spool/00000004",
    "spool": "spool",
    "snapshot": "snapshots/00000004.safetensors",
    "snapshots": "snapshots",
    "version": "versions/*",
    "versions": "versions",
    "peers": "peers.json",
    "metrics": "metrics.jsonl",
    "summary": "summary.json",
    "model": "model",
    "lock": "lock",
}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_by(data: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        before = path.read_bytes() if path.is_file() else b"a folder"
        remove(path)
        path.write_bytes(data(before))

    return damage


def make_folder(path: Path) -> None:
    remove(path)
    path.mkdir()
    (path / "file").write_text("something")


def take_from_other(path: Path) -> None:
    """Take the same file of another run, if it has one."""
    run = next(parent for parent in path.parents if parent.name == RUN)
    theirs = run.with_name("other") / path.relative_to(run)
    if not theirs.exists():
        theirs = max(theirs.parent.glob(f"*{path.suffix}"), default=theirs)
    remove(path)
    if theirs.is_dir():
        shutil.copytree(theirs, path)
    elif theirs.exists():
        shutil.copyfile(theirs, path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": remove,
    "emptied": replace_by(lambda data: b""),
    "truncated": replace_by(lambda data: data[: len(data) // 2]),
    "one byte short": replace_by(lambda data: data[:-1]),
    "zeros": replace_by(lambda data: bytes(len(data))),
    "garbage": replace_by(lambda data: bytes(255 - byte for byte in data)),
    "a flipped bit": replace_by(lambda data: data[: len(data) // 2] + b"\x7f" + data[len(data) // 2 + 1 :]),
    "a folder": make_folder,
    "another run's": take_from_other,
}


MOST_LIKELY = ("ledger", "log", "payload", "snapshot", "peers"), ("deleted", "truncated", "zeros", "a folder")
CASES = [
    pytest.param(file, damage, marks=[] if file in MOST_LIKELY[0] and damage in MOST_LIKELY[1] else pytest.mark.slow)
    for file in FILES
    for damage in DAMAGES
]


@pytest.mark.parametrize(("file", "damage"), CASES)
def test_a_damaged_file(file: str, damage: str, run: Path, worker: Miner, capfd: Capture) -> None:
    """Go on as the same run, or end with one line that names a file and a way out. That way then works."""
    before = versions(run)
    assert len(before) == ROUNDS
    path = max(run.glob(FILES[file]), default=run / FILES[file])
    shutil.copytree(run, run.parent.parent / "kept")
    DAMAGES[damage](path)
    capfd.readouterr()
    code = resumed(run, worker)
    said = capfd.readouterr().err
    if code:
        assert code == 2, said
        assert said.count("\n") == 1, said
        assert str(run) in said, said
        assert re.search(r"restore|--resume-at \d|delete it|put it right|put back|fix that", said), said
        if way := re.search(r"--resume-at (\d)", said):
            resume(run, worker, *way[0].split())
            kept = int(way[1])
            assert f"went back to after round {kept}" in capfd.readouterr().out
            assert versions(run)[:kept] == before[:kept]
            [aside] = run.glob("given-up-at-*")
            with closing(sqlite3.connect(aside / "ledger.sqlite")) as ledger:
                assert ledger.execute("SELECT count(*) FROM receipts").fetchone() > (0,)
        else:  # nothing was made worse: with the file restored the run goes on
            restore(run.parent.parent / "kept", run, path)
            resume(run, worker)
            assert versions(run)[:ROUNDS] == before
        return
    assert versions(run)[:ROUNDS] == before
    assert len(versions(run)) == ROUNDS + 1


def restore(kept: Path, run: Path, path: Path) -> None:
    names = {path.relative_to(run)} | ({Path(f"ledger.sqlite{end}") for end in ("", "-wal", "-shm")})
    for name in names if path.name.startswith("ledger") else {path.relative_to(run)}:
        remove(run / name)
        if (kept / name).is_dir():
            shutil.copytree(kept / name, run / name)
        elif (kept / name).exists():
            shutil.copyfile(kept / name, run / name)


def mistake(run: Path, worker: Miner, capfd: Capture, *flags: str) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        resume(run, worker, *flags)
    said = capfd.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1), said
    return said


@pytest.mark.parametrize("file", ["ledger.sqlite", "ledger.sqlite*"])
@pytest.mark.parametrize("flags", [[], ["--resume"], ["--resume", "--run", RUN]])
def test_a_run_that_lost_its_ledger_is_neither_begun_anew_nor_passed_over(
    file: str, flags: list[str], run: Path, place: Path, worker: Miner, capfd: Capture
) -> None:
    for path in run.glob(file):
        path.unlink()
    (run / "spool").touch()
    argv = [*quadratic_flags(place), "--runs", str(run.parent), "--axons", worker.endpoint, "--rounds", "9"]
    argv = [flag for flag in argv if not (flags == ["--resume"] and flag in ("--run", RUN))]
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        validator.main([*argv, *flags])
    said = capfd.readouterr().err
    assert ended.value.code == 2
    assert re.match(rf"validator.py: --run {RUN}: \S+ledger.sqlite is gone or empty, but \S+ of a run is there; ", said)


def test_going_back_keeps_what_it_gives_up(run: Path, worker: Miner, capfd: Capture) -> None:
    before = versions(run)
    with closing(RunStore.open(run, 2)) as store:
        given_up = [signed for record in store.committed(4) for signed in record.receipts]
    resume(run, worker, "--resume-at", "4")
    assert "what was recorded of later ones is in" in capfd.readouterr().out
    assert versions(run)[:4] == before[:4]
    aside = run / "given-up-at-4"
    with closing(Ledger(aside / "ledger.sqlite")) as ledger:
        assert [r.version for r in ledger.committed(0)] == before
        assert [signed for record in ledger.committed(4) for signed in record.receipts] == given_up
    assert [path.name for path in (aside / "spool").iterdir()] == ["00000004"]
    resume(run, worker, "--resume-at", "4", "--rounds", "5")  # once more
    assert (run / "given-up-at-4-2" / "ledger.sqlite").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume-at", "9"], f"--resume-at 9: run {RUN} has 5 committed rounds; give at most that"),
        (["--resume-at", "-1"], "--resume-at -1: must be 0 or more, and needs --resume"),
        (["--resume-at", "1"], "no whole snapshot is left; round 0: .* is gone; "),
    ],
)
def test_going_back_too_far(flags: list[str], said: str, run: Path, worker: Miner, capfd: Capture) -> None:
    before = versions(run)
    for payload in (run / "spool" / "00000000").glob("*.payload") if "1" in flags else ():
        payload.unlink()
    assert re.search(said, mistake(run, worker, capfd, *flags))
    assert versions(run) == before
