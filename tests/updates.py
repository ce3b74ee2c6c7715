"""Ways to a version, as orders name them."""

from __future__ import annotations

from protocol import BlobRef, Update, Version, VersionStep


def whole_state(ref: BlobRef, base: Version | None = None, codec: str = "fp32") -> Update:
    """The way of `--broadcast full`: a state in place of what was there."""
    return Update(base=base, steps=(VersionStep(kind="state", codec=codec, digest=ref.digest, bytes=ref.bytes),))
