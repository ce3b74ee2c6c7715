"""Gradients, deltas and states ↔ bytes. A codec is stateless; the name of each on the wire is one of `known_codecs()`.

`CODECS` has the plain ones. Beside them there is `topkK` for each K of `KEPT` (K of each 4,096 values, at 2 bits each),
`topkK-4bit`, and of all but the dense ones the entropy-coded form `NAME+entropy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from typing_extensions import Buffer

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]
    Specs = Mapping[str, torch.Size]  # what the receiver expects: the shape of each tensor


class Codec(Protocol):
    """Encodes named fp32 tensors, and reads exactly those tensors from bytes that nobody vouches for.

    `decode`, `check` and `add` raise ProtocolError for any other bytes, before they take more memory than the payload
    and one chunk of the tensors.
    """

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> Buffer:
        """Of any float type, on any device. What is not finite makes a payload that `check` refuses."""
        ...

    def largest(self, specs: Specs) -> int:
        """The most bytes that such tensors can take: more is not worth receiving."""
        ...

    def decode(self, payload: Buffer, specs: Specs) -> Tensors:
        """The tensors, fp32, on the CPU, perhaps as views of `payload`."""
        ...

    def check(self, payload: Buffer, specs: Specs) -> float:
        """All that can be wrong with it, NaN and infinity too (NONFINITE), without any tensor. The Euclidean norm."""
        ...

    def add(self, payload: Buffer, into: Tensors, weight: float = 1.0) -> None:
        """into[name] += weight * decoded[name], a chunk at a time: fp32, contiguous, on any device.

        One multiplication to dequantise, one by the weight, one addition, each rounded: the same bits on every device
        and with any number of threads. The payload has been checked; what is cheap to check is checked again.
        """
        ...


CODECS: dict[str, str] = {
    "fp32": "pilot.codec.dense:fp32",
    "bf16": "pilot.codec.dense:bf16",
    "int8": "pilot.codec.quantised:Int8",
    "int4": "pilot.codec.quantised:Int4",
    "2bit": "pilot.codec.quantised:TwoBit",
    "ternary": "pilot.codec.quantised:Ternary",
    "ternary-rc": "pilot.codec.ternary_rc:RowColumn",
    "1bit": "pilot.codec.quantised:OneBit",
}
DENSE = ("fp32", "bf16")
KEPT = (16, 32, 64, 128, 256, 512, 1024)
CHUNK = 4096  # values of which top-k keeps K

# Bits a parameter: those of the layout, and what entropy coding makes of them in bench/codec.py.
_BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.125, "int4": 4.125, "2bit": 2.125, "1bit": 1.125}
_BITS |= {"ternary": 1.725, "ternary-rc": 1.615}
_ENTROPY_BITS = {"int8": 7.64, "int4": 3.49, "2bit": 2.01, "1bit": 1.08, "ternary": 1.62, "ternary-rc": 1.56}


def known_codecs() -> tuple[str, ...]:
    """Every name that `load_codec` takes; a hello says them."""
    plain = [*CODECS, *(f"topk{k}{values}" for k in KEPT for values in ("", "-4bit"))]
    return (*plain, *(f"{name}+entropy" for name in plain if name not in DENSE))


def load_codec(name: str) -> Codec:
    """The codec of that name; ValueError where there is none. Imported when used, since it needs torch."""
    from importlib import import_module

    if name not in known_codecs():
        raise ValueError(
            f"codec {name[:64]}: unknown; known: {', '.join(CODECS)}, topkK and topkK-4bit with K one of "
            f"{', '.join(map(str, KEPT))}, and of all but {' and '.join(DENSE)} NAME+entropy"
        )
    plain, _, entropy = name.partition("+")
    module, attribute = CODECS.get(plain, "pilot.codec.topk:TopK").split(":")
    found = getattr(import_module(module), attribute)
    if plain in DENSE:
        codec: Codec = found
    elif plain in CODECS:
        codec = found(name, entropy=bool(entropy))
    else:
        kept, _, values = plain.removeprefix("topk").partition("-")
        codec = found(name, kept=int(kept), bits=4 if values else 2, entropy=bool(entropy))
    return codec


def bits(name: str) -> float:
    """Bits that a parameter takes, nominally, headers and padding aside. KeyError for an unknown name."""
    from math import log2

    plain, _, entropy = name.partition("+")
    if not plain.startswith("topk"):
        return (_ENTROPY_BITS if entropy else _BITS)[plain]
    kept, _, values = plain.removeprefix("topk").partition("-")
    index = log2(CHUNK / int(kept)) + 1.5 if entropy else 12.0
    return (int(kept) * (index + (4 if values else 2)) + 32) / CHUNK
