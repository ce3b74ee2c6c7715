"""Bittensor key files: <path>/<name>/hotkeys/<hotkey>. A missing one is made only where the caller allows it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
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
            _create(wallet)
            say(f"made the wallet {name}/{hotkey} in {path}, unencrypted: its keys are good for tests only")
        return wallet.get_hotkey()
    except (ValueError, OSError, KeyfileError, WrongPasswordError) as error:
        raise ValueError(f"--wallet.hotkey {hotkey}: {error}") from None


def _create(wallet: Wallet) -> None:
    if not wallet.coldkey_file.exists_on_device():
        wallet.create_new_coldkey(use_password=False, suppress=True)
    wallet.create_new_hotkey(use_password=False, suppress=True)


def _command(name: str, hotkey: str, path: str) -> str:
    return shlex.join(["btcli", "wallet", "new-hotkey", "-w", name, "-H", hotkey, "--wallet-path", path])
