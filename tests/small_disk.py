"""Real file systems that are small, in a mount namespace that ends with its processes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-e", "-c"]


def mounted(folder: Path, size: str, command: list[str]) -> list[str]:
    """A command that runs with a file system of this size at `folder`."""
    folder.mkdir(exist_ok=True)
    return [*NAMESPACE, 'mount -t tmpfs -o size="$1" none "$2"; shift 2; exec "$@"', "sh", size, str(folder), *command]


def skip_without(folder: Path) -> None:
    """Ends the test where this machine makes none."""
    try:
        tried = subprocess.run(mounted(folder, "1m", ["true"]), check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no small file system here: {error}")
    if tried.returncode:
        pytest.skip(f"no small file system here: {tried.stderr.strip()}")
