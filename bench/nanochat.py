"""nanochat's d4 on books, trained plainly and by a marketplace of two miners: bits per byte side by side.

    python -m bench.nanochat         # over a million tokens each, some ten minutes

Both walk the same batches with the same optimizer and schedule. The books lie in PILOT_DATA (books_train_30mb.parquet,
books_val.parquet); the tokenizer, 4,096 tokens, is trained here on the former.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from bench import Figure
from bench.overhead import run

MINERS = 2
BATCHES = 4  # micro-batches of each miner in a round
TOKENS = 4 * 512  # tokens in a micro-batch
STEPS = 64  # 64 * 2 * 4 * 2048 = 1,048,576 tokens


def flags(folder: Path) -> list[str]:
    return [
        *("--task", "nanochat", "--nanochat.depth", "4", "--nanochat.text", str(folder / "books")),
        *("--nanochat.tokenizer", str(folder / "tokenizer.json"), "--nanochat.eval-sequences", "200"),
        *("--rounds", str(STEPS), "--eval-every", "0", "--cache", str(folder / "cache"), "--device", "cpu"),
    ]


def baseline(folder: Path) -> dict[str, float]:
    log = folder / "baseline.jsonl"
    command = [sys.executable, "scripts/base_train.py", "--batches", str(MINERS * BATCHES), "--log", str(log)]
    run([*command, "--checkpoints", str(folder / "checkpoints"), *flags(folder)])
    return last_row(log)


def market(folder: Path) -> dict[str, float]:
    command = [sys.executable, "src/validator.py", "--local", str(MINERS), "--run", "books", "--runs", str(folder)]
    command += ["--batches", str(BATCHES), "--broadcast", "full", "--codec.up", "fp32", "--aggregation", "mean"]
    run([*command, "--wallet.path", str(folder / "wallets"), *flags(folder)])
    return last_row(folder / "books" / "metrics.jsonl")


def last_row(path: Path) -> dict[str, float]:
    row: dict[str, float] = json.loads(path.read_text().splitlines()[-1])
    return row


def main() -> None:
    data = os.environ.get("PILOT_DATA")
    if not data:
        print("no figure: PILOT_DATA names no folder with books_train_30mb.parquet", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory(prefix="pilot-bench-", dir=os.environ.get("PILOT_BENCH_DIR")) as name:
        folder = Path(name)
        (folder / "books").mkdir()
        for shard in ("books_train_30mb.parquet", "books_val.parquet"):  # in this order: the last is for validation
            (folder / "books" / shard).symlink_to(Path(data) / shard)
        train, tokenizer = str(folder / "books" / "books_train_30mb.parquet"), str(folder / "tokenizer.json")
        run([sys.executable, "scripts/tok_train.py", "--data", train, "--vocab-size", "4096", "--out", tokenizer])
        plain, ours = baseline(folder), market(folder)
        print(f"{STEPS * MINERS * BATCHES * TOKENS:,} tokens each; the loss of a token in nats: "
              f"marketplace {ours['val_loss']:.4f}, baseline {plain['val_loss']:.4f}", file=sys.stderr)  # fmt: skip
        ratio = ours["val_bpb"] / plain["val_bpb"]
        Figure("nanochat.bpb.marketplace", ours["val_bpb"], "bits/byte", "base_train", plain["val_bpb"], ratio)


if __name__ == "__main__":
    main()
