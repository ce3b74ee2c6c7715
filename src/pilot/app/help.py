"""Render --help and --help-all from the configuration classes, without the parser and without torch."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pilot.common.flags import Flag, flags_of, option

WIDEST = 118  # columns: longer lines are hard to read
LEFT = 28  # columns for a flag and what it takes; a longer one has its text on the next line


def help_text(config: type[object], program: str, everything: bool) -> str:
    """Return the help of a program: the flags that people need, or with `everything` all, with their full texts.

    A class may order its groups in `groups`. Where no flag is marked `short`, all are shown.
    """
    flags = list(flags_of(config).values())
    everything = everything or not any(flag.short for flag in flags)
    shown = [flag for flag in flags if everything or flag.short]
    groups: tuple[str, ...] = getattr(config, "groups", ())
    names = sorted({f.group: None for f in shown}, key=lambda g: groups.index(g) if g in groups else -1)
    lines = [f"usage: {program} [flags]", "", *inspect.cleandoc(config.__doc__ or "").splitlines()]
    for name in names:
        lines += ["", bold(name or "Flags")]
        lines += _group([flag for flag in shown if flag.group == name], everything)
    if everything:
        lines += ["", "  -h, --help".ljust(LEFT) + "Show the flags that most people need, or these."]
    else:
        lines += ["", f"[default]   --help-all shows all {len(flags)} flags, with more about each."]
    return "\n".join(lines) + "\n"


def _group(flags: list[Flag], everything: bool) -> Iterator[str]:
    """Yield the lines of a group's flags, its own first, then each nested configuration's."""
    prefixes = {f.name.rpartition(".")[0] if everything else "": None for f in flags}
    for prefix in sorted(prefixes, key=lambda p: p != ""):
        inside = [flag for flag in flags if not everything or flag.name.rpartition(".")[0] == prefix]
        if prefix:
            about = inspect.cleandoc(inside[0].owner.__doc__ or "").partition("\n\n")[0]
            yield from _wrapped(f"{option(prefix)}.…: {about}", "  ")
        for flag in inside:
            yield from _flag(flag, everything)


def _flag(flag: Flag, everything: bool) -> Iterator[str]:
    left = "  " + " ".join(filter(None, [shown_option(flag), metavar(flag.type)]))
    text = flag.help if everything else first_sentence(flag.help).removesuffix(".")
    if default := shown_default(flag.default):
        text += f" (default: {default})" if everything else f" [{default}]"
    right = _wrapped(text, " " * LEFT)
    if len(left) <= LEFT - 2:
        right[0] = left.ljust(LEFT) + right[0][LEFT:]
    else:
        yield left
    yield from right


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    return textwrap.wrap(
        " ".join(text.split()),
        max(width, 60),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[\w)]\.) ", text, maxsplit=1)[0]


def shown_option(flag: Flag) -> str:
    """Return the form that changes the default: --baseline, or --no-baseline if it is on."""
    prefix, dot, last = flag.name.rpartition(".")
    return option(f"{prefix}{dot}no-{last}") if flag.default is True else option(flag.name)


def metavar(kind: Any) -> str:
    """Return what a flag of this type takes, in capitals or as its choices; "" for a switch."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, arguments))
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return "|".join(filter(None, (metavar(choice) for choice in arguments if choice is not type(None))))
    if typing.get_origin(kind) is tuple:
        return f"{metavar(arguments[0])} …"
    return {bool: "", int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def shown_default(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None or value is False else "on" if value is True else str(value)
