"""nanochat's GPT beside the same written plainly (`bench.reference_gpt`): speed and memory of forward and backward.

    python -m bench.model        # some minutes; figures as JSON lines, the rest on stderr

Depth 4, a vocabulary of 32,768, 4 sequences of 512 tokens, on the CPU; fp32 and bf16, eager and compiled. A variant is
a process of its own; the two of a mode live side by side and take turns of a step, so that whatever else the machine
does falls on both. Both have torch's own number of threads, and the C library's own way with memory. In the figures
named reused both keep what is freed, as the miner and base_train do (`cli.reuse_memory`): that helps the plain one
most, which else spends a third of its time on fresh pages for its logits.

With a GPU also tokens/s and the share of its peak, at depths 12 and 20, with sequences of 2,048 tokens, bf16, compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch

from bench import Figure
from nanochat.config import GPTConfig
from pilot.app.cli import reuse_memory

OURS, PLAIN = VARIANTS = ("ours", "plain")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("eager", "compiled")
MEMORY = DEFAULT, REUSED = ("default", "reused")
DEPTH, VOCABULARY, BATCH, LENGTH = 4, 32_768, 4, 512
WARM_UP = 2
TURNS = 7
GPU_DEPTHS = {12: 32, 20: 16}  # sequences a step
GPU_LENGTH = 2048
GPU_STEPS = 10

Step = Callable[[], Any]


def build(variant: str, config: GPTConfig, dtype: torch.dtype, mode: str, batch: int, device: str = "cpu") -> Step:
    """A step: gradients from nothing for one and the same batch. Both variants have the same weights."""
    from bench.reference_gpt import ReferenceGPT
    from nanochat.gpt import GPT

    ours = GPT(config, dtype, device)
    ours.init_weights(torch.Generator().manual_seed(0))
    model: torch.nn.Module = ours
    if variant == PLAIN:
        model = ReferenceGPT(config, dtype).to(device)
        model.load_state_dict(ours.state_dict())
    del ours
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.sequence_len + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    run = torch.compile(model) if mode == "compiled" else model

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        loss = run(inputs, targets)
        loss.backward()
        return loss.detach()

    return step


# --- on the CPU -------------------------------------------------------------------------------------------------------


def serve(variant: str, dtype: str, mode: str, memory: str) -> None:
    """In the process of its own: a step, with its seconds, for every line that comes; at the end the most memory."""
    if memory == REUSED:
        reuse_memory()
    config = GPTConfig.from_depth(DEPTH, vocab_size=VOCABULARY, sequence_len=LENGTH)
    step = build(variant, config, DTYPES[dtype], mode, BATCH)
    for _ in range(WARM_UP):
        loss = step()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: without compiling
    print(json.dumps({"loss": loss.item(), "threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - began), flush=True)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    print(json.dumps(int(found[1]) / 1024), flush=True)


class Process:
    """A variant that waits for its turns."""

    def __init__(self, variant: str, dtype: str, mode: str, memory: str) -> None:
        command = [sys.executable, "-m", "bench.model", variant, dtype, mode, memory]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin
        assert self.process.stdout
        self.lines: IO[str] = self.process.stdout
        self.turns: IO[str] = self.process.stdin
        self.seconds: list[float] = []
        self.said = self.hear()

    def hear(self) -> Any:
        line = self.lines.readline()
        if not line:
            sys.exit(f"a process of the benchmark ended with {self.process.wait()}")
        return json.loads(line)

    def take_turn(self) -> None:
        self.turns.write("\n")
        self.turns.flush()
        self.seconds.append(self.hear())

    def end(self) -> float:
        """The most memory that a step took, in MB."""
        self.turns.close()
        peak: float = self.hear()
        return peak

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def compare(dtype: str, mode: str, memory: str) -> None:
    """The figures of a mode."""
    with ExitStack() as stack:
        both = {variant: stack.enter_context(Process(variant, dtype, mode, memory)) for variant in VARIANTS}
        for turn in range(TURNS):
            for variant in VARIANTS if turn % 2 else reversed(VARIANTS):
                both[variant].take_turn()
        ours, plain = (BATCH * LENGTH / median(both[variant].seconds) for variant in VARIANTS)
        said = {variant: process.said for variant, process in both.items()}
        peaks = {variant: process.end() for variant, process in both.items()}
    print(f"{dtype} {mode} {memory}: {said}", file=sys.stderr, flush=True)
    if abs(said[OURS]["loss"] - said[PLAIN]["loss"]) > 1e-3:
        sys.exit(f"{dtype} {mode}: not the loss of the plain one")
    name = f"{dtype}.{mode}" + (f".{REUSED}" if memory == REUSED else "")
    Figure(f"model.tokens_per_s.{name}", ours, "tokens/s", "the same written plainly", plain, ours / plain)
    ratio = peaks[OURS] / peaks[PLAIN]
    Figure(f"model.peak_mb.{name}", peaks[OURS], "MB", "the same written plainly", peaks[PLAIN], ratio)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def gpu(depth: int, batch: int) -> None:
    """The share of the device's dense bf16 peak. Embeddings do not count, attention within its windows does."""
    from nanochat.common import peak_flops

    device = "cuda"
    config = GPTConfig.from_depth(depth, vocab_size=VOCABULARY, sequence_len=GPU_LENGTH)
    step = build(OURS, config, torch.bfloat16, "compiled", batch, device)
    for _ in range(WARM_UP + 1):
        step()
    seconds = []
    for _ in range(GPU_STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    speed = batch * GPU_LENGTH / median(seconds)
    Figure(f"model.tokens_per_s.d{depth}", speed, "tokens/s")
    peak = peak_flops(torch.device(device))
    if peak is None:
        print(f"{torch.cuda.get_device_name()}: its peak is not known", file=sys.stderr)
        return
    Figure(f"model.mfu.d{depth}", 100 * speed * config.flops_per_token() / peak, "% of the bf16 peak")


def main() -> None:
    if len(sys.argv) > 1:
        serve(*sys.argv[1:5])
        return
    for dtype in DTYPES:
        for mode in MODES:
            for memory in MEMORY:
                compare(dtype, mode, memory)
    if not torch.cuda.is_available():
        print("no GPU: no figures of one", file=sys.stderr)
        return
    torch.set_float32_matmul_precision("high")
    for depth, batch in GPU_DEPTHS.items():
        gpu(depth, batch)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
