"""Set up what every test relies on."""

import os
import signal

import pytest

LONGEST = ("test_processes.py", "test_console.py", "test_base_train.py", "test_cli.py")  # they start many processes


def pytest_configure() -> None:
    """Let Ctrl-C interrupt tests and their processes, which a shell disables in background jobs; keep torch to a core.

    `make test` runs a worker a core, so more threads in each only slow the others down.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that at the end no worker waits for another."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
