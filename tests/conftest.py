"""What every test may rely on."""

import signal


def pytest_configure() -> None:
    """Ctrl-C is not ignored, neither here nor in the processes that tests start: a job in the background does that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
