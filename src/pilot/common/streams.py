"""Keep a program going when nobody can read what it prints.

A reader may leave (`| head`), a log's disk may be full, a stream may be closed (`>&-`), and a terminal may not know
every character. The program's work is worth more than its lines, so none of this ends it.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any


def keep_streams() -> None:
    """Make standard output and error accept whatever is printed. Streams that something else replaced stay.

    What cannot be written any more is dropped, and a character that the encoding lacks becomes a question mark.
    """
    for descriptor in range(3):  # the next file that is opened would otherwise become the standard output
        if not _is_open(descriptor):
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    for name, descriptor, errors in (("stdout", 1, "replace"), ("stderr", 2, "backslashreplace")):
        stream: Any = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is not None:
            stream.flush()
        kept = io.TextIOWrapper(
            io.BufferedWriter(_Lenient(descriptor)),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors=errors,
            line_buffering=stream is None or stream.line_buffering or stream.write_through,
        )
        setattr(sys, name, kept)


def lost_output() -> bool:
    """Return whether standard output could not be written, for another reason than a reader who left."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _Lenient) and raw.failed


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class _Lenient(io.FileIO):
    """Writes to a descriptor, and after the first failure to nowhere."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.failed = False

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # a pipe that its other end made non-blocking, and is full
                select.select([], [self], [])
            return count
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno != errno.EPIPE:
                self.failed = True
                if self.fileno() == 1:
                    print(f"standard output: {error.strerror}; no more is shown", file=sys.stderr)
            return len(data)
