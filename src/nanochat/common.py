"""nanochat's folder, the peak speed and memory of devices, and the memory that a model needs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.config import GPTConfig
from pilot.common.paths import expanded
from pilot.common.units import format_bytes

if TYPE_CHECKING:
    import torch

# Dense bf16 tensor TFLOP/s with fp32 accumulation, without sparsity, from the vendors' data sheets. A device is the
# first entry whose words are all in its name.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("gb300", 2500.0),
    ("b300", 2250.0),
    ("gb200", 2500.0),
    ("b200", 2250.0),
    ("b100", 1750.0),
    ("h200 nvl", 835.5),
    ("h200", 989.4),
    ("gh200", 989.4),
    ("h100 nvl", 835.5),
    ("h100 pcie", 756.0),
    ("h100", 989.4),
    ("h800 pcie", 756.0),
    ("h800", 989.4),
    ("h20", 148.0),
    ("a100", 312.0),
    ("a800", 312.0),
    ("a40", 149.7),
    ("a30", 165.0),
    ("a10g", 70.0),
    ("a10", 125.0),
    ("l40s", 362.0),
    ("l40", 181.0),
    ("l4", 121.0),
    ("rtx pro 6000", 503.8),
    ("rtx 6000 ada", 364.2),
    ("rtx a6000", 154.8),
    ("rtx 5090", 209.5),
    ("rtx 5080", 112.6),
    ("rtx 4090", 165.2),
    ("rtx 4080 super", 104.4),
    ("rtx 4080", 97.5),
    ("rtx 3090 ti", 80.0),
    ("rtx 3090", 71.0),
    ("mi355x", 2516.6),
    ("mi350x", 2309.6),
    ("mi325x", 1307.4),
    ("mi300x", 1307.4),
    ("mi300a", 980.6),
    ("mi250x", 191.5),  # per die; each of the two is a device
    ("mi250", 181.0),
    ("mi210", 181.0),
)
_OTHER_CHIP = frozenset({"laptop", "mobile", "max", "mig", "super", "ti", "d"})  # other speeds than the plain name's

# Activations a token, in widths of the model: what the backward pass of a block keeps, and of the stream outside them.
_BLOCK_WIDTHS = 34
_STREAM_WIDTHS = 8
_MIXED_BYTES = 24  # fp32 parts of a block where activations are smaller
_HELD_SCORES = 1024  # keys up to which attention in bf16 on a CPU holds all scores (nanochat.attention)
_SCORE_BYTES = 6  # of a score that is held, with its gradient
_MASK_BYTES = 16  # of a pair of positions, while a window's mask is made
_LOSS_BYTES = 96 << 20  # the loss holds a chunk of the logits at a time
_TABLES_MADE = 3  # gradients of tables not yet added to the accumulated ones
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
_UNLIMITED = 1 << 60  # a cgroup without a limit reports a number above this, or "max"


def base_dir() -> Path:
    """Return the folder for data, tokenizer and checkpoints: $NANOCHAT_BASE_DIR or ~/.cache/nanochat."""
    chosen = os.environ.get("NANOCHAT_BASE_DIR")
    return Path(expanded("NANOCHAT_BASE_DIR", chosen or "~/.cache/nanochat"))


# --- speed ------------------------------------------------------------------------------------------------------------


def peak_flops(device: torch.device | str) -> float | None:
    """Return the dense bf16 FLOP/s of a device; None if unknown, as for every CPU."""
    import torch

    device = torch.device(device)
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(name: str) -> float | None:
    """Return them by the driver's name, such as "NVIDIA H100 80GB HBM3"; None for laptop chips and MIG slices."""
    words = frozenset(re.findall(r"[a-z0-9]+", name.lower()))
    for known, tera in _PEAKS:
        wanted = frozenset(known.split())
        if wanted <= words and not (words - wanted) & _OTHER_CHIP:
            return tera * 1e12
    return None


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_need(
    shape: GPTConfig, batch: int, optimizer: bool = True, *, activation_bytes: int = 4, copies: int = 0
) -> int:
    """Estimate the bytes needed to train on `batch` sequences at once: weights, gradients, moments, activations.

    Without `optimizer` there are no moments, as at a miner. `activation_bytes` is 4 for fp32, 2 for bf16. `copies` is
    the number of further copies of all weights, such as a state being sent.
    """
    counts = shape.parameter_counts()
    moments = 2 * (counts["total"] - counts["matrices"]) + counts["matrices"] if optimizer else 0
    fixed = (2 + copies) * counts["total"] + moments + _TABLES_MADE * counts["wte"]
    fixed += 2 * shape.rotary_len * shape.head_dim  # the rotary tables, and as much again to make them
    mixed = _MIXED_BYTES * shape.n_layer if activation_bytes < 4 else 0
    widths = activation_bytes * (_BLOCK_WIDTHS * shape.n_layer + _STREAM_WIDTHS) + mixed
    return 4 * fixed + _LOSS_BYTES + batch * shape.sequence_len * shape.n_embd * widths


