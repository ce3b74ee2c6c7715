"""The baseline: the same task, optimizer, schedule and batches as a marketplace, in one process.

    python scripts/base_train.py --task gpt2 --rounds 20 --batches 8 --out final.safetensors

A marketplace of N miners with --batches B walks the same indices as this with --batches N*B.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import cli
from market.config import BaselineConfig

PROGRAM = "base_train.py"


def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(BaselineConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    from market.baseline import learning_rate, new_learner, train
    from protocol import Range
    from records.console import Console
    from tasks import load_task

    with cli.mistakes(PROGRAM):
        if config.batches < 1 or config.rounds < 1:
            raise ValueError(f"--rounds {config.rounds}, --batches {config.batches}: must be 1 or more")
        for flag, path in (("out", config.out), ("log", config.log)):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"--{flag} {path}: there is no folder {path.absolute().parent}; make it first")
        device = cli.pick_device(config.device)
        cli.set_threads(config.threads)
        cli.reuse_memory()
        task = load_task(config.task).prepare(
            getattr(config, config.task), seed=config.seed, cache=config.cache.expanduser(), progress=print
        )
    learner = new_learner(config, task, device)
    b = config.batches
    steps = (((Range(i * b, (i + 1) * b),), learning_rate(config, i)) for i in range(config.rounds))
    with Console(config.rounds, debug=False) as console, open(config.log or os.devnull, "w") as log:
        began = time.monotonic()
        for done, work in enumerate(filter(None, train(learner, steps)), 1):
            seconds = time.monotonic() - began
            row = {"round": done - 1, "loss": work.loss, "seconds": seconds, f"{task.unit}_per_s": work.count / seconds}
            if done == config.rounds or (config.eval_every and done % config.eval_every == 0):
                row |= task.evaluate(learner.model)
            console.round(row)
            print(json.dumps(row), file=log, flush=True)
            began = time.monotonic()
    if config.out is not None:
        from safetensors.torch import save_file

        save_file({name: p.detach().cpu() for name, p in learner.parameters.items()}, config.out)
        print(f"parameters in {config.out}")


if __name__ == "__main__":
    main()
