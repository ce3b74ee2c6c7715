"""TLS, where it is asked for. Who a miner is says its hotkey; TLS keeps what is sent from other eyes."""

from __future__ import annotations

import ssl
from pathlib import Path


def check_pair(cert: Path | None, key: Path | None, server: str) -> None:
    """Raises ValueError where only one of --SERVER.tls-cert and --SERVER.tls-key is given, or they cannot be used."""
    if (cert is None) != (key is None):
        given, other = ("cert", "key") if cert else ("key", "cert")
        raise ValueError(f"--{server}.tls-{given}: TLS needs --{server}.tls-{other} too")
    if cert is not None and key is not None:
        server_context(cert, key, server)


def server_context(cert: Path, key: Path, server: str = "axon") -> ssl.SSLContext:
    """From PEM files. Raises ValueError that names the flag, --SERVER.tls-…"""
    cert, key = cert.expanduser(), key.expanduser()
    for flag, path in (("cert", cert), ("key", key)):
        if not path.is_file():
            raise ValueError(f"--{server}.tls-{flag} {path}: no such file; name a PEM file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ValueError(
            f"--{server}.tls-cert {cert}: no certificate in PEM form that fits the unencrypted key of "
            f"--{server}.tls-key {key} ({_reason(error)})"
        ) from None
    return context


def client_context(ca: Path) -> ssl.SSLContext:
    """Trusts the certificates in a PEM file, and what they have signed. Raises ValueError that names the flag."""
    if not ca.is_file():
        raise ValueError(f"--tls-ca {ca}: no such file; name a PEM file with the certificate of who signs the others'")
    try:
        context = ssl.create_default_context(cafile=ca)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"--tls-ca {ca}: no certificate in PEM form ({_reason(error)})") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _no_password() -> str:
    raise ValueError("the key has a password")  # else OpenSSL would ask for it at the terminal


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error)
