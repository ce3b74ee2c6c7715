"""Declare command-line flags as dataclass fields.

A field's docstring is the flag's help. Its metadata says where the help shows the flag, what a resumed run does with
it, and how its path is used; the fields of a nested configuration inherit what their own metadata leaves out.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pilot.common.paths import PathUse

T = TypeVar("T")

Resume = Literal["fixed", "free", "command"]
"""fixed: a run keeps the value that it was started with. free: the run's value is the default of a resumed run, and may
be changed. command: belongs to one command, so a run does not record it."""


def arg(
    default: T,
    group: str | None = None,
    *,
    short: bool = False,
    resume: Resume | None = None,
    path: PathUse | None = None,
) -> T:
    """Declare a flag. With `short` it is shown by --help, else by --help-all only. With `path` it names a path."""
    return dataclasses.field(default=default, metadata=_metadata(group, short, resume, path))


def nested(config: Callable[[], T], group: str | None = None, *, resume: Resume | None = None) -> T:
    """Declare a nested configuration, whose flags are --name.…"""
    return dataclasses.field(default_factory=config, metadata=_metadata(group, False, resume))


def _metadata(group: str | None, short: bool, resume: Resume | None, path: PathUse | None = None) -> dict[str, Any]:
    given = {"group": group, "short": short or None, "resume": resume, "path": path}
    return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Flag:
    """One flag of a program, with what its field and the fields around it declare."""

    name: str
    """Dotted name with underscores, such as gpt2.seq_len."""
    type: Any
    default: Any
    owner: type[object]
    """The configuration class that has the field."""
    group: str = ""
    short: bool = False
    resume: Resume = "free"
    path: PathUse | None = None
    """How the path that it names is used; None if it names none."""

    @property
    def option(self) -> str:
        return option(self.name)

    @property
    def help(self) -> str:
        return docstring(self.owner, self.name.rpartition(".")[2])


def option(name: str) -> str:
    """Return the command-line form of a dotted name: --gpt2.seq-len."""
    return "--" + name.replace("_", "-")


def flags_of(config: type[object]) -> dict[str, Flag]:
    """Return every flag of a configuration class by its dotted name, nested ones included."""
    return {found.name: found for found in _walk(config(), "", {})}


def _walk(config: object, prefix: str, inherited: Mapping[str, Any]) -> Iterator[Flag]:
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        metadata, default = {**inherited, **field.metadata}, getattr(config, field.name)
        if dataclasses.is_dataclass(default):
            yield from _walk(default, f"{prefix}{field.name}.", metadata)
        else:
            kind = types[field.name]
            if Path in (kind, *typing.get_args(kind)):
                metadata = {"path": "read", **metadata}
            yield Flag(prefix + field.name, kind, default, type(config), **metadata)


def docstring(config: type[object], field: str) -> str:
    """Return the docstring under a field, on one line; "" where neither the class nor a base has one."""
    for base in config.__mro__:
        if text := _docstrings(base.__module__).get((base.__qualname__, field)):
            return " ".join(text.split())
    return ""


@cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    file = getattr(sys.modules[module], "__file__", None)
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body if file and file.endswith(".py") else ():
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[node.name, ast.unparse(field.target)] = str(ast.literal_eval(text.value))
    return found
