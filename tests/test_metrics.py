"""Metrics, the plot and the display: what people and programs read of a run."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pilot.app.report import miner_rows, own_time
from pilot.common.logs import undated
from pilot.display.console import Console
from pilot.display.metrics import Metrics, Mode, allowed_mode
from pilot.display.plots import loss_plot
from pilot.storage.ledger import Total

SOURCE = str(Path(__file__).parent.parent / "src")
ROWS: list[dict[str, float | int | str]] = [
    {"round": round, "loss": 1 / (round + 3), "shards": "4/4 1/4", "utilisation.5AAAAAAA": 0.5} for round in range(3)
]


def lines(folder: Path) -> list[object]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_row_is_a_line_and_floats_are_exact(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, "disabled", "pilot", "demo")
    for index, row in enumerate(ROWS):
        metrics.log(row)
        assert lines(tmp_path) == ROWS[: index + 1]  # each is there at once
    metrics.close()


def test_rewrite_says_what_the_ledger_says(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"round": 0}\n{"rou')  # a torn line
    metrics = Metrics(tmp_path, "disabled", "pilot", "demo")
    metrics.rewrite(iter(ROWS[:2]))
    metrics.log(ROWS[2])
    metrics.close()
    assert lines(tmp_path) == ROWS


def test_a_number_that_json_lacks_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, "disabled", "pilot", "demo")
    metrics.log({"round": 0, "loss": math.nan, "norm": math.inf})
    metrics.summary({"val_loss": math.nan, "weights": {"A": math.inf, "B": 0.5}, "curve": [1.0, math.nan]})
    metrics.close()
    assert lines(tmp_path) == [{"round": 0, "loss": None, "norm": None}]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"val_loss": None, "weights": {"A": None, "B": 0.5}, "curve": [1.0, None]}


def test_a_disk_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics(tmp_path, "disabled", "pilot", "demo")
    (tmp_path / "metrics.jsonl").mkdir()  # cannot be appended to
    (tmp_path / "summary.json").mkdir()
    metrics.log(ROWS[0])
    metrics.summary({})
    assert caplog.text.count("cannot write metrics") == 2


def test_rewriting_names_the_file_and_the_remedy_if_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ValueError, match=r"metrics.jsonl: No space left on device; .*free some space"):
        Metrics(tmp_path, "disabled", "pilot", "demo").rewrite(ROWS)
    assert not list(tmp_path.iterdir())


def run_python(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.mark.parametrize(
    ("flag", "environment", "expected"),
    [
        ("online", "offline", "offline"),
        ("online", "dryrun", "offline"),
        ("online", "Disabled", "disabled"),
        ("offline", "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "", "online"),
        ("online", "shared", "online"),
    ],
)
def test_the_stricter_of_flag_and_environment_holds_for_wandb(
    flag: Mode, environment: str, expected: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", environment)
    assert allowed_mode(flag) == expected


def test_wandb_that_the_environment_forbids_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Metrics(tmp_path, "online", "pilot", "demo").close()
    assert "W&B is disabled instead of online, as WANDB_MODE in the environment says" in caplog.text
    assert not list(tmp_path.iterdir())


def test_wandb_is_imported_only_when_it_is_on(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pilot.display.metrics import Metrics\n"
        "metrics = Metrics(Path(sys.argv[1]), 'disabled', 'pilot', 'demo')\n"
        "metrics.log({'round': 0}); metrics.summary({}); metrics.close(); print('wandb' in sys.modules)"
    )
    assert run_python(script, str(tmp_path)) == "False\n"


def test_records_import_nothing_heavy() -> None:
    script = (
        "import sys, pilot.storage.run_store, pilot.storage.miner_store\n"
        "import pilot.display.metrics, pilot.display.plots, pilot.display.console\n"
        "print([name for name in ('torch', 'matplotlib', 'wandb', 'safetensors') if name in sys.modules])"
    )
    assert run_python(script) == "[]\n"


# --- the report -------------------------------------------------------------------------------------------------------

A, B = "5" + "A" * 47, "5" + "B" * 47


def test_a_miners_row_has_the_mean_of_the_rounds_that_it_answered() -> None:
    totals = [Total(A, 3, {}, 4096, 0.75, done=1200, lost=0, late=0), Total(B, 1, {"LATE": 2}, 7, 0.25, 1, 9, 5)]
    rows = [{"utilisation.5AAAAAAA": 0.5, "utilisation.5BBBBBBB": 0.25}, {"utilisation.5AAAAAAA": 1.0}, {}]
    assert miner_rows(totals, rows) == [
        (A, "none", "0", "0", "75.0%"),
        (B, "2 LATE", "9", "5", "25.0%"),
    ]
    assert miner_rows(totals[:1], [])[0][-1] == ""  # nothing is known of it


def test_the_validators_own_time_by_phase() -> None:
    rows = [{"verify_s": 0.5, "step_s": 1000.0, "collect_s": 9.0}, {"verify_s": 0.25, "seconds": 3.0}]
    assert own_time(rows) == "verify 0.750 s, step 1,000.000 s"
    assert own_time([{}]) == ""


# --- the plot ---------------------------------------------------------------------------------------------------------


def test_the_plot_is_a_png_and_leaves_no_global_state(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pilot.display.plots import loss_plot\n"
        "loss_plot(Path(sys.argv[1]), {'training': [(0, 5.5), (1, 2.0)]}, 'title', 'round', 'loss')\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    path = tmp_path / "loss.png"
    path.write_bytes(b"an old one")
    assert run_python(script, str(path)) == "False\n"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "series",
    [
        {},
        {"none": []},
        {"diverged": [(0.0, math.nan)]},
        {"one": [(3.0, 2.5)]},
        {"a": [(0, 1.0), (1, math.inf)], "b": []},
    ],
)
def test_odd_curves_are_drawn_too(tmp_path: Path, series: dict[str, list[tuple[float, float]]]) -> None:
    loss_plot(tmp_path / "loss.png", series, "$\\title", "round", "loss")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# --- the display ------------------------------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(300) as console:
        for round in range(300):  # takes far less than a second: most rounds are not worth a line
            evaluated = {"val_loss": 2.25} if round == 150 else {}
            console.round({"round": round, "loss": 2.5, "tokens_per_s": 12345.6, **evaluated})
    shown = undated(capsys.readouterr().out).splitlines()
    assert shown[0] == "round 1/300  loss 2.500  12,346 tokens/s"
    assert "round 151/300  loss 2.500  val 2.250  12,346 tokens/s" in shown
    assert shown[-1] == "round 300/300  loss 2.500  12,346 tokens/s"
    assert len(shown) < 30


def test_a_peers_text_moves_no_cursor_and_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(1) as console:
        console.say("[bold]why[/] \x1b[2J\r" + "long " * 100)
        console.table("miners", ["hotkey", "why"], [["5A", "\x1b[31m[red]"]])
        logging.getLogger("pilot.storage.spool").warning("dropped [/nothing]")
    shown = undated(capsys.readouterr().out)
    assert "\x1b" not in shown
    assert shown.splitlines()[0].startswith("[bold]why[/] \ufffd[2J\ufffdlong long")
    assert len(shown.splitlines()[0]) > 500  # a line stays a line
    assert "\ufffd[31m[red]" in shown
    assert "dropped [/nothing]" in shown


def test_logs_go_back_to_where_they_went(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    with Console(1, "debug"):
        logging.getLogger("market").debug("seen with --logging.debug")
    assert (root.handlers, root.level) == before
    assert "seen with --logging.debug" in capsys.readouterr().out


def test_a_bar_on_a_terminal() -> None:
    script = (
        "from pilot.display.console import Console\n"
        "with Console(20) as console:\n"
        "    for round in range(10, 20): console.round({'round': round, 'loss': 2.5})\n"
        "    console.say('a line above the bar')\n"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "100"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=theirs, env=environment)
    os.close(theirs)
    shown = read_all(ours)
    assert process.wait() == 0
    assert "a line above the bar" in shown
    assert "20/20" in shown
    assert "loss 2.500" in shown
    assert "━" in shown
    assert "\x1b[31m" not in shown


def read_all(descriptor: int) -> str:
    """Everything from a terminal until its other side is closed, which Linux tells by an error."""
    shown = b""
    while True:
        try:
            chunk = os.read(descriptor, 4096)
        except OSError:
            chunk = b""
        if not chunk:
            os.close(descriptor)
            return shown.decode()
        shown += chunk