def attention_need(shape: GPTConfig, batch: int, activation_bytes: int) -> int:
    """Estimate the bytes that attention needs besides `memory_need`: masks of windows, and scores that are held whole.

    These matter for many narrow heads, and for windows of a hundred thousand tokens.
    """
    longest = max((window for window in shape.windows() if window < shape.sequence_len), default=0)
    masks = 2 * longest**2 * _MASK_BYTES
    held = shape.sequence_len if activation_bytes < 4 and shape.sequence_len <= _HELD_SCORES else 0
    return masks + batch * shape.sequence_len * shape.n_head * held * _SCORE_BYTES * (shape.n_layer + 2)


def available_memory(device: torch.device | str, root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still allocate on the device; None if unknown.

    For the CPU, on Linux: the least of what the kernel can free and of what the process's control groups allow. `root`
    is the folder of /proc and /sys.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + cached
    if device.type != "cpu":
        return None
    found = [*_group_memory(root), *_machine_memory(root / "proc/meminfo")]
    return max(min(found), 0) if found else None


def usable_memory(device: torch.device | str, root: Path = Path("/")) -> int | None:
    """Return the bytes that this process has on the device, and can still allocate there; None if unknown."""
    import torch

    device = torch.device(device)
    there = available_memory(device, root)
    if there is None:
        return None
    if device.type == "cuda":
        return there + torch.cuda.memory_allocated(device)
    own = re.search(r"^RssAnon:\s+(\d+) kB$", _text(root / "proc/self/status"), re.MULTILINE)
    return there + (int(own[1]) * 1024 if own else 0)


def check_memory(
    shape: GPTConfig,
    batch: int,
    device: torch.device | str,
    optimizer: bool = True,
    *,
    activation_bytes: int = 4,
    copies: int = 0,
    root: Path = Path("/"),
) -> None:
    """Raise ValueError, with what to change, if training does not fit in the device's free memory."""
    need_of = partial(memory_need, optimizer=optimizer, activation_bytes=activation_bytes, copies=copies)
    need = need_of(shape, batch)
    there = available_memory(device, root)
    if there is None or need <= there:
        return
    line = (
        f"--nanochat.depth {shape.n_layer}: needs {format_bytes(need)} ({format_bytes(4 * _weights(shape))} of weights)"
    )
    fixed = need_of(shape, 0)
    per_row = need_of(shape, 1) - fixed
    rows = int(there - fixed) // per_row
    if rows >= 1:
        fix = f"train on {rows} sequences of {shape.sequence_len} tokens at once instead of {batch}"
    else:
        fix = f"choose a smaller depth{_that_fits(shape, there, need_of)}, or a larger device"
    raise ValueError(f"{line}, {device} has {format_bytes(there)} left; {fix}")


def _weights(shape: GPTConfig) -> int:
    return shape.parameter_counts()["total"]


def _that_fits(shape: GPTConfig, there: int, need_of: Callable[[GPTConfig, int], int]) -> str:
    """Say which is the greatest depth that fits with one sequence at a time."""
    for depth in range(shape.n_layer - 1, 0, -1):
        other = GPTConfig.from_depth(
            depth,
            "modern" if shape.value_embeds else "classic",
            vocab_size=shape.vocab_size,
            sequence_len=shape.sequence_len,
            aspect_ratio=max(1, shape.n_embd // shape.n_layer),
            head_dim=shape.head_dim,
            window_pattern=shape.window_pattern,
        )
        if need_of(other, 1) <= there:
            return f", such as {depth}"
    return ""


def _machine_memory(meminfo: Path) -> list[int]:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(meminfo), re.MULTILINE)
    return [int(found[1]) * 1024] if found else []


def _group_memory(root: Path) -> list[int]:
    """Return the bytes left in each control group (v1 or v2) that limits this process; page cache counts as free."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version = 2 if number == "0" else 1
        top = root / "sys/fs/cgroup" / ("" if version == 2 else "memory")
        limit, used, freeable = _FILES[version]
        group = top / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            allowed, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if allowed.isdigit() and now.isdigit() and int(allowed) < _UNLIMITED:
                cache = re.search(rf"^{freeable} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                left.append(int(allowed) - int(now) + (int(cache[1]) if cache else 0))
    return left


def _text(path: Path) -> str:
    """Read a file of the kernel; "" if it does not exist."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
