"""End a program at once on Ctrl-C (SIGINT) and SIGTERM, with one line and without a traceback.

A thread waits for the signals: the main thread may be in the middle of an import, or of a call that takes minutes.
Where work can be finished in an orderly way, `asking` takes the first signal; the next one ends the program. Nothing is
unwound, so files must be written in a way that survives a SIGKILL, as all of ours are.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from pilot.common.streams import keep_streams

try:
    import termios
except ImportError:  # not a Unix
    termios = None  # type: ignore[assignment]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CODE = 130
CLEAN_UP_S = 1.0
SHOW_CURSOR = b"\x1b[?25h"


class _Program:
    """What this process does on a signal. There is one, as signals are the process's."""

    def __init__(self) -> None:
        self.name = ""
        self.line: Callable[[], str] = lambda: "stopped"
        self.code = CODE
        self.ask: Callable[[], object] | None = None
        self.repeats = False
        self.undo: list[Callable[[], object]] = []
        self.terminal: list[object] | None = None  # its settings: a prompt for a password hides what is typed


_program = _Program()


def catch(name: str, line: str = "stopped", code: int = CODE) -> None:
    """From now on end this process on a signal. Call it before the imports that take seconds, in the main thread.

    A program that was started by its file has called it already when its `main` does; then nothing changes.
    """
    if _program.name:
        return
    keep_streams()  # before the pipe below could take the place of a closed one
    _program.name = name
    says(line, code)
    if termios is not None and sys.stdin is not None:
        with suppress(termios.error, ValueError, OSError):
            _program.terminal = termios.tcgetattr(sys.stdin)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _ignore)
    os.register_at_fork(after_in_child=_restore)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def says(line: str | Callable[[], str], code: int = CODE) -> None:
    """Set the line and the exit code with which a signal ends the program. A function is called at that moment."""
    _program.line = line if callable(line) else lambda: line
    _program.code = code


def line() -> str:
    """Return the line with which a signal would end the program now."""
    return _program.line()


@contextmanager
def asking(ask: Callable[[], object], repeats: bool = False) -> Iterator[None]:
    """Within the block the first signal calls `ask`, from another thread. With `repeats` every signal does."""
    _program.ask, _program.repeats = ask, repeats
    try:
        yield
    finally:
        _program.ask = None


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo`, from another thread, if a signal ends the program within the block. It must not take long."""
    _program.undo.append(undo)
    try:
        yield
    finally:
        _program.undo.remove(undo)


def _ignore(number: int, frame: object) -> None:
    """Do nothing: the thread acts. Without a handler in Python the signal would not reach it."""


def _restore() -> None:
    """Give a forked process the default handlers: it would write to its parent's pipe."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(reader: int) -> None:
    while True:
        for number in os.read(reader, 1024):
            if number not in SIGNALS:
                continue
            ask = _program.ask
            if ask is None:
                _end()
            elif not _program.repeats:
                _program.ask = None
            with suppress(RuntimeError):  # its event loop has just been closed
                ask()


def _end() -> NoReturn:
    last = threading.Timer(CLEAN_UP_S, os._exit, [_program.code])  # what follows may wait for the main thread
    last.daemon = True
    last.start()
    for undo in reversed(_program.undo):
        with suppress(Exception):
            undo()
    if _program.terminal is not None:
        with suppress(termios.error, ValueError, OSError):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, _program.terminal)  # type: ignore[arg-type]
    with suppress(Exception):
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), SHOW_CURSOR + b"\r\n")
    said = "stopped"
    with suppress(Exception):
        said = _program.line()
    with suppress(OSError):
        os.write(2, f"{_program.name}: {said}\n".encode())
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(_program.code)
