"""The display as a person sees it: real programs in pseudo-terminals, their output drawn by a terminal emulator."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyte
import pytest

from pilot.common.logs import undated
from tests.processes import SRC, Process, eventually, program, quadratic_flags

COLOUR = re.compile(rb"\x1b\[(?:[0-9]+;)*(?:3[0-9]|4[0-9]|9[0-7]|10[0-7])[;m]")
BAR = r"round +\d+/\d+  +[━╸╺]+ +"
ETA = r"ETA (?:\d+|-):(?:\d\d|--):(?:\d\d|--)"
EPOCH = r"epoch \d+  \d+/\d+"
SHARDS = r"  shards [·▁▂▃▄▅▆▇█]{1,16}"
LOSSES = r"loss \d\.\d{3}  val \d\.\d{3} \(miners' \d\.\d{3}\)"
FIGURES = LOSSES + r"  [\d,]+ (?:tokens|samples)/s"
LINKS = r"  [\d.]+ \w?B up, [\d.]+ \w?B down a miner: \d+% of a round at \S+ Mbit/s"


class Terminal(Process):
    """A program in a terminal of so many columns and lines."""

    def __init__(self, command: list[str], log: Path, columns: int, lines: int, **environment: str) -> None:
        self.raw = b""
        self._screen = pyte.HistoryScreen(columns, lines, history=10_000)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        drawn = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
        kept = {name: value for name, value in os.environ.items() if name not in drawn}
        self._environment = {**kept, "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color", **environment}
        super().__init__(command, log)

    def start(self) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(self._screen.columns)
        self._popen = subprocess.Popen(
            self.command, stdin=theirs, stdout=theirs, stderr=theirs, env=self._environment, start_new_session=True
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def resize(self, columns: int) -> None:
        with self._lock:
            self._screen.resize(columns=columns)
            fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", self._screen.lines, columns, 0, 0))

    def _read(self) -> None:
        """Until the program has ended, which Linux tells by an error."""
        while True:
            try:
                chunk = os.read(self._ours, 1 << 16)
            except OSError:
                return
            with self._lock:
                self.raw += chunk
                self._stream.feed(chunk)

    @property
    def echoes(self) -> bool:
        """Return whether what is typed is shown."""
        return bool(termios.tcgetattr(self._ours)[3] & termios.ECHO)

    def lines(self) -> list[str]:
        """What is in sight now, without the empty lines at its end."""
        with self._lock:
            return "\n".join(line.rstrip() for line in self._screen.display).rstrip().split("\n")

    def said(self) -> str:
        """What is in sight, and all that was scrolled out of it."""
        with self._lock:
            width = range(self._screen.columns)
            above = ["".join(line[x].data for x in width).rstrip() for line in self._screen.history.top]
        return "\n".join([*above, *self.lines()])

    def forget(self) -> None:
        """All that is in sight now, and above it. What is drawn while a terminal gets narrower leaves remains."""
        above = self._screen.history.top
        before = len(above)
        eventually(lambda: len(above) >= before + self._screen.lines, "lines enough to scroll it out of sight")
        with self._lock:
            above.clear()

    def sees(self, *patterns: str) -> None:
        """Waits until the last lines in sight match the patterns."""

        def probe() -> bool:
            ended = self._popen.poll() is not None
            last = self.lines()[-len(patterns) :]
            found = len(last) == len(patterns) and all(map(re.fullmatch, patterns, last))
            assert found or not ended, "it ended"
            return found

        try:
            eventually(probe, "such lines")
        except AssertionError:
            seen = "\n".join([*patterns, "are not the last lines of", *self.lines()])
            raise AssertionError(f"{self.log.name}:\n{seen}") from None

    @property
    def cursor_hidden(self) -> bool:
        return bool(self._screen.cursor.hidden)

    def wait(self, patience_s: float = 90.0) -> int:
        code = super().wait(patience_s)
        self._reader.join(patience_s)
        return code

    def close(self) -> None:
        super().close()
        self._reader.join(10)
        os.close(self._ours)


# --- whole programs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A validator with a miner of its own and one in a terminal, at work until somebody presses Ctrl-C."""

    validator: Terminal
    miner: Terminal


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    place = tmp_path_factory.mktemp("place")
    with socket.create_server(("127.0.0.1", 0)) as vacated:
        port = str(vacated.getsockname()[1])
    ours = ["--local", "1", "--axons", port, "--rounds", "100000", "--eval-every", "4", "--logging.debug"]
    theirs = ["--wallet.path", str(place / "wallets"), "--cache", str(place / "miner"), "--axon.port", port]
    with (
        Terminal(program("validator.py", *quadratic_flags(place), *ours), place / "validator", 120, 24) as validator,
        Terminal(program("miner.py", *theirs, "--device", "cpu", "--threads", "1"), place / "log", 60, 24) as miner,
    ):
        yield Run(validator, miner)


