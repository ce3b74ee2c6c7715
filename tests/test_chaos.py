"""Test scripts/chaos.py: its schedule, proxies and clocks, its report on broken runs, and whole runs."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from pilot.simulation.chaos.check import check_and_print
from pilot.simulation.chaos.proxy import proxy_to
from pilot.simulation.chaos.schedule import KINDS, VALIDATOR, schedule
from scripts import chaos
from tests.checker_samples import VALIDATOR as VALIDATORS_HOTKEY
from tests.checker_samples import A, Writer, draft

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["M1", "M2", "M3"]


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_schedule() -> None:
    assert schedule(1, 200, NAMES, 100, 10) == schedule(1, 200, NAMES, 100, 10)
    assert schedule(1, 200, NAMES, 100, 10) != schedule(2, 200, NAMES, 100, 10)


def test_a_schedule_has_every_kind_and_leaves_the_last_rounds_alone() -> None:
    events = schedule(1, 200, NAMES, 100, 10)
    assert {event.kind for event in events} == KINDS.keys()
    assert {event.target for event in events} == {*NAMES, VALIDATOR}
    rounds = [event.round for event in events]
    assert rounds == sorted(rounds)
    assert rounds[0] >= 3
    assert rounds[-1] < 190
    for event in events:
        _, least, most = KINDS[event.kind]
        assert least <= event.seconds <= most


def test_a_schedule_of_some_kinds() -> None:
    assert {event.kind for event in schedule(1, 20, NAMES, 8, 5, ["kill", "pause"])} == {"kill", "pause"}


# --- proxies and clocks -----------------------------------------------------------------------------------------------


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(1 << 16):
        writer.write(piece)
        await writer.drain()
    writer.close()


def test_a_proxy_stalls_without_losing_a_byte_and_resets_both_ends() -> None:
    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with proxy_to(server.sockets[0].getsockname()[1]) as (proxy, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"through")
            assert await reader.readexactly(7) == b"through"
            proxy.open.clear()
            writer.write(b"later")
            held = asyncio.ensure_future(reader.readexactly(5))
            await asyncio.wait([held], timeout=0.2)
            assert not held.done()
            proxy.open.set()
            assert await held == b"later"
            proxy.reset()
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)
            writer.close()
        server.close()

    asyncio.run(main())


def test_a_program_with_a_wrong_clock(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys, time; print(time.time(), time.time_ns() / 1e9, *sys.argv[1:])")
    told = []
    for seconds in ("0", "-3600"):
        command = [sys.executable, str(ROOT / "src/pilot/simulation/chaos/clock.py"), seconds, str(program), "--flag"]
        told.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    (right, right_ns, _), (wrong, wrong_ns, flag) = told
    assert flag == "--flag"
    for before, after in ((right, wrong), (right_ns, wrong_ns)):
        assert -3600 <= float(after) - float(before) < -3000  # and what the second start took


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_run_that_breaks_rules_is_reported_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = draft()
    run.receipts[2, A] = {"seconds": 10.5}
    run.keys["order", 1, A] = A
    writer = Writer(tmp_path, run)
    assert VALIDATORS_HOTKEY != A
    with pytest.raises(SystemExit) as ended:
        chaos.main(["--check", str(writer.folder), "--no-replay"])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert f"violation: late: round 2 {A[:8]}: accepted 10.5 s after the order, the deadline was 10 s" in said
    assert f"violation: signature: round 1 {A[:8]}: order: signed by {A}" in said
    assert "BROKEN 1 times: no reply was accepted after its deadline" in said
    assert "holds: no micro-batch index was accepted twice" in said


def test_a_correct_run_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(tmp_path, draft())
    with pytest.raises(SystemExit) as ended:
        chaos.main(["--check", str(writer.folder), "--no-replay", "--caches", *map(str, writer.miners)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "4 rounds, 7 orders, 6 receipts, 4 replies accepted, 6 micro-batches accepted" in said
    assert "6 receipts that miners hold" in said


@pytest.mark.parametrize(
    ("flags", "mistake"),
    [
        (["--check", "nowhere"], "nowhere: there is no run in it"),
        (["--rounds", "5"], "--rounds 5: must be at least --quiet-rounds 10 + 4"),
        (["--kinds", "flood"], "--kinds flood: unknown; known: kill, "),
        (["--folder", "."], "--folder .: is not empty"),
        (["--miners", "0"], "--miners 0: must be 1 or more"),
        (["--check", ".", "--caches", "."], "--caches .: there is no receipts.jsonl in it"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        chaos.main(flags)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert mistake in said
    assert said.count("\n") == 1


# --- whole runs -------------------------------------------------------------------------------------------------------


def run_chaos(folder: Path, *flags: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--folder", str(folder), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 violations, 0 problems" in ended.stdout
    return ended.stdout


@pytest.mark.slow
def test_a_short_run_and_its_replay(tmp_path: Path) -> None:
    folder, kinds = tmp_path / "chaos", ["kill-validator", "reset", "stall", "pause"]
    flags = ["--rounds", "12", "--quiet-rounds", "4", "--miners", "2", "--events", "5", "--seed", "8"]
    said = run_chaos(folder, *flags, "--no-compare", "--no-replay", "--kinds", *kinds)
    assert "12 of 12 rounds" in said
    happened = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    planned = schedule(8, 12, ["M1", "M2"], 5, 4, kinds)
    assert sorted((e["round"], e["kind"], e["target"], e["seconds"]) for e in happened) == sorted(
        (event.round, event.kind, event.target, event.seconds) for event in planned
    )

    run = folder / "runs" / "chaos"
    caches = [folder / "miners" / name / f"{name}.default" for name in ("M1", "M2")]
    assert all((cache / "receipts.jsonl").is_file() for cache in caches)
    assert check_and_print(run, caches, replay=True) == []
    with closing(sqlite3.connect(run / "ledger.sqlite")) as db, db:
        [(text,)] = db.execute("SELECT settings FROM rounds WHERE round = 10").fetchall()
        settings = json.loads(text)
        doubled = json.dumps({**settings, "lr": 2 * settings["lr"]})
        db.execute("UPDATE rounds SET settings = ? WHERE round = 10", (doubled,))
    [violation] = check_and_print(run, caches, replay=True)
    assert violation.rule == "replay"
    assert "round 10: replays to version" in violation.text


@pytest.mark.slow
def test_two_hundred_rounds(tmp_path: Path) -> None:
    said = run_chaos(tmp_path / "chaos", "--seed", "1", "--rounds", "200")
    assert "200 of 200 rounds" in said
    assert "ratio" in said
