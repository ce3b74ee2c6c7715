"""One warm round with 42 MB at two miners, everything durable: seconds from commit to commit.

    python -m bench.roundtrip

Real processes over loopback sockets: the validator sends each miner the whole state (fp32, 10.6 million parameters);
each computes a gradient on a single short sequence and sends 42 MB back; the validator verifies, aggregates, steps and
commits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench import Figure
from bench.overhead import commits

ROUNDS = 40
WARM_UP = 10


def save_model(folder: Path) -> Path:
    """A GPT-2 of 42 MB that computes next to nothing: 16 positions, one sequence a batch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        n_layer=6, n_head=6, n_embd=384, n_positions=16, vocab_size=256, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    model = GPT2LMHeadModel(shape)
    size = sum(p.numel() for p in model.parameters()) * 4
    assert 42e6 <= size < 44e6, size
    model.save_pretrained(folder)
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pilot-bench-", dir=os.environ.get("PILOT_BENCH_DIR")) as name:
        folder = Path(name)
        command = [sys.executable, "src/validator.py", "--local", "2", "--run", "round", "--runs", str(folder)]
        command += ["--gpt2.model", str(save_model(folder / "model")), "--gpt2.batch-size", "1", "--batches", "1"]
        command += ["--gpt2.tokenizer", "byte", "--gpt2.max-bytes", "1000000", "--gpt2.eval-sequences", "1"]
        command += ["--rounds", str(ROUNDS), "--eval-every", "0", "--cache", str(folder / "cache")]
        command += ["--wallet.path", str(folder / "wallets"), "--threads", "1"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = [after - before for before, after in pairwise(commits(folder / "round"))][WARM_UP:]
    Figure("transport.roundtrip_42mb_s", median(seconds), "s")


if __name__ == "__main__":
    main()
