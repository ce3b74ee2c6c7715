"""How fast the codecs are, and how small: 124M parameters in GPT-2 small's shapes, one thread.

    python -m bench.codec [NAME …]

Encoding, and decoding as the validator does it: added to a tensor that is there. Beside each, in turns, the same done
with whole tensors in plain torch. Seconds are of this thread's CPU, so that other work on the machine is not in them;
medians of a few turns. `codec.copy_s`, one copy of the same data in fp32, says how fast the memory is meanwhile.
The values are normal, rows scaled lognormally: gradients differ from row to row. Bits are of the whole payload.
Where there is a GPU, `….encode_cuda_s` and `….decode_cuda_s` are of the wall clock, tensors on the GPU, bytes off it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from bench import Figure
from bench.transport import forget_peak, memory
from pilot.codec import load_codec
from pilot.codec.topk import CHUNK, KEPT

TURNS = 3
Tensors = dict[str, torch.Tensor]

NAMES = ("int8", "int4", "2bit", "ternary-rc", "1bit", "topk64")


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte": (50257, 768), "wpe": (1024, 768), "ln_f.weight": (768,)}
    shapes["ln_f.bias"] = (768,)
    for layer in range(12):
        for name, inner, outer in (("attn.c_attn", 768, 2304), ("attn.c_proj", 768, 768)):
            shapes |= {f"h.{layer}.{name}.weight": (inner, outer), f"h.{layer}.{name}.bias": (outer,)}
        for name, inner, outer in (("mlp.c_fc", 768, 3072), ("mlp.c_proj", 3072, 768)):
            shapes |= {f"h.{layer}.{name}.weight": (inner, outer), f"h.{layer}.{name}.bias": (outer,)}
        shapes |= {f"h.{layer}.{name}": (768,) for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")}
    return shapes


def gradient() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in gpt2_shapes().items():
        rows = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator).exp()
        found[name] = torch.randn(shape, generator=generator).mul_(rows).mul_(1e-4)
    return found


# --- the same in plain torch: whole tensors, nothing clever -----------------------------------------------------------

Blocks = tuple[torch.Tensor, torch.Tensor]  # scales [blocks, 1], bytes [rows, 128] of digits
LEVELS = {
    "int8": torch.arange(256.0) - 128,
    "int4": torch.arange(16.0) - 8,
    "2bit": torch.tensor([-95.0, -29.0, 29.0, 95.0]),
    "ternary": torch.tensor([-1.0, 0.0, 1.0]),
    "1bit": torch.tensor([-1.0, 1.0]),
}
DIGITS = {"int8": 1, "int4": 2, "2bit": 4, "ternary": 5, "1bit": 8}


def quantise(name: str, x: torch.Tensor) -> Blocks:
    if name in ("int8", "int4"):
        top = 127 if name == "int8" else 7
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / top
        return scale, (torch.round(x / scale) + (top + 1)).to(torch.uint8)
    if name == "1bit":
        return x.abs().mean(1, keepdim=True), (x >= 0).to(torch.uint8)
    rms = x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    if name == "ternary":
        beyond = x.abs() > 0.612 * rms
        scale = (x.abs() * beyond).sum(1, keepdim=True) / beyond.sum(1, keepdim=True).clamp(min=1)
        return scale, (torch.sign(x) * beyond + 1).to(torch.uint8)
    high = x.abs() > 0.9816 * rms
    level = torch.where(high, 95.0, 29.0) * torch.sign(x)
    scale = (x * level).sum(1, keepdim=True) / level.square().sum(1, keepdim=True).clamp(min=1)
    return scale, torch.where(x >= 0, 2 + high.to(torch.uint8), 1 - high.to(torch.uint8)).to(torch.uint8)


def plain_encode(name: str, tensors: Tensors) -> dict[str, Blocks]:
    found = {}
    for key, t in tensors.items():
        x = torch.nn.functional.pad(t.view(-1), (0, -t.numel() % (128 * DIGITS[name]))).view(-1, 128)
        scale, digits = quantise(name, x)
        planes = digits.view(-1, DIGITS[name], 128)
        found[key] = (
            scale.half(),
            sum((planes[:, i] * len(LEVELS[name]) ** i for i in range(1, DIGITS[name])), planes[:, 0]),
        )
    return found


def plain_add(name: str, payload: dict[str, Blocks], into: Tensors) -> None:
    base = len(LEVELS[name])
    for key, (scale, packed) in payload.items():
        planes = [packed // base**i % base for i in range(DIGITS[name])] if DIGITS[name] > 1 else [packed]
        values = LEVELS[name][torch.stack(planes, 1).int()].view(-1, 128) * scale.float()
        into[key] += values.view(-1)[: into[key].numel()].view(into[key].shape)


Factored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # scales of the rows, of the columns, bytes of digits


def plain_rc_encode(tensors: Tensors) -> dict[str, Factored]:
    found = {}
    for key, t in tensors.items():
        x = t.view(-1, t.shape[-1] if t.dim() > 1 else 128)
        row = x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
        column = (x / row).square().mean(0, keepdim=True).sqrt() if t.dim() > 1 else torch.ones(1, 128)
        code = torch.sign(x) * (x.abs() > 0.612 * row * column)
        level = code * column
        row = (x * level).sum(1, keepdim=True) / level.square().sum(1, keepdim=True).clamp(min=1e-30)
        planes = torch.nn.functional.pad((code + 1).to(torch.uint8).view(-1), (0, -x.numel() % 640)).view(-1, 5, 128)
        packed = planes[:, 0] + planes[:, 1] * 3 + planes[:, 2] * 9 + planes[:, 3] * 27 + planes[:, 4] * 81
        found[key] = row.bfloat16(), column.bfloat16(), packed
    return found


def plain_rc_add(payload: dict[str, Factored], into: Tensors) -> None:
    for key, (row, column, packed) in payload.items():
        planes = torch.stack([packed // 3**i % 3 for i in range(5)], 1).view(-1)[: into[key].numel()]
        levels = LEVELS["ternary"][planes.int()].view(-1, column.shape[1])
        into[key] += (levels * row.float() * column.float()).view(into[key].shape)


Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # indices, signs and codes, the two levels of each chunk


def plain_top_encode(tensors: Tensors) -> dict[str, Kept]:
    found = {}
    for key, t in tensors.items():
        x = torch.nn.functional.pad(t.view(-1), (0, -t.numel() % CHUNK)).view(-1, CHUNK)
        index = x.abs().topk(KEPT, dim=1).indices.sort(1).values
        value = x.gather(1, index)
        high = value.abs() > value.abs().mean(1, keepdim=True)
        levels = torch.stack([(value.abs() * m).sum(1) / m.sum(1).clamp(min=1) for m in (~high, high)], 1)
        pairs = index[:, 0::2] | index[:, 1::2] << 12
        packed = torch.stack([pairs >> shift & 255 for shift in (0, 8, 16)]).to(torch.uint8)
        code = (value < 0).long() * 2 + high
        codes = (code.view(len(x), -1, 4) << torch.tensor([0, 2, 4, 6])).sum(2).to(torch.uint8)
        found[key] = packed, codes, levels.half()
    return found


def plain_top_add(payload: dict[str, Kept], into: Tensors) -> None:
    for key, (packed, codes, levels) in payload.items():
        pairs = (packed.long() << torch.tensor([0, 8, 16]).view(3, 1, 1)).sum(0)
        index = torch.stack([pairs & 4095, pairs >> 12], 2).view(-1, KEPT)
        code = (codes[:, :, None] >> torch.tensor([0, 2, 4, 6]) & 3).long().view(-1, KEPT)
        value = levels.float().gather(1, code & 1) * (1 - 2 * (code >> 1))
        dense = torch.zeros(len(index), CHUNK).scatter_(1, index, value)
        into[key] += dense.view(-1)[: into[key].numel()].view(into[key].shape)


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds(play: Callable[[], object], warm: bool = False) -> float:
    """`warm`: the second time counts, when the system has the memory back that a peer has left in pieces."""
    if warm:
        play()
    began = time.thread_time()
    play()
    return time.thread_time() - began


def measure(name: str, tensors: Tensors, into: Tensors) -> None:
    codec = load_codec(name)
    payload = codec.encode(tensors)
    plays: dict[str, Callable[[], object]]
    if name == "topk64":
        theirs = plain_top_encode(tensors)
        plays = {"encode": lambda: plain_top_encode(tensors), "decode": lambda: plain_top_add(theirs, into)}
    elif name == "ternary-rc":
        factored = plain_rc_encode(tensors)
        plays = {"encode": lambda: plain_rc_encode(tensors), "decode": lambda: plain_rc_add(factored, into)}
    else:
        blocks = plain_encode(name, tensors)
        plays = {"encode": lambda: plain_encode(name, tensors), "decode": lambda: plain_add(name, blocks, into)}
    ours: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(tensors),
        "decode": lambda: codec.add(payload, into),
    }
    for what, play in ours.items():
        turns = [(seconds(play, warm=True), seconds(plays[what])) for _ in range(TURNS)]
        mine, peer = (median(column) for column in zip(*turns, strict=True))
        Figure(f"codec.{name}.{what}_s", mine, "s", "plain torch", peer, peer / mine)
    count = sum(t.numel() for t in tensors.values())
    bits = 8 * len(memoryview(payload)) / count
    Figure(f"codec.{name}.bits_per_param", bits, "bits", "fp32", 32.0, 32 / bits)


def extra_mb(play: Callable[[], object]) -> float:
    play()
    before = forget_peak()
    result = play()
    peak = memory("VmHWM")
    del result
    return (peak - before) / 1e6


def cuda_seconds(play: Callable[[], object]) -> float:
    play()
    torch.cuda.synchronize()
    turns = []
    for _ in range(4 * TURNS):
        began = time.perf_counter()
        play()
        torch.cuda.synchronize()
        turns.append(time.perf_counter() - began)
    return median(turns)


def measure_cuda(name: str, tensors: Tensors, into: Tensors) -> None:
    codec = load_codec(name)
    payload = codec.encode(tensors)
    Figure(f"codec.{name}.encode_cuda_s", cuda_seconds(lambda: codec.encode(tensors)), "s")
    Figure(f"codec.{name}.decode_cuda_s", cuda_seconds(lambda: codec.add(payload, into)), "s")


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:] or NAMES
    tensors = gradient()
    into = {name: torch.zeros_like(t) for name, t in tensors.items()}
    Figure(
        "codec.copy_s", median(seconds(lambda: [into[k].copy_(t) for k, t in tensors.items()]) for _ in range(7)), "s"
    )
    if "topk64" in names:
        mine, peer = extra_mb(lambda: load_codec("topk64").encode(tensors)), extra_mb(lambda: plain_top_encode(tensors))
        Figure("codec.topk64.encode_extra_mb", mine, "MB", "plain torch", peer, peer / mine)
    for name in names:
        measure(name, tensors, into)
    if torch.cuda.is_available():
        tensors, into = ({name: t.cuda() for name, t in found.items()} for found in (tensors, into))
        for name in names:
            measure_cuda(name, tensors, into)


if __name__ == "__main__":
    main()
