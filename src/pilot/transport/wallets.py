"""Bittensor key files: <path>/<name>/hotkeys/<hotkey>. A missing one is made only where the caller allows it."""

from __future__ import annotations

import fcntl
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bittensor import Wallet
    from bittensor.sp_core import Keypair


PASSWORD = "BT_WALLET_PASSWORD"  # bittensor's own variable


def load_keypair(name: str, hotkey: str, path: str, *, create: bool, say: Callable[[str], None]) -> Keypair:
    """The hotkey's keypair.

    With `create`, a missing hotkey (and a missing coldkey above it) is made, unencrypted, and `say` is told so.
    Raises ValueError if it is missing or unreadable, if its password is another one or nobody can be asked for it, and
    if it cannot sign what the other side accepts.
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
        keypair = wallet.get_hotkey(_password(wallet))
        _check_signs(keypair, wallet.hotkey_file.path)
        return keypair
    except OSError as error:
        raise ValueError(f"--wallet.path {path}: {error.filename or name}: {error.strerror}; name another") from None
    except (ValueError, EOFError, KeyfileError, WrongPasswordError) as error:
        raise ValueError(f"--wallet.hotkey {hotkey}: {str(error) or 'no password was given'}") from None


def _password(wallet: Wallet) -> str | None:
    """Return the password in the environment, if there is one; None: none is needed, or bittensor asks for it.

    Raises ValueError for an encrypted hotkey if there is nobody to ask.
    """
    file, password = wallet.hotkey_file, os.environ.get(PASSWORD)
    asks = sys.stdin is not None and sys.stdin.isatty()
    if file.is_encrypted() and not (asks or password or os.environ.get(file.env_var_name())):
        raise ValueError(
            f"{file.path} is encrypted, and there is no terminal to ask for its password; start it in a terminal, name "
            f"an unencrypted hotkey, or set {PASSWORD} in its environment"
        )
    return password


def _check_signs(keypair: Keypair, path: str) -> None:
    """Raise ValueError for a key whose every request the other side would refuse."""
    from bittensor.sp_core import CRYPTO_SR25519

    if keypair.crypto_type != CRYPTO_SR25519:
        raise ValueError(f"{path} is not an sr25519 key, the only kind that signs here; name another hotkey")
    try:
        keypair.sign(b"")
    except ValueError:
        raise ValueError(
            f"{path} holds only the public key, which cannot sign; restore the whole file from its mnemonic with "
            "btcli wallet regen-hotkey, or name another hotkey"
        ) from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: miners that share a new wallet may be started at the same moment."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _create(wallet: Wallet) -> None:
    if not wallet.coldkey_file.exists_on_device():
        wallet.create_new_coldkey(use_password=False, suppress=True)
    wallet.create_new_hotkey(use_password=False, suppress=True)


def _command(name: str, hotkey: str, path: str) -> str:
    return shlex.join(["btcli", "wallet", "new-hotkey", "-w", name, "-H", hotkey, "--wallet-path", path])
