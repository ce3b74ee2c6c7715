"""The time at the beginning of each line of a log."""

from __future__ import annotations

import re
import time

_DATE = "%Y-%m-%d %H:%M:%S"
_DATED = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", re.MULTILINE)


def dated(line: str) -> str:
    """Return the line after the local time."""
    return f"{time.strftime(_DATE)} {line}"


def undated(text: str) -> str:
    """Return a log's lines without their times."""
    return _DATED.sub("", text)
