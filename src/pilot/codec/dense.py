"""Encode every value, in fp32 or bf16, as safetensors in one canonical layout.

Canonical: tensors in the order of their names, no metadata, no gaps. The receiver knows names, shapes and dtype, so it
knows the header's exact bytes: checking a payload is one comparison, and nothing in it is ever interpreted. The tensors
are then views of the payload. Any safetensors reader opens the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from typing_extensions import Buffer

from pilot.codec.packed import pieces_of
from pilot.common.safetensors_header import dtype_name, safetensors_header
from protocol import Fault, ProtocolError

if TYPE_CHECKING:
    from pilot.codec import Specs, Tensors

CHUNK = 1 << 15  # values at a time: few enough for one thread of torch, and for the cache


class Dense:
    """32 or 16 bits a parameter. bf16 rounds to nearest even; its decoding to fp32 is exact."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> memoryview:
        header = self._header({name: tensor.shape for name, tensor in tensors.items()})
        size = sum(t.numel() for t in tensors.values()) * self.dtype.itemsize
        payload = np.empty(len(header) + size, np.uint8).data  # memory that numpy uses again, unlike bytearray
        payload[: len(header)] = header
        offset = len(header)
        for name in sorted(tensors):
            tensor = tensors[name].detach()
            if tensor.numel():  # one copy, straight into its place, from whatever device and dtype it has
                view = torch.frombuffer(payload, dtype=self.dtype, count=tensor.numel(), offset=offset)
                view.view(tensor.shape).copy_(tensor)
            offset += tensor.numel() * self.dtype.itemsize
        return payload

    def largest(self, specs: Specs) -> int:
        return len(self._header(specs)) + sum(map(math.prod, specs.values())) * self.dtype.itemsize

    def decode(self, payload: Buffer, specs: Specs) -> Tensors:
        return {name: t.to(torch.float32) for name, t in self._views(payload, specs).items()}

    def check(self, payload: Buffer, specs: Specs) -> float:
        norm = global_norm(self._views(payload, specs))
        if not math.isfinite(norm):
            raise ProtocolError("NaN or infinity in the tensors", Fault.NONFINITE)
        return norm

    def add(self, payload: Buffer, into: Tensors, weight: float = 1.0) -> None:
        tensors = self._views(payload, {name: t.shape for name, t in into.items()})
        for name, target in into.items():
            flat, found = target.detach().view(-1), tensors[name].view(-1)
            step = CHUNK if target.device.type == "cpu" else max(1, len(flat))
            for start in range(0, len(flat), step):
                values = found[start : start + step].to(flat.device, torch.float32)
                flat[start : start + step].add_(values if weight == 1.0 else values * weight)

    def read(self, payload: Buffer, specs: Specs, start: int, stop: int) -> torch.Tensor:
        pieces, views = pieces_of(specs, start, stop), self._views(payload, specs)
        out = torch.empty(stop - start)
        for piece in pieces:
            size = piece.stop - piece.start
            out[piece.at : piece.at + size] = views[piece.name].view(-1)[piece.start : piece.stop]
        return out

    def _views(self, payload: Buffer, specs: Specs) -> Tensors:
        """Return the tensors as views of the payload, in their own dtype. Raises ProtocolError unless it fits."""
        data = memoryview(payload).cast("B")
        header = self._header(specs)
        if data[: len(header)] != header:
            raise ProtocolError(self._difference(data, specs))
        sizes = {name: math.prod(specs[name]) for name in specs}
        expected = len(header) + sum(sizes.values()) * self.dtype.itemsize
        if len(data) != expected:
            raise ProtocolError(f"payload of {len(data)} bytes where these tensors take {expected}")
        tensors, offset = {}, len(header)
        for name in sorted(specs):
            if sizes[name]:
                flat = torch.frombuffer(data, dtype=self.dtype, count=sizes[name], offset=offset)
            else:
                flat = torch.empty(0, dtype=self.dtype)
            tensors[name] = flat.view(specs[name])
            offset += sizes[name] * self.dtype.itemsize
        return tensors

    def _header(self, specs: Specs) -> bytes:
        return safetensors_header((name, self.dtype, specs[name]) for name in sorted(specs))

    def _difference(self, data: memoryview, specs: Specs) -> str:
        """Say in one line how the header differs from the expected one. It is parsed only once it has been refused."""
        expected = self._header(specs)
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > min(len(data) - 8, 2 * len(expected) + 1024):
            return f"no such header: {len(data)} bytes, header of {length}, expected {len(expected) - 8}"
        try:
            found = json.loads(bytes(data[8 : 8 + length]))
        except (ValueError, RecursionError):
            return "the header is not JSON"
        if not isinstance(found, dict):
            return "the header is not an object"
        if missing := sorted(specs.keys() - found.keys()):
            return f"tensor {missing[0][:200]} is missing ({len(missing)} in all)"
        if extra := sorted(found.keys() - specs.keys()):
            return f"tensor {extra[0][:200]} was not asked for ({len(extra)} in all)"
        for name in sorted(specs):
            entry = found[name] if isinstance(found[name], dict) else {}
            if entry.get("dtype") != dtype_name(self.dtype):
                return f"tensor {name}: dtype {str(entry.get('dtype'))[:20]}, expected {dtype_name(self.dtype)}"
            if entry.get("shape") != list(specs[name]):
                return f"tensor {name}: shape {str(entry.get('shape'))[:80]}, expected {list(specs[name])}"
        return "the tensors are not laid out in the order of their names without gaps"


def global_norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """Return the Euclidean norm over all tensors on the CPU, summed in fp64; not finite if any value is not."""
    total, wide = 0.0, torch.empty(CHUNK, dtype=torch.float64)
    for _, t in sorted(tensors.items()):
        for chunk in torch.split(t.flatten(), CHUNK):
            total += float(wide[: chunk.numel()].copy_(chunk).square_().sum())
    return math.sqrt(total)


FP32 = Dense(torch.float32)
BF16 = Dense(torch.bfloat16)
