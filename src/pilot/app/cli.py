"""Parse flags into dataclasses, report mistakes in one line, and prepare the process: device, threads, memory.

A user's mistake ends the program with exit code 2 and one line that names flag, value and fix. So does what the machine
refuses, such as a full disk, with exit code 1 once the program is at work. Any other error raises.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import gc
import getpass
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pilot.app.path_flags import paths_given, refuse_empty, usable
from pilot.common.flags import flags_of, option
from pilot.common.paths import PathError, blamed, check_path, expanded
from pilot.common.streams import keep_streams, lost_output

if TYPE_CHECKING:
    import torch

C = TypeVar("C")
Main = Callable[..., None]

SHOWN = 80  # characters of a mistaken name or value

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h


def fail(program: str, reason: str, code: int = 2) -> NoReturn:
    """Print one line on standard error and exit, by default with the code of a user's mistake."""
    print(f"{program}: {' '.join(reason.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def program(name: str, config: type[object]) -> Callable[[Main], Main]:
    """Decorate a program's `main`: nothing that it prints ends it, and what the machine refuses is one line."""

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None, program: str = name) -> None:
            keep_streams()
            try:
                main(argv) if program == name else main(argv, program)
            except PathError as error:
                fail(program, str(error), code=1)
            except OSError as error:
                reason = blamed(error, paths_given(config, sys.argv[1:] if argv is None else argv))
                if reason is None:
                    raise
                fail(program, reason, code=1)
            if lost_output():
                raise SystemExit(1)

        return run

    return decorate


@contextlib.contextmanager
def mistakes(program: str) -> Iterator[None]:
    """Report a ValueError, which during set-up is about a flag or a file of the user's, as a mistake."""
    try:
        yield
    except ValueError as error:
        fail(program, str(error))


def parse(cls: type[C], program: str, argv: Sequence[str], defaults: Sequence[str] = ()) -> C:
    """Return the configuration that the flags give. `defaults`, then the file of --config, are flags before them."""
    argv = [argument for argument in argv if argument != "--"]  # torchrun's users write it before the script's flags
    if {"-h", "--help", "--help-all"} & set(argv):
        from pilot.app.help import help_text

        print(help_text(cls, program, everything="--help-all" in argv), end="")
        raise SystemExit(0)
    import tyro

    with mistakes(program):
        argv = [*defaults, *file_flags(cls, argv), *argv]
        refuse_empty(cls, argv)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(cls, prog=program, args=argv)
    except SystemExit as ended:
        if ended.code:
            fail(program, _first_paragraph(said.getvalue()))
        raise
    with mistakes(program):
        config = usable(config)
    _stand_in_for_user()
    return config


def _stand_in_for_user() -> None:
    """Give libraries a name and a home folder for a user that the machine does not know, as there is in a container.

    torch names a folder after the user, and bittensor looks for the home folder when it is imported.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/nonexistent"


def file_flags(cls: type[object], argv: Sequence[str]) -> list[str]:
    """Return the flags in the JSON file that --config names, if any.

    Groups may be nested or dotted, and names may have hyphens. Raises ValueError for an unreadable file, an unknown
    field, or a value of the wrong type.
    """
    path = flag_value(argv, "--config")
    if path is None:
        return []
    path = expanded("--config", path)
    check_path("--config", Path(path), "read")
    try:
        return _flags_in(cls, path)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}; name a JSON file of flags") from None
    except RecursionError:
        raise ValueError(
            f'--config {path}: nested too deeply; give flags like {{"optimizer": {{"lr": 0.1}}}}'
        ) from None


def _flags_in(cls: type[object], path: str) -> list[str]:
    from pydantic import TypeAdapter, ValidationError

    twice: list[str] = []

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice.extend(name for name in names if names.count(name) > 1)
        return dict(pairs)

    try:
        values = json.loads(Path(path).read_bytes(), object_pairs_hook=distinct, parse_constant=_no_number)
    except ValueError as error:
        raise ValueError(f"--config {path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f'--config {path}: must be a JSON object of flags, like {{"rounds": 100}}')
    if twice:
        raise ValueError(f"--config {path}: {_short(twice[0])} is given twice; remove one")
    known = flags_of(cls)
    flags: dict[str, list[str]] = {}
    for name, value in _dotted(values, ""):
        name = name.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name[:SHOWN], known, 1, 0.0)[0]
            raise ValueError(f"--config {path}: unknown field {_short(name)}; the nearest known one is {near}")
        if name in ("config", "resume", "resume_at"):
            raise ValueError(f"--config {path}: {name} cannot be set in a file; give {option(name)} as a flag")
        if name in flags:
            raise ValueError(f"--config {path}: {name} is given twice; remove one")
        text = json.dumps(value)
        try:
            TypeAdapter(known[name].type).validate_json(text, strict=True)
        except ValidationError as error:
            expected = " or ".join(dict.fromkeys(detail["msg"].lower() for detail in error.errors()))
            raise ValueError(f"--config {path}: {name} is {_short(text)}: {expected}") from None
        flags[name] = as_flags(name, value)
    return [flag for each in flags.values() for flag in each]


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _dotted(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested JSON objects by their dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag, before anything is parsed."""
    value = None
    for i, argument in enumerate(argv):
        if argument == flag and i + 1 < len(argv):
            value = argv[i + 1]
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
    return value