def test_a_miner_shows_what_it_computes_and_its_receipts(run: Run) -> None:
    run.miner.sees(r"round \d+, (?:done|\d/4 batches) +[━╸╺]+ +loss \d\.\d{3}  [\d,]+ samples/s")
    assert "waiting for an order" in run.miner.raw.decode()
    run.miner.wait_for(r"^round \d+: ACCEPTED, 16 of 16 samples; weight [01]\.\d{3}, accepted")


def test_a_validator_shows_its_rounds_and_its_miners(run: Run) -> None:
    shown = run.validator
    row = r"5\w{7} \S.* \d/4 +\d+% +\d+ ms +\d\S*/\S+ +\d.* .?B +\d.* .?B ACCEPTED +0\.\d{3}"
    head = "miner +state +batches +util +latency +Mbit/s +up +down +verdict +weight"
    wide = [BAR + FIGURES + "  " + ETA, EPOCH + SHARDS + LINKS, head, row, row]
    shown.sees(*wide)
    assert re.search(rb"\x1b\[[0-9;]*32m", shown.raw)  # green
    assert shown.cursor_hidden
    assert re.search(r"DEBUG validator: round \d+: committed", shown.said())

    shown.resize(40)
    shown.sees(
        BAR + ETA,
        LOSSES,
        f"{EPOCH}(?:{SHARDS})?",
        "miner +state +verdict +weight",
        *[r"5\w{7} \S.* ACCEPTED +0\.\d{3}"] * 2,
    )
    shown.resize(120)
    shown.sees(*wide)


def test_a_terminal_is_left_in_order(run: Run) -> None:
    run.validator.forget()
    run.validator.interrupt()
    assert run.validator.wait() == 0
    assert re.fullmatch(r"stopped after round \d+ of \d+; --resume goes on from here", run.validator.lines()[-1])
    assert run.validator.said().count("ETA") == 1  # no remains of what was drawn before, between the lines of the log
    run.miner.interrupt()
    assert run.miner.wait() == 0
    assert "batches  ━" not in run.miner.said()
    assert not run.validator.cursor_hidden
    assert not run.miner.cursor_hidden


# --- the console by itself --------------------------------------------------------------------------------------------

SCRIPT = """
import asyncio, sys
from protocol import Fault, Receipt
from pilot.interfaces import MinerState
from pilot.display.console import Console

def hotkey(i): return "5" + f"{i:03}".replace("0", "z") + "G" * 44
def link(i): return MinerState(f"10.0.0.1:{8000 + i}", hotkey(i), "working" if i == 150 else "idle", 1, 2, 0.012, 3456,
                       78, *((20e6, 1234e6) if i == 160 else ()))
def receipt(i, verdict):
    return Receipt(run="r", round=0, hotkey=hotkey(i), order="0" * 64, verdict=verdict, reason="late\\x1b[2J\\x1b[31m",
                   done=(), work=0, scores={}, weight=0.25)

def broken(): raise RuntimeError("no links\\x1b[2J")

TABLE = "miners", ["hotkey", "accepted", "faults"], [[hotkey(1), 2, "1 LATE, 3 SILENT"]]

async def main(many, rounds):
    stranger = MinerState("[2001:db8:0:1:1:1:1:1]:8091\\x1b[2J", None, "away", 0, 0, 0.0, 0, 0)
    links = [link(i) for i in range(many)] + [stranger]
    with Console(rounds) as console:
        async with console.watching(broken if not many else lambda: tuple(links)):
            receipts = [receipt(i, Fault.LATE if i == 160 else "ACCEPTED") for i in range(many)]
            used = {f"utilisation.{hotkey(i)[:8]}": i / 200 for i in range(many) if i % 2}
            shards = {"epoch": 3, "epoch_done": 41, "epoch_total": 128, "shards": "32/32 8/32 1/32 0/32"}
            rates = {"link_up_mbps": 9.44, "link_down_mbps": 123.4, "communication": 0.034,
                     "miners": 2, "bytes_up": 6912, "bytes_down": 156e6}
            row = {"loss": 2.5, "val_loss": 2.25, "replica_val_loss": 2.375, "tokens_per_s": 123, **used, **shards,
                   **rates, "late_batches": 7}
            for round in range(rounds - 1):
                console.round({"round": round, **row}, receipts)
            console.table(*TABLE)
            console.say("said by a peer \\x1b[2J")
            await asyncio.sleep(3600 if sys.stdout.isatty() and len(sys.argv) == 3 else 0)
asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
"""


