"""Append a model's buffers to a gradient's payload, such as a batch norm's running statistics.

    payload = the codec's bytes of the gradient, then the buffers as canonical fp32 (safetensors)

The length of the second part follows from the shapes. A task without buffers appends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from pilot.codec import load_codec
from protocol import ProtocolError

if TYPE_CHECKING:
    import torch

    from pilot.codec import Specs, Tensors


def append(payload: Buffer, buffers: Mapping[str, torch.Tensor]) -> Buffer:
    """Return the payload with the buffers behind it. Integers are exact up to 2^24."""
    if not buffers:
        return payload
    return b"".join((payload, load_codec("fp32").encode({name: b.detach().float() for name, b in buffers.items()})))


def largest(specs: Specs) -> int:
    """Return the bytes that buffers of these shapes take."""
    return load_codec("fp32").largest(specs) if specs else 0


def gradient(payload: Buffer, specs: Specs) -> Buffer:
    """Return the part of the gradient. Raises ProtocolError for a payload that is shorter than the buffers."""
    view, size = memoryview(payload).cast("B"), largest(specs)
    if view.nbytes < size:
        raise ProtocolError(f"a payload of {view.nbytes} bytes, its buffers alone take {size}")
    return view[: view.nbytes - size] if size else payload


def check(payload: Buffer, specs: Specs) -> float:
    """Return the norm of the buffers. Raises ProtocolError for another layout, and NONFINITE for NaN or infinity."""
    return load_codec("fp32").check(memoryview(payload).cast("B")[-largest(specs) :], specs) if specs else 0.0


def buffers(payload: Buffer, specs: Specs) -> Tensors:
    """Return the buffers in fp32. Raises ProtocolError as `check` does."""
    if not specs:
        return {}
    check(payload, specs)
    return load_codec("fp32").decode(memoryview(payload).cast("B")[-largest(specs) :], specs)
