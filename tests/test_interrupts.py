"""Ctrl-C and SIGTERM: every program ends at once, at any moment, with one line."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import SRC, eventually
from tests.test_console import Terminal

ROOT = SRC.parent
PROMPT_S = 5.0  # on a busy machine; it takes some hundredths of a second
PROGRAMS = {
    "src/validator.py": (["--local", "1"], 130, "stopped before the run began; there is nothing to resume"),
    "src/miner.py": ([], 0, "stopped"),
    "nanochat_train.py": ([], 130, "stopped; nothing was trained yet"),
    "scripts/base_train.py": ([], 130, "stopped; nothing was trained yet"),
    "scripts/base_eval.py": ([], 130, "stopped"),
    "scripts/tok_train.py": ([], 130, "stopped; nothing was written"),
    "scripts/tok_eval.py": (["--tokenizer", "none"], 130, "stopped"),
    "scripts/simulate.py": (["--make", "spot"], 130, "stopped"),
    "scripts/chaos.py": ([], 130, "stopped"),
    "src/nanochat/dataset.py": (["-n", "1"], 130, "stopped; the same command goes on from here"),
}
CODE = f"""
import hashlib, os, subprocess, sys, threading, time
sys.path.insert(0, {str(SRC)!r})
from pilot.common import interrupts
interrupts.catch("program", "stopped here")

def ready():
    print("ready", flush=True)
"""


def start(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE + code]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def stopped(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
    """Send the signal, and return the exit code, and what was printed since, on both streams."""
    process.send_signal(number)
    out, error = process.communicate(timeout=PROMPT_S)
    return process.returncode, out, error


def catches(pid: int) -> bool:
    """Return whether the process has a handler for SIGTERM. Python itself has none."""
    status = Path(f"/proc/{pid}/status").read_text()
    [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the signals that a process catches")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_can_be_stopped_among_its_imports(program: str, number: signal.Signals) -> None:
    flags, code, line = PROGRAMS[program]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / program), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    eventually(lambda: catches(process.pid), "handler")
    name = "dataset" if program.endswith("dataset.py") else Path(program).name
    assert stopped(process, number) == (code, "", f"{name}: {line}\n")


def test_every_program_catches_signals_before_its_imports() -> None:
    """Only what `interrupts` itself needs may come before."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *SRC.glob("*.py"), *SRC.glob("nanochat/*.py")]
    programs = [file for file in files if '\nif __name__ == "__main__":\n' in file.read_text()]
    assert sorted(file.relative_to(ROOT).as_posix() for file in programs) == sorted(PROGRAMS)
    for file in programs:
        before = []
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.If) and "interrupts.catch(" in ast.unparse(node):
                break
            if isinstance(node, ast.Import | ast.ImportFrom):
                before.append(ast.unparse(node))
        else:
            pytest.fail(f"{file} does not catch signals")
        assert {*before} <= {
            "from __future__ import annotations",
            "import sys",
            "from pathlib import Path",
            "from pilot.common import interrupts",
        }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "busy",
    [
        "time.sleep(60)",
        "while True: pass",
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)",  # in C, where no handler of Python's runs
        "threading.Event().wait()",
        "subprocess.run(['sleep', '9'], stdout=-3, stderr=-3)",
        "lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "import asyncio; asyncio.run(asyncio.sleep(60))",
    ],
    ids=lambda code: code.split("(")[0],
)
def test_a_program_ends_whatever_it_does(busy: str, number: signal.Signals) -> None:
    process = start(f"ready()\n{busy}")
    assert stopped(process, number) == (130, "", "program: stopped here\n")


def test_what_was_printed_is_not_lost() -> None:
    process = start("ready(); time.sleep(0.2); print('a figure'); time.sleep(60)")
    time.sleep(0.4)
    assert stopped(process) == (130, "a figure\n", "program: stopped here\n")


def test_an_orderly_end_takes_the_first_signal_only() -> None:
    process = start("with interrupts.asking(ready):\n    ready()\n    time.sleep(60)")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert stopped(process) == (130, "", "program: stopped here\n")


def test_after_an_orderly_end_a_signal_ends_the_program() -> None:
    process = start("with interrupts.asking(lambda: print('asked', flush=True)):\n    pass\nready()\ntime.sleep(60)")
    assert stopped(process) == (130, "", "program: stopped here\n")


def test_a_signal_may_be_asked_for_again_and_again() -> None:
    process = start("with interrupts.asking(ready, repeats=True):\n    ready()\n    time.sleep(60)")
    assert process.stdout is not None
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()


@pytest.mark.parametrize("undo", ["print('undone', flush=True)", "time.sleep(60)", "1 / 0"])
def test_what_a_program_undoes_delays_its_end_for_a_second_at_most(undo: str) -> None:
    process = start(f"with interrupts.undoing(lambda: {undo}):\n    ready()\n    time.sleep(60)")
    code, out, error = stopped(process)
    assert code == 130
    assert out == ("undone\n" if "undone" in undo else "")
    assert error == ("" if "sleep" in undo else "program: stopped here\n")


def test_a_temporary_folder_goes(tmp_path: Path) -> None:
    code = "from pilot.common.files import temporary_folder\nfrom pathlib import Path\n"
    process = start(f"{code}with temporary_folder('x', Path({str(tmp_path)!r})):\n    ready()\n    time.sleep(60)")
    assert len([*tmp_path.iterdir()]) == 1
    assert stopped(process)[0] == 130
    assert not [*tmp_path.iterdir()]


def test_a_forked_process_is_not_the_program() -> None:
    """Its signals are its own: they do not count as its parent's, and its parent's line is not its own."""
    code = "if not os.fork(): print(os.getpid(), flush=True)\ntime.sleep(60)"
    process = start(f"ready()\n{code}")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    os.kill(child, signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    assert stopped(process) == (130, "", "program: stopped here\n")


def test_a_terminal_gets_its_cursor_and_its_echo_back(tmp_path: Path) -> None:
    code = CODE + "import getpass; print(chr(27) + '[?25l', end=''); ready(); getpass.getpass()"
    with Terminal([sys.executable, "-c", code], tmp_path / "log", 80, 24) as terminal:
        terminal.wait_for("Password")
        terminal.interrupt()
        assert terminal.wait() == 130
        terminal.wait_for(r"^program: stopped here")
        assert not terminal.cursor_hidden
        assert terminal.echoes
