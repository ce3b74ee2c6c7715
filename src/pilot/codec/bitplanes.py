"""Small whole numbers as planes of bits: all the lowest bits, eight to a byte, then all the next ones.

Any width, no value across a byte's border, and each plane is one call of `packbits`; on a GPU the same in torch.
"""

from __future__ import annotations

import numpy as np
import torch

from pilot.codec.packed import Bytes

PIECE = 1 << 17  # values at a time on the CPU, whole bytes of them


def planes_size(count: int, bits: int) -> int:
    return bits * -(-count // 8)


def pack_planes(values: torch.Tensor, bits: int) -> Bytes:
    """[count] integers below 2^bits, on any device -> bits x ceil(count / 8) bytes."""
    planes = np.empty((bits, -(-len(values) // 8)), np.uint8)
    if values.device.type != "cpu":
        values = torch.nn.functional.pad(values.to(torch.int32), (0, -len(values) % 8)).view(-1, 8)
        places = torch.arange(7, -1, -1, device=values.device)
        packed = [((values >> bit & 1) << places).sum(1).to(torch.uint8) for bit in range(bits)]
        planes[:] = torch.stack(packed).cpu().numpy()
        return planes.reshape(-1)
    for start in range(0, len(values), PIECE):
        piece = values[start : start + PIECE].numpy()
        for bit in range(bits):
            packed_bits = np.packbits((piece & (1 << bit)) != 0)
            planes[bit, start // 8 : start // 8 + len(packed_bits)] = packed_bits
    return planes.reshape(-1)


def unpack_planes(planes: Bytes, bits: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Values `start`, …, `stop` - 1 of those packed in `planes`, int32 on the device."""
    rows = planes.reshape(bits, -1)[:, start // 8 : -(-stop // 8)]
    here = slice(start % 8, start % 8 + stop - start)
    if device.type != "cpu":
        packed = torch.from_numpy(np.ascontiguousarray(rows)).to(device).to(torch.int32)
        places = torch.arange(7, -1, -1, device=device)
        ones = (packed[:, :, None] >> places & 1).view(bits, -1)[:, here]
        return (ones << torch.arange(bits, device=device)[:, None]).sum(0).to(torch.int32)
    found = np.zeros(stop - start, np.int16)
    for bit, row in enumerate(rows):
        found |= np.unpackbits(row)[here].astype(np.int16) << np.int16(bit)
    return torch.from_numpy(found).to(torch.int32)