EPOCH_3 = "epoch 3  41/128"
LATE = "  late: 7 micro-batches noted"


def script(*arguments: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SRC)!r})\n{SCRIPT}", *arguments]


def test_two_hundred_miners_in_a_small_terminal(tmp_path: Path) -> None:
    with Terminal(script("200", "3"), tmp_path / "many", 130, 14) as shown:
        shown.sees(
            "said by a peer \ufffd\\[2J",
            BAR + FIGURES + "  " + ETA,
            EPOCH_3 + LATE + r"  shards █▂▁·" + LINKS,
            "miner +state +batches +util +latency +Mbit/s +up +down +verdict +weight why",
            r"516zGGGG +idle +1/2 +12 ms +20/1,234 +3.46 kB +78 B LATE +0\.250 late\ufffd\[2J\ufffd\[31m",
            r"515zGGGG +working .* ACCEPTED +0\.250",
            r"…:1:1:1:1:1\]:8091\ufffd\[2J +away +0 B +0 B",
            r"5zzzGGGG +idle .*",
            r"5zz1GGGG +idle +1/2 +0% .*",
            r"5zz2GGGG +idle .*",
            "and 195 more",
        )


def test_forty_columns_without_colours(tmp_path: Path) -> None:
    with Terminal(script("3", "3"), tmp_path / "narrow", 40, 20, NO_COLOR="1") as shown:
        shown.sees(
            "miners",
            "5zz1GGGG+",
            "GGGGGGGG",
            "  accepted 2",
            "  faults 1 LATE, 3 SILENT",
            "said by a peer \ufffd\\[2J",
            BAR + ETA,
            LOSSES,
            EPOCH_3,
            "miner +state +verdict +weight",
            *[r"5zz[z\d]GGGG idle +ACCEPTED +0\.250"] * 3,
            r"…091\ufffd\[2J away",
        )
        assert not COLOUR.search(shown.raw)


def test_a_failing_display_is_logged_and_the_run_continues(tmp_path: Path) -> None:
    with Terminal(script("0", "3", "to the end"), tmp_path / "broken", 140, 30) as shown:
        assert shown.wait() == 0
        assert "ERROR pilot.display.console: the display is not redrawn any more; the run continues" in shown.said()
        assert "RuntimeError: no links\ufffd[2J" in shown.said()


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TTY_INTERACTIVE": "0"}])
def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path, environment: dict[str, str]) -> None:
    with Terminal(script("3", "3", "to the end"), tmp_path / "dumb", 40, 30, **environment) as shown:
        assert shown.wait() == 0
        assert b"\x1b" not in shown.raw
        assert undated(shown.lines()[0]) == "round 1/3  loss 2.50"  # the terminal wraps it, not we


@pytest.mark.parametrize("colour", [{}, {"FORCE_COLOR": "1", "TTY_INTERACTIVE": "1"}])
def test_a_pipe_gets_plain_lines(colour: dict[str, str]) -> None:
    ended = subprocess.run(script("3", "3"), capture_output=True, text=True, check=True, env={**os.environ, **colour})
    assert "\x1b" not in ended.stdout
    first, second, *table, last = undated(ended.stdout).splitlines()
    said = (
        "loss 2.500  val 2.250 (miners' 2.375)  123 tokens/s  epoch 3  41/128  late: 7 micro-batches noted  "
        "3.46 kB up, 78 MB down a miner: 3% of a round at 9.44/123 Mbit/s"
    )
    assert [first, second] == [f"round {i}/3  {said}" for i in (1, 2)]
    assert re.fullmatch(r"│ 5zz1G+ │ +2 │ 1 LATE, 3 SILENT │", table[-2])
    assert last == "said by a peer \ufffd[2J"
    assert ended.stderr == ""
