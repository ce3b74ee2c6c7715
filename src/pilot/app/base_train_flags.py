"""The flags of base_train.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pilot.app.training_flags import TrainingConfig, WandbConfig


@dataclass(frozen=True)
class BaselineConfig(TrainingConfig):
    """The same task, optimizer, schedule and data without a marketplace. Under torchrun each rank takes its part.

    nanochat's own names do as well: --depth 4 --max-seq-len 512 --num-iterations 20 --device-batch-size 4 and so on.
    """

    wandb: WandbConfig = field(default_factory=WandbConfig)
    run: str = ""
    """Name of the run in W&B, and of its folder in base_checkpoints; empty: d4 for a nanochat of depth 4."""
    batches: int = 8
    """Micro-batches in a step (gradient accumulation): a marketplace's --batches times its miners."""
    total_batch_size: int = 0
    """Units (tokens) in a step, instead of --batches; -1: nanochat's rule for its depth. 0: as --batches says."""
    target_param_data_ratio: float = 0.0
    """nanochat: so many tokens for each parameter of matrices and head, instead of --rounds. 0: as --rounds says."""
    compile: bool = False
    """Compile the model with torch.compile: faster after a first step that takes a minute more."""
    checkpoints: Path | None = None
    """Folder for checkpoints and metrics.jsonl. None: nanochat's base_checkpoints/RUN in NANOCHAT_BASE_DIR, which
    --task nanochat writes at the end; no other task writes any."""
    save_every: int = 0
    """Steps between checkpoints; 0 for only the last. Ctrl-C saves one too."""
    save_keep: int = 2
    """Checkpoints kept, the newest ones."""
    resume: bool = False
    """Go on from the newest checkpoint, exactly."""
    out: Path | None = None
    """File for the final parameters, as safetensors."""
    log: Path | None = None
    """File for the steps' figures, a JSON line a step."""
    config: Path | None = None
    """JSON file of flags; flags given here override it."""
