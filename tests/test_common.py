"""Test atomic files, units and addresses (pilot.common)."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pilot.common.addresses import is_loopback
from pilot.common.files import TEMPORARY, delete_leftovers, open_temporary, replacing
from pilot.common.units import format_bytes, format_mbps

# --- files ------------------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_takes_its_name_when_the_block_ends(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path, sync=sync) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_a_block_that_raises_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_two_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as first:
        first.write(b"first")
        with replacing(tmp_path / "a") as second:
            second.write(b"second")
        assert (tmp_path / "a").read_bytes() == b"second"
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


KILLED = """
import os, signal, sys
from pathlib import Path
from pilot.common.files import replacing
for name in sys.argv[1:]:
    block = replacing(Path(name))
    block.__enter__().write(b"half")
    globals()[name] = block
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_deleted(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a"), str(tmp_path / "b")]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent / "src")
    assert ended.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    with replacing(tmp_path / "a") as file:
        file.write(b"whole")
    a, b = names(tmp_path)
    assert a == "a"
    assert b.startswith("b.")
    with open_temporary(tmp_path / "c") as living:
        delete_leftovers(tmp_path)
        assert names(tmp_path) == ["a", Path(living.name).name]
    assert living.name.endswith(TEMPORARY)


# --- units and addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1 kB"), (3456, "3.46 kB"), (999_490, "999 kB"), (999_990, "1 MB")),
        *((45.1e9, "45.1 GB"), (2.5e12, "2.5 TB")),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("bps", "text"), [(0, "?"), (4000, "0.004"), (9.375e6, "9.38"), (99.96e6, "100"), (123e6, "123"), (1e9, "1,000")]
)
def test_format_mbps(bps: float, text: str) -> None:
    assert format_mbps(bps) == text


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("0.0.0.0", False), ("home", False)],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
