"""Hash bytes and versions with blake3-256, each kind under a domain of its own. `protocol` re-exports these names."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Final

from blake3 import blake3
from pydantic import StringConstraints
from typing_extensions import Buffer

PROTOCOL: Final = "pilot/2"  # version of the messages
CONTEXT: Final = "pilot/1"  # in every digest and random stream; a change would rename all files and reorder all data

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]  # blake3-256, in hex
Version = Digest


class Hasher:
    """blake3-256 under a domain: equal bytes of different kinds never share a digest."""

    def __init__(self, domain: str) -> None:
        self._state = blake3(derive_key_context=f"{CONTEXT} {domain}")

    def update(self, chunk: Buffer) -> None:
        self._state.update(chunk)

    def hexdigest(self) -> Digest:
        return self._state.hexdigest()


def digest(domain: str, data: Buffer) -> Digest:
    """Return the digest of `data` under `domain`: a kind of message or blob, or `payload`."""
    size = memoryview(data).nbytes
    threads = blake3.AUTO if size >= 1 << 20 else 1
    return blake3(data, derive_key_context=f"{CONTEXT} {domain}", max_threads=threads).hexdigest()


@lru_cache(maxsize=4096)  # the steps of an update are walked several times in a round
def next_version(base: Version | None, update: Digest) -> Version:
    """Return version(t+1) = hash(version(t), hash(update bytes)); the first version has no base."""
    return digest("version", bytes.fromhex(base or "00" * 32) + bytes.fromhex(update))
