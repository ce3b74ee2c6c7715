"""Encode gradients, deltas and states as bytes, and read them back from bytes that nobody vouches for.

A codec is stateless. Its name is what orders, hellos and payloads say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from typing_extensions import Buffer

from pilot.common.registry import load

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]
    Specs = Mapping[str, torch.Size]  # the shape of each tensor that the receiver expects, by name


class Codec(Protocol):
    """Encode named fp32 tensors, and decode exactly those tensors.

    `decode`, `check`, `add` and `read` raise ProtocolError for any other bytes, before they take more memory than the
    payload and one chunk of the tensors.
    """

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> Buffer:
        """Encode tensors of any float type, on any device. A value that is not finite makes `check` fail."""
        ...

    def largest(self, specs: Specs) -> int:
        """Return the most bytes that such tensors can take: a longer payload is not worth receiving."""
        ...

    def decode(self, payload: Buffer, specs: Specs) -> Tensors:
        """Return the tensors in fp32 on the CPU, possibly as views of `payload`."""
        ...

    def check(self, payload: Buffer, specs: Specs) -> float:
        """Check everything, NaN and infinity included (NONFINITE), without making a tensor. Returns the norm."""
        ...

    def add(self, payload: Buffer, into: Tensors, weight: float = 1.0) -> None:
        """Compute into[name] += weight * decoded[name], a chunk at a time: fp32, contiguous, on any device.

        One multiplication to dequantise, one by the weight and one addition, each rounded: the same bits on every
        device and with any number of threads. The payload has been checked; what is cheap to check is checked again.
        """
        ...

    def read(self, payload: Buffer, specs: Specs, start: int, stop: int) -> torch.Tensor:
        """Return coordinates [start, stop) of the decoded gradient as a vector, fp32 on the CPU.

        The gradient is the concatenation of all tensors in the order of their names. Memory and time are those of the
        block, not of the gradient, and the values equal the same slice of `decode` bit for bit. The payload has been
        checked. Raises IndexError for a block that does not lie in the gradient.
        """
        ...


CODECS: dict[str, str] = {
    "fp32": "pilot.codec.dense:FP32",
    "bf16": "pilot.codec.dense:BF16",
    "int8": "pilot.codec.quantised:INT8",
    "int4": "pilot.codec.quantised:INT4",
    "2bit": "pilot.codec.quantised:TWO_BIT",
    "ternary-rc": "pilot.codec.ternary_rc:TERNARY_RC",
    "1bit": "pilot.codec.quantised:ONE_BIT",
    "topk64": "pilot.codec.topk:TOPK64",
}
DENSE = ("fp32", "bf16")


class CodecCost(NamedTuple):
    """Seconds for a megabyte of fp32 values, on one core."""

    encode: float  # into bytes, and their digest
    check: float
    add: float  # to other tensors


# Nominal bits per parameter, without the header and the padding of the last blocks.
BITS = {
    "fp32": 32.0,
    "bf16": 16.0,
    "int8": 8.125,
    "int4": 4.125,
    "2bit": 2.125,
    "ternary-rc": 1.615,
    "1bit": 1.125,
    "topk64": (64 * (12 + 2) + 32) / 4096,
}

# Costs as `pilot.simulation.costs.measure_codec` found them once, over 124 million values on one core of a server.
COSTS = {
    "fp32": CodecCost(0.00025, 0.00017, 0.00010),
    "bf16": CodecCost(0.00015, 0.00015, 0.00015),
    "int8": CodecCost(0.00033, 0.00009, 0.00010),
    "int4": CodecCost(0.00025, 0.00012, 0.00013),
    "2bit": CodecCost(0.00037, 0.00012, 0.00014),
    "ternary-rc": CodecCost(0.00057, 0.00022, 0.00020),
    "1bit": CodecCost(0.00021, 0.00012, 0.00014),
    "topk64": CodecCost(0.00048, 0.00003, 0.00010),
}


def known_codecs() -> tuple[str, ...]:
    """Return every name that `load_codec` takes; a hello lists them."""
    return tuple(CODECS)


def load_codec(name: str) -> Codec:
    """Return the codec of that name. Raises ValueError for an unknown one."""
    codec: Codec = load("codec", name, CODECS)
    return codec


def bits(name: str) -> float:
    """Return the nominal bits that a parameter takes. Raises KeyError for an unknown name."""
    return BITS[name]
