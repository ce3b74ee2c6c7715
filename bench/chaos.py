"""Run marketplaces under random faults, with several seeds: python -m bench.chaos [--rounds 200]

chaos.violations is the number of violations that the checker found; chaos.loss the worst ratio of a final loss to
that of a run without faults. Each run's summary goes to stderr.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

from bench import Figure

SEEDS = range(1, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run five marketplaces under random faults, and count the violations.")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of each run")
    rounds: int = parser.parse_args().rounds
    violations, worst = 0, 0.0
    for seed in SEEDS:
        command = [sys.executable, "scripts/chaos.py", "--seed", str(seed), "--rounds", str(rounds)]
        ended = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"^(\d+) violations, 0 problems$", ended.stdout, re.MULTILINE)
        ratio = re.search(r"^loss .* ratio ([\d.]+)", ended.stdout, re.MULTILINE)
        if found is None or ratio is None:
            sys.exit(f"{' '.join(command)}\n{ended.stdout[-4000:]}\n{ended.stderr[-2000:]}")
        summary = [line for line in ended.stdout.splitlines() if not line.startswith("  ")]
        print(f"seed {seed}, {rounds} rounds", *summary, sep="\n  ", file=sys.stderr, flush=True)
        violations, worst = violations + int(found[1]), max(worst, float(ratio[1]))
    Figure("chaos.violations", violations, "violations")
    Figure("chaos.loss", worst, "ratio to a run without faults", "without faults", 1.0, worst)


if __name__ == "__main__":
    main()
