"""Runs every bench, writes bench/results.jsonl, and prints the README's table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHES = (
    *("startup", "tokenizer", "transport", "roundtrip", "junk", "model", "nanochat", "overhead", "codec", "join"),
    *("volatile", "thin", "wire", "scale", "chaos"),
)
RESULTS = Path(__file__).with_name("results.jsonl")


def table(lines: list[str]) -> str:
    """Markdown: figure, value, peer, ratio."""
    rows = ["| figure | value | peer | ratio |", "|---|---|---|---|"]
    for figure in map(json.loads, lines):
        peer = f"{figure['peer']}: {figure['peer_value']:.4g}" if figure["peer"] else ""
        ratio = f"{figure['ratio']:.3f}" if figure["ratio"] is not None else ""
        rows.append(f"| `{figure['name']}` | {figure['value']:.4g} {figure['unit']} | {peer} | {ratio} |")
    return "\n".join(rows)


def main() -> None:
    lines: list[str] = []
    for bench in BENCHES:
        print(f"python -m bench.{bench}", file=sys.stderr, flush=True)
        out = subprocess.run([sys.executable, "-m", f"bench.{bench}"], stdout=subprocess.PIPE, text=True, check=True)
        lines += out.stdout.splitlines()
        RESULTS.write_text("\n".join(lines) + "\n")  # what is measured stays, whatever comes next
    print(table(lines))


if __name__ == "__main__":
    main()
