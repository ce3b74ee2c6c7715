"""Bittensor key files: <path>/<name>/hotkeys/<hotkey>. A missing one is made only where the caller allows it."""

from __future__ import annotations

import fcntl
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bittensor import Wallet
    from bittensor.sp_core import Keypair


def load_keypair(name: str, hotkey: str, path: str, *, create: bool, say: Callable[[str], None]) -> Keypair:
    """The hotkey's keypair.

    With `create`, a missing hotkey (and a missing coldkey above it) is made, unencrypted, and `say` is told so.
    Raises ValueError: it is missing, unreadable or encrypted under another password.
    """
    from bittensor import Wallet
    from bittensor.sp_core import KeyfileError, WrongPasswordError

    try:
        wallet = Wallet(name=name, hotkey=hotkey, path=path)
        if not wallet.hotkey_file.exists_on_device():
            if not create:
                raise ValueError(
                    f"no key file {wallet.hotkey_file.path}; make one with: {_command(name, hotkey, path)}"
                )
            with _alone(Path(path).expanduser() / name):
                if not wallet.hotkey_file.exists_on_device():
                    _create(wallet)
                    say(f"made the wallet {name}/{hotkey} in {path}, unencrypted: its keys are good for tests only")
        return wallet.get_hotkey()
    except (ValueError, OSError, KeyfileError, WrongPasswordError) as error:
        raise ValueError(f"--wallet.hotkey {hotkey}: {error}") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: miners that share a new wallet may be started at the same moment."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _create(wallet: Wallet) -> None:
    if not wallet.coldkey_file.exists_on_device():
        wallet.create_new_coldkey(use_password=False, suppress=True)
    wallet.create_new_hotkey(use_password=False, suppress=True)


def _command(name: str, hotkey: str, path: str) -> str:
    return shlex.join(["btcli", "wallet", "new-hotkey", "-w", name, "-H", hotkey, "--wallet-path", path])