def flatten(config: object, prefix: str = "") -> dict[str, Any]:
    """Return a configuration's values by dotted name."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = str(value) if isinstance(value, Path) else value
    return flat


def as_flags(name: str, value: Any) -> list[str]:
    """Return the command-line arguments that give a flag this value."""
    if isinstance(value, bool):
        group, _, last = name.rpartition(".")
        return ["--" + (f"{group}." if group else "") + ("" if value else "no-") + last.replace("_", "-")]
    values = value if isinstance(value, list | tuple) else [value]
    return ["--" + name.replace("_", "-"), *map(str, values)]


def recorded_flags(values: Mapping[str, Any], cls: type[object]) -> list[str]:
    """Return the flags that a run was started with, if they differ from the defaults and a run records them."""
    flags: list[str] = []
    for name, known in flatten(cls()).items():
        value = values.get(name, known)
        if value is not None and value != known and flags_of(cls)[name].resume != "command":
            flags += as_flags(name, value)
    return flags


def _first_paragraph(box: str) -> str:
    """Return tyro's error as one line: the text of its box up to the first rule, and the flag that it suggests."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line.strip("─") == "" and line]
    first = " ".join(lines[1 : rules[0]] if rules else lines[1:])
    hint = next((i for i, line in enumerate(lines) if line.startswith("Perhaps you meant")), None)
    return first + (f"; perhaps you meant {lines[hint + 1]}" if hint is not None else "; see --help")


def pick_device(name: str) -> torch.device:
    """Return the device of --device. Raises ValueError if this machine lacks it."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps") from None
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= there:
        raise ValueError(f"--device {name}: this machine has {there or 'no'} {device.type} device; use cpu, or auto")
    return device


def reuse_memory() -> None:
    """Make glibc keep freed blocks in the process, whatever their size. Without glibc, do nothing.

    glibc returns blocks of over 32 MB at once, and the kernel clears their pages again at the next use, which takes 5
    to 9 % of a step of GPT-2 124M on two cores.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_THRESHOLD, 2**31 - 1), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(option, value)


def settle_memory() -> None:
    """Exclude all current objects from the cycle collector, and make it run less often.

    Scanning torch's objects took 0.85 of the 6.7 ms that each miner costs a validator of 64 miners in a round.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries report frozen objects as leaks
    gc.set_threshold(10_000, 20, 20)


def check_compiler() -> None:
    """Raise ValueError if this machine has no C++ compiler, which --compile needs."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "c++")):
        raise ValueError(
            "--compile: torch.compile needs a C++ compiler, such as g++; install one, or leave --compile out"
        )


def check_port(flag: str, port: int) -> None:
    """Raise ValueError for an impossible TCP port."""
    if not 0 <= port < 65536:
        raise ValueError(f"--{flag} {port}: must be 0 to 65535")


def keep_files_private() -> None:
    """Let nobody but this user read what the process and its children create: there are keys and receipts among it."""
    os.umask(0o077)


def set_threads(threads: int) -> None:
    """Set torch's CPU threads. For 0, do not even import torch."""
    if threads < 0:
        raise ValueError(f"--threads {threads}: must be 0 or more")
    if threads:
        import torch

        torch.set_num_threads(threads)
