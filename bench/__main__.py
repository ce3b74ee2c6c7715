"""Run every bench, keep the figures in bench/results.jsonl, and render docs/BENCHMARKS.md from them.

python -m bench             # about half an hour
python -m bench --write     # only render the page
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.page import render

BENCHES = (
    *("startup", "tokenizer", "transport", "roundtrip", "junk", "model", "nanochat", "overhead", "codec", "join"),
    *("aggregation", "volatile", "thin", "wire", "scale", "chaos"),
)
RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "BENCHMARKS.md"


def main(argv: Sequence[str]) -> None:
    if argv not in ([], ["--write"]):
        raise SystemExit("usage: python -m bench [--write]")
    if not argv:
        lines: list[str] = []
        for bench in BENCHES:
            print(f"python -m bench.{bench}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", f"bench.{bench}"]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            lines += out.stdout.splitlines()
            RESULTS.write_text("\n".join(lines) + "\n")  # if a later bench fails, these figures stay
    PAGE.write_text(render(RESULTS.read_text().splitlines()))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
