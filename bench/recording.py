"""Record the demo as a person sees it: docs/demo.svg, docs/demo_80.svg, docs/demo.cast, and its plot demo_loss.png.

    python -m bench.recording                 # the whole demo twice, five minutes
    python -m bench.recording --rounds 60     # any flags of validator.py
    asciinema play docs/demo.cast

The program runs under a pseudo terminal, of 140 and then of 80 columns, whose screen `pyte` keeps. A picture shows the
screen at about two thirds of the rounds, with the live view, and below it the report of the end. The recording is in
asciicast's format (version 2).
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {140: "demo.svg", 80: "demo_80.svg"}  # by the terminal's columns
ROWS = 36
FRAME_S = 0.5  # between two events of the recording
CHUNK_BYTES = 1 << 16
SHOWN = 2 / 3  # share of the rounds done when the live view is taken
HISTORY = 10_000  # lines that have scrolled off
COLOURS = {"brown": "yellow", "brightbrown": "bright_yellow"}  # pyte's names that rich does not have

# As rich's own format, but for its fonts, which a browser would fetch from the net.
SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-family: sans-serif; font-size: 16px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def main(argv: Sequence[str]) -> None:
    for columns, picture in PICTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            runs = Path(folder)
            command = [sys.executable, "src/validator.py", "--config", "experiments/demo.json"]
            command += ["--runs", str(runs), "--run", "demo", "--wallet.path", str(runs / "wallets"), *argv]
            live, end, cast = record(command, columns)
            head, gap = Text("$ make demo", style="bold"), Text("[…]", style="dim")
            lines = [head, *live, Text(""), gap, Text(""), *report(end)]
            draw([hide(line, folder) for line in lines], ROOT / "docs" / picture, columns)
            if picture == "demo.svg":
                (ROOT / "docs" / "demo.cast").write_text(cast.replace(folder, "runs"))
                shutil.copyfile(runs / "demo" / "loss.png", ROOT / "docs" / "demo_loss.png")


def record(command: Sequence[str], columns: int) -> tuple[list[Text], list[Text], str]:
    """Run a command to its end in a terminal of its own.

    Return the screen of SHOWN, all lines of the end, and the recording.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(ROWS)}
    events = [json.dumps({"version": 2, "width": columns, "height": ROWS, "title": "make demo"})]
    began, pending, sent = time.monotonic(), b"", 0.0
    process = subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    screen = pyte.HistoryScreen(columns, ROWS, history=HISTORY, ratio=0.5)
    stream, live = pyte.ByteStream(screen), list[Text]()
    for chunk in chunks(master):
        stream.feed(chunk)
        pending, now = pending + chunk, time.monotonic() - began
        if now - sent >= FRAME_S:
            events.append(json.dumps([round(now, 2), "o", pending.decode(errors="replace")], ensure_ascii=False))
            pending, sent = b"", now
        sys.stderr.write(".")
        sys.stderr.flush()
        if not live and progress(screen.display) >= SHOWN:
            live = screen_lines(screen)
    os.close(master)
    if process.wait():
        raise SystemExit("\n".join(["the demo failed:", *(line.rstrip() for line in screen.display)]))
    events.append(json.dumps([round(time.monotonic() - began, 2), "o", pending.decode(errors="replace")]))
    history = [text(row, columns) for row in screen.history.top]
    return live, [*history, *screen_lines(screen)], "\n".join(events) + "\n"


def chunks(descriptor: int) -> Iterator[bytes]:
    """Yield what the terminal receives, until the program ends."""
    while True:
        try:
            chunk = os.read(descriptor, CHUNK_BYTES)
        except OSError:  # Linux says EIO when the last writer is gone
            return
        if not chunk:
            return
        yield chunk


def progress(display: Sequence[str]) -> float:
    """Return the share of the rounds that the live view says are done; 0 without one."""
    found = [re.search(r"\bround (\d+) ?/ ?(\d+)", line) for line in display]
    shares = [int(match[1]) / int(match[2]) for match in found if match]
    return shares[-1] if shares else 0.0


def screen_lines(screen: Any) -> list[Text]:
    """Return the rows of a screen down to the last one that is not empty."""
    lines = [text(screen.buffer[row], screen.columns) for row in range(screen.lines)]
    while lines and not lines[-1].plain.strip():
        lines.pop()
    return lines


def text(row: Mapping[int, Any], columns: int) -> Text:
    """Return a row of pyte's characters with their colours."""
    line = Text()
    for column in range(columns):
        char = row[column]
        colour = char.fg if char.fg != "default" else None
        if colour and re.fullmatch(r"[0-9a-f]{6}", colour):
            colour = f"#{colour}"
        elif colour:
            colour = COLOURS.get(colour, colour.replace("bright", "bright_"))
        line.append(char.data, Style(color=colour, bold=char.bold, italic=char.italics, reverse=char.reverse))
    line.rstrip()
    return line


def report(lines: Sequence[Text]) -> list[Text]:
    """Return the report, which begins with the run's name."""
    start = max(i for i, line in enumerate(lines) if line.plain.strip() == "demo")
    return list(lines[start:])


def hide(line: Text, folder: str) -> Text:
    """Return the line with the temporary folder called `runs`, as in a run of one's own."""
    line = line.copy()
    while (at := line.plain.find(folder)) >= 0:
        line = Text.assemble(line[:at], "runs", line[at + len(folder) :])
    return line


def draw(lines: Sequence[Text], path: Path, columns: int) -> None:
    """Write the lines as the picture of a terminal."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True, color_system="truecolor")
        for line in lines:
            console.print(line, no_wrap=True, overflow="crop", crop=True)
        console.save_svg(str(path), title="make demo", code_format=SVG, unique_id="demo")


if __name__ == "__main__":
    main(sys.argv[1:])
