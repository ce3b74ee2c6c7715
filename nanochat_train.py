"""The short form of scripts/base_train.py for nanochat, which takes any flag of that as well.

python nanochat_train.py --num-steps 50 --batch-size 2 --max-length 512 --wandb-project pilot --run first
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent / folder) for folder in ("scripts", "src")]

from pilot.common import interrupts

PROGRAM = "nanochat_train.py"
if __name__ == "__main__":
    interrupts.catch(PROGRAM, "stopped; nothing was trained yet")

from base_train import main

if __name__ == "__main__":
    main(["--task", "nanochat", *sys.argv[1:]], program=PROGRAM)
