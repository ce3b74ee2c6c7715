"""Check the paths that flags give before any work is done, and name the flag if one fails later."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pilot.common.units import format_bytes

PathUse = Literal["read", "write", "log", "folder"]
"""read: a file, a folder, or for text flags also a name; whoever reads it checks the rest. write: a file that is
replaced as a whole. log: a file that is written line by line. folder: made if it is missing, and written into."""

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes

# Errors that the machine or its owner causes. Any other OSError is a fault of ours.
_MACHINE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}
    | {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG}
    | {errno.EBUSY, errno.ETXTBSY, errno.ESTALE}
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class PathError(Exception):
    """A path of a flag's cannot be used any more. The text names the flag."""


def expanded(option: str, text: str) -> str:
    """Return `text` with a leading ~ replaced. Raises ValueError, naming the flag, if it can be no path."""
    if not text:
        raise ValueError(f"{option} '': is empty; give a value, or leave {option} out")
    try:
        size, names = len(os.fsencode(text)), [os.fsencode(name) for name in text.split("/")]
    except UnicodeError:
        raise ValueError(f"{option} {text!a}: holds characters that no file name can have here") from None
    if "\0" in text:
        raise ValueError(f"{option} {text!a}: holds a NUL character, which no path can")
    if size > LONGEST_PATH or max(map(len, names)) > LONGEST_NAME:
        raise ValueError(
            f"{option} {text[:40]}…: too long; a name has at most {LONGEST_NAME} bytes, and a path {LONGEST_PATH}"
        )
    if not text.startswith("~"):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        user = text[1:].partition("/")[0]
        raise ValueError(
            f"{option} {text}: there is no user {user}; for a name that begins with ~, write ./{text}"
            if user
            else f"{option} {text}: this user has no home folder; set HOME, or give another {option}"
        )
    return path


def check_path(option: str, path: Path, use: PathUse) -> None:
    """Raise ValueError, naming the flag, if the path cannot be used so."""
    with naming(option, path):
        if use == "folder":
            _check_folder(option, path, path)
        elif use == "read":
            _check_source(option, path)
        else:
            _check_file(option, path, use)


def _check_source(option: str, path: Path) -> None:
    """Refuse what is no name either: a link to nothing, and a device, which may never end."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{option} {path}: is a link to what is not there; make that, or name another")
    if path.exists() and stat.S_IFMT(path.stat().st_mode) in (stat.S_IFCHR, stat.S_IFBLK):
        raise ValueError(f"{option} {path}: is a device; name a file or folder")


def _check_folder(option: str, given: Path, folder: Path) -> None:
    """Write a byte into the folder, or where it is missing into the one that it would be made in."""
    there = folder.absolute()
    while not there.exists():
        if there.is_symlink():
            raise ValueError(f"{option} {given}: {there} is a link to what is not there; make that, or name another")
        there = there.parent
    if not there.is_dir():
        raise ValueError(
            f"{option} {given}: {'' if there == given.absolute() else f'{there} '}is no folder; name another"
        )
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0")
    except OSError as error:
        into = "" if there == given.absolute() else f" into {there}"
        raise ValueError(f"{option} {given}: cannot write{into} ({error.strerror}); {_fix(error)}") from None


def _check_file(option: str, path: Path, use: PathUse) -> None:
    target = Path(os.path.realpath(path))
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{option} {path}: must be a file in a folder that is there")
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        if use == "write":
            raise ValueError(f"{option} {path}: is no regular file; name another")
    elif target.is_symlink():
        raise ValueError(f"{option} {path}: is a link to itself; name another")
    elif use == "write" or not target.exists():
        _check_folder(option, path, target.parent)
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_room(option: str, path: Path, size: int) -> None:
    """Raise ValueError, naming the flag, if a file of this size does not fit on the path's disk, as far as is known."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if most != resource.RLIM_INFINITY and size > most:
        raise ValueError(f"{option} {path}: takes {format_bytes(size)}; `ulimit -f` allows {format_bytes(most)} a file")
    free = shutil.disk_usage(there).free
    if size > free:
        raise ValueError(
            f"{option} {path}: takes {format_bytes(size)}, and its disk has {format_bytes(free)} left; "
            "free some space, or name another disk"
        )


@contextmanager
def naming(option: str, path: Path | str) -> Iterator[None]:
    """Raise PathError, which names the flag, if the block cannot use the flag's path. Errors on other files pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _MACHINE or not (error.filename is None or _is_in(_file(error), Path(path))):
            raise
        raise PathError(f"{option} {path}: {_reason(error, str(path))}") from error


def blamed(error: OSError, flags: Mapping[str, Path]) -> str | None:
    """Return a line that names the flag whose path an error is about; None if the error is a fault of ours."""
    if error.errno not in _MACHINE:
        return None
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.strerror}: raise the limit of this process with `ulimit -n`"
    name = _file(error)
    inside = [(len(path.parts), option, path) for option, path in flags.items() if _is_in(name, path)]
    if inside:
        _, option, path = max(inside)
        return f"{option} {path}: {_reason(error, str(path))}"
    return _reason(error) if name or error.errno in _FULL else None


def _file(error: OSError) -> str:
    return error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else str(error.filename or "")


def _is_in(name: str, path: Path) -> bool:
    return bool(name) and Path(name).absolute().is_relative_to(path.absolute())


def _reason(error: OSError, path: str = "") -> str:
    """Return why, with the file if it is another than the flag's, and what to do."""
    other = f"{name}: " if (name := _file(error)) not in ("", path) else ""
    return f"{other}{error.strerror or error}; {_fix(error)}"


def _fix(error: OSError) -> str:
    return "free some space, or name another disk" if error.errno in _FULL else "allow it, or name another"
