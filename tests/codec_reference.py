"""The layouts of the compressing codecs, read a value at a time, as their docstrings draw them: slow and plain."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from pilot.codec import CHUNK

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
    """The body: after a header of 32 bytes, perhaps deflated."""
    assert payload[:31] == b"pilot/q1" + name.encode().ljust(23, b"\0")
    assert payload[31] in (0, 1)
    return zlib.decompress(payload[32:], -15) if payload[31] else payload[32:]


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
    plain = name.removesuffix("+entropy")
    body = unpacked(name, payload)
    if plain == "ternary-rc":
        return read_rows_and_columns(body, specs)
    if plain in CODES:
        return read_quantised(plain, body, specs)
    return read_topk(plain, body, specs, rice=plain != name)


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


def read_topk(name: str, body: bytes, specs: Mapping[str, torch.Size], rice: bool) -> Values:
    kept, _, four = name.removeprefix("topk").partition("-")
    bits = 4 if four else 2
    chunks = blocks_of(specs, CHUNK)
    number = len(chunks)
    counts = [math.ceil(int(kept) * size / CHUNK) for _, _, size in chunks]
    total, plane = sum(counts), -(-sum(counts) // 8)
    scales = [bf16(body[i], body[number + i]) for i in range(number)]
    steps = [bf16(body[i], body[number + i]) for i in range(2 * number, 3 * number)]
    codes = planes(body[4 * number :], total, bits)
    body = body[4 * number + bits * plane :]
    low = int(math.log2(math.log(2) * (CHUNK - int(kept)) / int(kept))) if rice else 12
    remainders = planes(body, total, low)
    unary = iter(bits_of(body[low * plane :]))
    values = {name: np.zeros(math.prod(shape), np.float32) for name, shape in specs.items()}
    entries = iter(zip(remainders, codes, strict=True))
    for (tensor, start, _), count, scale, step in zip(chunks, counts, scales, steps, strict=True):
        index = -1
        for _ in range(count):
            remainder, code = next(entries)
            index = index + 1 + (zeros(unary) << low) + remainder if rice else remainder
            magnitude = scale + step * np.float32(code & (1 << bits - 1) - 1)
            values[tensor][start + index] = -magnitude if code >> bits - 1 else magnitude
    assert next(unary, None) is None or not any(unary)
    return values


def zeros(bits: Iterator[int]) -> int:
    """How many before the next one."""
    return next(i for i, bit in enumerate(bits) if bit)


def largest(values: Sequence[float], kept: int) -> list[int]:
    """Ascending places of the `kept` largest magnitudes; of equal ones the first."""
    return sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:kept])
