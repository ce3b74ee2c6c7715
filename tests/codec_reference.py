"""Read the layouts of the compressing codecs a value at a time, as their docstrings draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pilot.codec.topk import CHUNK, KEPT

# base, digits of a byte, the level of each digit
CODES = {
    "int8": (256, 1, [digit - 256 if digit > 127 else digit for digit in range(256)]),
    "int4": (16, 2, [digit - 8 for digit in range(16)]),
    "2bit": (4, 4, [29, 95, -95, -29]),
    "ternary": (3, 5, [-1, 0, 1]),
    "1bit": (2, 8, [-1, 1]),
}
Values = dict[str, np.ndarray]


def unpacked(name: str, payload: bytes) -> bytes:
    """Return the body, which follows a header of 32 bytes."""
    assert payload[:32] == b"pilot/q1" + name.encode().ljust(24, b"\0")
    return payload[32:]


def bf16(high: int, low: int) -> np.float32:
    return np.float32(np.frombuffer(bytes([0, 0, low, high]), np.float32)[0])


def blocks_of(specs: Mapping[str, torch.Size], width: int) -> list[tuple[str, int, int]]:
    """Name, first value, number of values of each block."""
    found = []
    for name in sorted(specs):
        size = math.prod(specs[name])
        found += [(name, start, min(width, size - start)) for start in range(0, size, width)]
    return found


def read(name: str, payload: bytes, specs: Mapping[str, torch.Size]) -> Values:
    """Flat fp32 values of each tensor."""
    body = unpacked(name, payload)
    if name == "ternary-rc":
        return read_rows_and_columns(body, specs)
    return read_quantised(name, body, specs) if name in CODES else read_topk(body, specs)


def read_quantised(name: str, body: bytes, specs: Mapping[str, torch.Size]) -> Values:
    blocks = blocks_of(specs, 128)
    scales = [bf16(body[i], body[len(blocks) + i]) for i in range(len(blocks))]
    levels = read_levels(name, body[2 * len(blocks) :], specs)
    for i, (tensor, start, size) in enumerate(blocks):
        levels[tensor][start : start + size] *= scales[i]
    return levels


def read_levels(name: str, rows: bytes, specs: Mapping[str, torch.Size]) -> Values:
    base, digits, levels = CODES[name]
    blocks = blocks_of(specs, 128)
    height = -(-len(blocks) // digits)
    assert len(rows) == 128 * height
    values = {name: np.zeros(math.prod(shape), np.float32) for name, shape in specs.items()}
    for i, (tensor, start, size) in enumerate(blocks):
        for j in range(size):
            byte = rows[i % height * 128 + j]
            values[tensor][start + j] = levels[byte // base ** (i // height) % base]
    return values


def is_matrix(shape: torch.Size) -> bool:
    """With scales for rows and columns: of whole blocks, and 128 rows or more."""
    return len(shape) > 1 and shape[-1] > 0 and shape[-1] % 128 == 0 and math.prod(shape[:-1]) >= 128


def read_rows_and_columns(body: bytes, specs: Mapping[str, torch.Size]) -> Values:
    matrices = [name for name in sorted(specs) if is_matrix(specs[name])]
    width = {name: specs[name][-1] if name in matrices else 128 for name in specs}
    rows = {name: -(-math.prod(specs[name]) // width[name]) for name in sorted(specs)}
    number = sum(rows.values()) + sum(width[name] for name in matrices)
    scales = iter([bf16(body[i], body[number + i]) for i in range(number)])
    values = read_levels("ternary", body[2 * number :], specs)
    for name, count in rows.items():
        for start in range(0, count * width[name], width[name]):
            values[name][start : start + width[name]] *= next(scales)
    for name in matrices:
        for column in range(width[name]):
            values[name][column :: width[name]] *= next(scales)
    return values


def bits_of(data: bytes) -> list[int]:
    return [byte >> 7 - i & 1 for byte in data for i in range(8)]


def planes(data: bytes, count: int, bits: int) -> list[int]:
    size = -(-count // 8)
    rows = [bits_of(data[bit * size : (bit + 1) * size]) for bit in range(bits)]
    return [sum(row[i] << bit for bit, row in enumerate(rows)) for i in range(count)]


def read_topk(body: bytes, specs: Mapping[str, torch.Size]) -> Values:
    chunks = blocks_of(specs, CHUNK)
    number = len(chunks)
    counts = [math.ceil(KEPT * size / CHUNK) for _, _, size in chunks]
    total, plane = sum(counts), -(-sum(counts) // 8)
    scales = [bf16(body[i], body[number + i]) for i in range(number)]
    steps = [bf16(body[i], body[number + i]) for i in range(2 * number, 3 * number)]
    codes = planes(body[4 * number :], total, 2)
    indices = planes(body[4 * number + 2 * plane :], total, 12)
    values = {name: np.zeros(math.prod(shape), np.float32) for name, shape in specs.items()}
    entries = iter(zip(indices, codes, strict=True))
    for (tensor, start, _), count, scale, step in zip(chunks, counts, scales, steps, strict=True):
        for _ in range(count):
            index, code = next(entries)
            magnitude = scale + step * np.float32(code & 1)
            values[tensor][start + index] = -magnitude if code >> 1 else magnitude
    return values


def largest(values: Sequence[float], kept: int) -> list[int]:
    """Return the ascending places of the `kept` largest magnitudes; of equal ones the first."""
    return sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:kept])
