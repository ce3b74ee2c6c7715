"""The short form of scripts/base_train.py for nanochat, which takes any flag of that as well.

python nanochat_train.py --num-steps 50 --batch-size 2 --max-length 512 --wandb-project pilot --run first
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))

from base_train import main

if __name__ == "__main__":
    main(["--task", "nanochat", *sys.argv[1:]], program="nanochat_train.py")
