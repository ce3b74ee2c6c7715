"""The flags of base_train.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pilot.app.training_flags import RUN, SHOW, TRAINING, TrainingConfig, WandbConfig
from pilot.common.flags import arg, nested


@dataclass(frozen=True)
class BaselineConfig(TrainingConfig):
    """Train the same task without a marketplace: same optimizer, schedule and data. Under torchrun the ranks share it.

    nanochat's own flag names work too: --depth 4 --max-seq-len 512 --num-iterations 20 --device-batch-size 4 and so on.
    """

    wandb: WandbConfig = nested(WandbConfig, SHOW)
    run: str = arg("", RUN, short=True, resume="command")
    """Name of the run in W&B and of its folder in base_checkpoints. Empty: d4 for a nanochat of depth 4, d4-2 for the
    second one, and so on; with --resume the last of them."""
    batches: int = arg(8, TRAINING, short=True)
    """Micro-batches in a step (gradient accumulation): a marketplace's --batches times its miners."""
    total_batch_size: int = arg(0, TRAINING)
    """Units (tokens) in a step, instead of --batches. -1: nanochat's rule for its depth. 0: use --batches."""
    target_param_data_ratio: float = arg(0.0, TRAINING)
    """Tokens for each parameter of nanochat's matrices and head, instead of --rounds. 0: use --rounds."""
    compile: bool = arg(False, TRAINING, short=True)
    """Compile the model with torch.compile: faster after a first step that takes a minute longer."""
    checkpoints: Path | None = arg(None, RUN, short=True, resume="command", path="folder")
    """Folder for checkpoints and metrics.jsonl. None: base_checkpoints/RUN in NANOCHAT_BASE_DIR for --task nanochat,
    written at the end; other tasks write none."""
    save_every: int = arg(0, RUN, short=True)
    """Steps between checkpoints. 0: only the last. Ctrl-C saves one too."""
    save_keep: int = arg(2, RUN)
    """Checkpoints to keep, the newest."""
    resume: bool = arg(False, RUN, short=True, resume="command")
    """Continue exactly from the newest checkpoint."""
    overwrite: bool = arg(False, RUN, short=True, resume="command")
    """Delete the checkpoints that an earlier run left in the folder."""
    out: Path | None = arg(None, RUN, short=True, resume="command", path="write")
    """Safetensors file for the final parameters."""
    log: Path | None = arg(None, SHOW, short=True, resume="command", path="log")
    """File for the figures of each step, one JSON object a line."""
    config: Path | None = arg(None, RUN, short=True, resume="command")
    """JSON file of flags. Flags on the command line override it."""
