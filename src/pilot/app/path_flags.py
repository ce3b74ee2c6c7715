"""Check the flags that name paths before any work is done, and find the flag that an error is about."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pilot.common.flags import Flag, flags_of
from pilot.common.paths import check_path, expanded

C = TypeVar("C")


def path_flags(config: type[object]) -> dict[str, Flag]:
    """Return the flags that name paths, by their options."""
    return {flag.option: flag for flag in flags_of(config).values() if flag.path is not None}


def refuse_empty(config: type[object], argv: Sequence[str]) -> None:
    """Raise ValueError for an empty path among the arguments: as a `Path` it would be the current folder."""
    flags, option = path_flags(config), ""
    for argument in argv:
        if argument.startswith("--"):
            option = argument.partition("=")[0].replace("_", "-")
        if (argument == "" or argument.endswith("=")) and option in flags and flags[option].default != "":
            expanded(option, argument.partition("=")[2])


def usable(config: C) -> C:
    """Return the configuration with ~ replaced in its paths. Raises ValueError for one that cannot serve its flag."""
    changed: dict[str, Any] = {}
    for flag in path_flags(type(config)).values():
        value: Any = functools.reduce(getattr, flag.name.split("."), config)
        if not value:
            continue
        given = value if isinstance(value, tuple) else (value,)
        found = tuple(type(path)(expanded(flag.option, str(path))) for path in given)
        for path in found:
            check_path(flag.option, Path(path), flag.path or "read")
        if found != given:
            changed[flag.name] = found if isinstance(value, tuple) else found[0]
    return replaced(config, changed) if changed else config


def replaced(config: Any, values: Mapping[str, Any]) -> Any:
    """Return the configuration with other values for flags, by their dotted names."""
    fields: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    for group in {name.partition(".")[0] for name in values if "." in name}:
        inside = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{group}.")}
        fields[group] = replaced(getattr(config, group), inside)
    return dataclasses.replace(config, **fields)


def paths_given(config: type[object], argv: Sequence[str]) -> dict[str, Path]:
    """Return the paths of the arguments, or by default, by their options; without those that are no plain paths."""
    given: dict[str, Any] = {option: flag.default for option, flag in path_flags(config).items()}
    for argument, value in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, after = argument.partition("=")
        if (option := name.replace("_", "-")) in given:
            given[option] = after if equals else value
    return {name: Path(value).expanduser() for name, value in given.items() if isinstance(value, str | Path) and value}
