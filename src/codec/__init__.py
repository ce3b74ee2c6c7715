"""Gradients and states ↔ bytes. A codec is stateless; the name of each on the wire is its key in `CODECS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from typing_extensions import Buffer

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]
    Specs = Mapping[str, torch.Size]  # what the receiver expects: the shape of each tensor


class Codec(Protocol):
    """Encodes named fp32 tensors, and decodes exactly those tensors from bytes that nobody vouches for."""

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> Buffer: ...

    def largest(self, specs: Specs) -> int:
        """The most bytes that such tensors can take: more is not worth receiving."""
        ...

    def decode(self, payload: Buffer, specs: Specs) -> Tensors:
        """The tensors, on the CPU, perhaps as views of `payload`. ProtocolError unless exactly those of `specs`."""
        ...


CODECS: dict[str, str] = {
    "fp32": "codec.dense:fp32",
    "bf16": "codec.dense:bf16",
}


def load_codec(name: str) -> Codec:
    """The codec of that name; ValueError where there is none. Imported when used, since it needs torch."""
    from importlib import import_module

    if name not in CODECS:
        raise ValueError(f"codec {name}: unknown; known: {', '.join(CODECS)}")
    module, attribute = CODECS[name].split(":")
    codec: Codec = getattr(import_module(module), attribute)
    return codec
